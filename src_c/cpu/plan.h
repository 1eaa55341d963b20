/* Planning of attention: which piece of which sequence is a task.
 *
 * Tasks differ with the number of threads and with the batch; bits do not (see RF_PART). */
#ifndef RF_CPU_PLAN_H
#define RF_CPU_PLAN_H

#include "cpu.h"

/* Work of all of a call, in tokens of one head read or four times as many rows computed. */
int64_t rf_plan_cost(const rf_attention_params *p);

/* Makes the plan of a call for so many threads, unless the plan is that already: all layers of a
 * batch have the same lengths, so that only the first one plans. max_cost bounds a task's work,
 * where it can. RF_ERR_NO_MEMORY leaves an empty plan. */
int rf_plan_make(rf_plan *plan, const rf_attention_params *p, const rf_variant *variant,
                 int64_t max_cost);

#endif
