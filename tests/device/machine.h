/* Runs a grid of a kernel on the CPU, lane by lane. */
#ifndef RF_TEST_MACHINE_H
#define RF_TEST_MACHINE_H

#include <cstdint>
#include <string>

#include "lane.h"

/* Empty, or what the kernel did that no device could: a wave whose lanes do not meet, a barrier
 * that some lanes never reach. seed 0: lanes and workgroups in order, else in a random one. */
std::string rf_sim_run(const rf_sim_kernel &kernel, rf_sim_lane **lane_of_kernel,
                       const unsigned grid[3], unsigned threads, unsigned wave_size,
                       const void *arguments, uint64_t seed);

#endif
