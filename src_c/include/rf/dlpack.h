/* The in-memory structures of DLPack, by its specification (versions 0.x and 1.x): how arrays of
 * other libraries arrive and how results go back.
 * https://dmlc.github.io/dlpack/latest/c_api.html */
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

/* Table of functions that a type of arrays offers as the capsule __dlpack_c_exchange_api__ (DLPack
 * 1.2; PyTorch has it). They return 0, or -1 with a Python exception set, and know nothing
 * of streams. An object is a PyObject *. */
typedef struct rf_dl_exchange {
    uint32_t major, minor;
    struct rf_dl_exchange *previous; /* a table of an older major version, or NULL */
    int (*allocate)(rf_dl_tensor *like, rf_dl_versioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    int (*export_object)(void *object, rf_dl_versioned **out);
    int (*import_object)(rf_dl_versioned *tensor, void **out); /* takes the tensor over */
    int (*describe)(void *object, rf_dl_tensor *out); /* valid as long as the object; may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} rf_dl_exchange;

#endif
