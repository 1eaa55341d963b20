#include "rf/status.h"

#include "check.h"

int main(void) {
    const int known[] = {
        RF_OK,
        RF_ERR_NO_MEMORY,
        RF_ERR_OUT_OF_BLOCKS,
        RF_ERR_BAD_ARGUMENT,
        RF_ERR_BLOCK_RANGE,
        RF_ERR_BLOCK_NOT_IN_USE,
        RF_ERR_BLOCK_FREE,
        RF_ERR_BLOCK_REPEATED,
    };
    const char *unknown = rf_strerror(-12345);
    CHECK(unknown && *unknown);
    CHECK(strcmp(rf_strerror(12345), unknown) == 0);
    for (size_t i = 0; i < COUNT(known); i++) {
        CHECK(i == 0 ? known[i] == 0 : known[i] < 0);
        CHECK(strcmp(rf_strerror(known[i]), unknown) != 0);
        for (size_t j = 0; j < i; j++) {
            CHECK(strcmp(rf_strerror(known[i]), rf_strerror(known[j])) != 0);
        }
    }
    return 0;
}
