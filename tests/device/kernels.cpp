/* A "code object" of the simulated device: a kernel family, RF_FAMILY, compiled for the host. */
#include "lane.h"

extern "C" {
__attribute__((visibility("default"))) rf_sim_lane *rf_sim;
extern __attribute__((visibility("default"))) const int rf_sim_wave;
const int rf_sim_wave = RF_SIMULATED_WAVE;
}

#include RF_FAMILY
