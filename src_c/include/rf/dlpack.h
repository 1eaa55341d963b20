/* The in-memory structures of DLPack, by its specification (versions 0.x and 1.x): how arrays of
 * other libraries arrive. https://dmlc.github.io/dlpack/latest/c_api.html */
#ifndef RF_DLPACK_H
#define RF_DLPACK_H

#include <stdint.h>

enum { RF_DL_CPU = 1, RF_DL_CUDA_HOST = 3, RF_DL_ROCM = 10, RF_DL_ROCM_HOST = 11 };
enum {
    RF_DL_INT = 0,
    RF_DL_UINT = 1,
    RF_DL_FLOAT = 2,
    RF_DL_BFLOAT = 4,
    RF_DL_BOOL = 6,
    RF_DL_E4M3FN = 10,
    RF_DL_E4M3FNUZ = 11,
};
#define RF_DL_READ_ONLY ((uint64_t)1)

typedef struct rf_dl_tensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides; /* elements; NULL is C order */
    uint64_t byte_offset;
} rf_dl_tensor;

typedef struct rf_dl_managed { /* capsule "dltensor" */
    rf_dl_tensor tensor;
    void *context;
    void (*deleter)(struct rf_dl_managed *);
} rf_dl_managed;

typedef struct rf_dl_versioned { /* capsule "dltensor_versioned" */
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct rf_dl_versioned *);
    uint64_t flags;
    rf_dl_tensor tensor;
} rf_dl_versioned;

#endif
