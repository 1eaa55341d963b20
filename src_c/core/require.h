/* For the _validate functions: what must hold, and the sentence that says what does not. */
#ifndef RF_REQUIRE_H
#define RF_REQUIRE_H

#include "rf/status.h"

#define REQUIRE(condition, sentence)                                                               \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            *reason = (sentence);                                                                  \
            return RF_ERR_BAD_ARGUMENT;                                                            \
        }                                                                                          \
    } while (0)

#endif
