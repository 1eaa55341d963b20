#include "rf/status.h"

const char *rf_strerror(int status) {
    switch (status) {
    case RF_OK: return "success";
    case RF_ERR_NO_MEMORY: return "out of host memory";
    case RF_ERR_OUT_OF_BLOCKS: return "out of blocks";
    case RF_ERR_BAD_ARGUMENT: return "argument out of range";
    case RF_ERR_BLOCK_RANGE: return "block id out of range";
    case RF_ERR_BLOCK_NOT_IN_USE: return "block is not in use (double free, or never allocated)";
    case RF_ERR_BLOCK_FREE: return "block is free";
    case RF_ERR_BLOCK_REPEATED: return "block released twice in one call";
    default: return "unknown status";
    }
}
