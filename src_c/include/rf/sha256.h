/* SHA-256 (FIPS 180-4), for the names that blocks have outside of this process. */
#ifndef RF_SHA256_H
#define RF_SHA256_H

#include <stddef.h>
#include <stdint.h>

#include "rf/status.h"

typedef struct rf_sha256 {
    uint32_t state[8];
    uint64_t length;   /* bytes so far */
    uint8_t block[64]; /* those of them that fill no block yet */
} rf_sha256;

RF_API void rf_sha256_init(rf_sha256 *hash);
RF_API void rf_sha256_update(rf_sha256 *hash, const void *data, size_t size);
RF_API void rf_sha256_finish(rf_sha256 *hash, uint8_t digest[32]);

#endif
