/* A stand-in for AMD's libamdhip64.so over the CUDA driver, so that the path from Python to the
 * kernels runs on an NVIDIA GPU: each HIP call that ROCmForge makes becomes the driver's own. A
 * test instrument only; the kernels are the generic ones, compiled by nvcc (CMakeLists.txt).
 *
 * A device is called sm_90 or so, which is what its "code objects" are named for. Errors are passed
 * on as they are: HIP numbers those that we know by value as CUDA does. The driver is looked for
 * when it is first needed; where there is none, there is no device. */
#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

/* The driver's functions, under the names that cuda.h gives them: cuMemAlloc is cuMemAlloc_v2. */
#define RF_TEXT(name)   #name
#define RF_SYMBOL(name) RF_TEXT(name)
#define RF_DRIVER_CALLS(CALL)                                                                      \
    CALL(cuInit)                                                                                   \
    CALL(cuGetErrorName)                                                                           \
    CALL(cuGetErrorString)                                                                         \
    CALL(cuDriverGetVersion)                                                                       \
    CALL(cuDeviceGet)                                                                              \
    CALL(cuDeviceGetCount)                                                                         \
    CALL(cuDeviceGetName)                                                                          \
    CALL(cuDeviceGetAttribute)                                                                     \
    CALL(cuDevicePrimaryCtxRetain)                                                                 \
    CALL(cuCtxSetCurrent)                                                                          \
    CALL(cuCtxSynchronize)                                                                         \
    CALL(cuMemAlloc)                                                                               \
    CALL(cuMemFree)                                                                                \
    CALL(cuMemHostAlloc)                                                                           \
    CALL(cuMemFreeHost)                                                                            \
    CALL(cuMemGetInfo)                                                                             \
    CALL(cuMemcpy)                                                                                 \
    CALL(cuMemcpyAsync)                                                                            \
    CALL(cuMemsetD8Async)                                                                          \
    CALL(cuMemsetD32Async)                                                                         \
    CALL(cuStreamCreate)                                                                           \
    CALL(cuStreamDestroy)                                                                          \
    CALL(cuStreamSynchronize)                                                                      \
    CALL(cuStreamWaitEvent)                                                                        \
    CALL(cuStreamIsCapturing)                                                                      \
    CALL(cuStreamBeginCapture)                                                                     \
    CALL(cuStreamEndCapture)                                                                       \
    CALL(cuGraphInstantiateWithFlags)                                                              \
    CALL(cuGraphLaunch)                                                                            \
    CALL(cuGraphDestroy)                                                                           \
    CALL(cuGraphExecDestroy)                                                                       \
    CALL(cuEventCreate)                                                                            \
    CALL(cuEventDestroy)                                                                           \
    CALL(cuEventRecord)                                                                            \
    CALL(cuEventQuery)                                                                             \
    CALL(cuEventSynchronize)                                                                       \
    CALL(cuEventElapsedTime)                                                                       \
    CALL(cuModuleLoadData)                                                                         \
    CALL(cuModuleUnload)                                                                           \
    CALL(cuModuleGetFunction)                                                                      \
    CALL(cuLaunchKernel)

struct Driver {
#define RF_MEMBER(name) decltype(&::name) name = nullptr;
    RF_DRIVER_CALLS(RF_MEMBER)
};

Driver driver;
std::vector<CUcontext> contexts; /* the primary one of each device */
thread_local int current_device = 0;

bool find_driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return false;
#define RF_FIND(name)                                                                              \
    driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(library, RF_SYMBOL(name)));        \
    if (!driver.name) return false;
    RF_DRIVER_CALLS(RF_FIND)
    return true;
}

CUresult start() {
    int count = 0;
    if (!find_driver()) return CUDA_ERROR_NO_DEVICE;
    if (CUresult error = driver.cuInit(0)) return error;
    if (CUresult error = driver.cuDeviceGetCount(&count)) return error;
    for (int i = 0; i < count; i++) {
        CUdevice device;
        CUcontext context;
        if (CUresult error = driver.cuDeviceGet(&device, i)) return error;
        if (CUresult error = driver.cuDevicePrimaryCtxRetain(&context, device)) return error;
        contexts.push_back(context);
    }
    return contexts.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

/* What every call does first: the driver is there, and the thread's device is the current one. */
CUresult begin() {
    static std::once_flag once;
    static CUresult started = CUDA_SUCCESS;
    std::call_once(once, [] { started = start(); });
    if (started) return started;
    return driver.cuCtxSetCurrent(contexts[static_cast<size_t>(current_device)]);
}
#define BEGIN()                                                                                    \
    if (CUresult error = begin()) return error

CUdeviceptr address(const void *p) { return reinterpret_cast<CUdeviceptr>(p); }
bool exists(int device) { return device >= 0 && device < static_cast<int>(contexts.size()); }

} // namespace

#define API extern "C" __attribute__((visibility("default")))

/* ---------------------------------------------------------------- devices */

API CUresult hipGetDeviceCount(int *count) {
    *count = 0;
    BEGIN();
    *count = static_cast<int>(contexts.size());
    return CUDA_SUCCESS;
}
API CUresult hipGetDevice(int *device) {
    BEGIN();
    *device = current_device;
    return CUDA_SUCCESS;
}
API CUresult hipSetDevice(int device) {
    BEGIN();
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    current_device = device;
    return begin();
}
API CUresult hipDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN();
    switch (attribute) {
    case 87: return driver.cuDeviceGetAttribute(value, CU_DEVICE_ATTRIBUTE_WARP_SIZE, device);
    case 63:
        return driver.cuDeviceGetAttribute(value, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
    }
    return CUDA_ERROR_INVALID_VALUE;
}
/* hipDeviceProp_tR0600: 1472 bytes, the name at 0, gcnArchName at 1160. */
API CUresult hipGetDevicePropertiesR0600(void *properties, int device) {
    BEGIN();
    int major = 0, minor = 0;
    char *p = static_cast<char *>(properties);
    std::memset(p, 0, 1472);
    if (CUresult error = driver.cuDeviceGetName(p, 256, device)) return error;
    if (CUresult error = driver.cuDeviceGetAttribute(
            &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        return error;
    if (CUresult error = driver.cuDeviceGetAttribute(
            &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        return error;
    std::snprintf(p + 1160, 256, "sm_%d%d", major, minor);
    return CUDA_SUCCESS;
}
API CUresult hipDeviceSynchronize() {
    BEGIN();
    return driver.cuCtxSynchronize();
}
API CUresult hipRuntimeGetVersion(int *version) {
    BEGIN();
    return driver.cuDriverGetVersion(version);
}
API const char *hipGetErrorName(CUresult error) {
    const char *text = nullptr;
    if (driver.cuGetErrorName) driver.cuGetErrorName(error, &text);
    return text ? text : error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "unknown error";
}
API const char *hipGetErrorString(CUresult error) {
    const char *text = nullptr;
    if (driver.cuGetErrorString) driver.cuGetErrorString(error, &text);
    return text ? text : error == CUDA_ERROR_NO_DEVICE ? "no CUDA device or driver" : "unknown";
}
API CUresult hipGetLastError() { return CUDA_SUCCESS; }

/* ---------------------------------------------------------------- memory */

API CUresult hipMalloc(void **out, size_t size) {
    BEGIN();
    CUdeviceptr p = 0;
    CUresult error = size ? driver.cuMemAlloc(&p, size) : CUDA_SUCCESS;
    *out = reinterpret_cast<void *>(p);
    return error;
}
API CUresult hipFree(void *p) {
    BEGIN();
    return p ? driver.cuMemFree(address(p)) : CUDA_SUCCESS;
}
API CUresult hipHostMalloc(void **out, size_t size, unsigned) {
    BEGIN();
    *out = nullptr;
    return size ? driver.cuMemHostAlloc(out, size, CU_MEMHOSTALLOC_PORTABLE) : CUDA_SUCCESS;
}
API CUresult hipHostFree(void *p) {
    BEGIN();
    return p ? driver.cuMemFreeHost(p) : CUDA_SUCCESS;
}
API CUresult hipMemGetInfo(size_t *free, size_t *total) {
    BEGIN();
    return driver.cuMemGetInfo(free, total);
}
/* Addresses are unified: the driver sees which memory they are of, as hipMemcpyDefault wants. */
API CUresult hipMemcpy(void *to, const void *from, size_t size, int) {
    BEGIN();
    return driver.cuMemcpy(address(to), address(from), size);
}
API CUresult hipMemcpyAsync(void *to, const void *from, size_t size, int, CUstream stream) {
    BEGIN();
    return driver.cuMemcpyAsync(address(to), address(from), size, stream);
}
API CUresult hipMemsetAsync(void *to, int value, size_t size, CUstream stream) {
    BEGIN();
    return driver.cuMemsetD8Async(address(to), static_cast<unsigned char>(value), size, stream);
}
API CUresult hipMemsetD32Async(void *to, int value, size_t count, CUstream stream) {
    BEGIN();
    return driver.cuMemsetD32Async(address(to), static_cast<unsigned>(value), count, stream);
}

/* ---------------------------------------------------------------- streams and events */

static_assert(CU_STREAM_NON_BLOCKING == 1 && CU_EVENT_DISABLE_TIMING == 2, "as HIP's flags");

API CUresult hipStreamCreateWithFlags(CUstream *out, unsigned flags) {
    BEGIN();
    return driver.cuStreamCreate(out, flags);
}
API CUresult hipStreamDestroy(CUstream stream) {
    BEGIN();
    return driver.cuStreamDestroy(stream);
}
API CUresult hipStreamSynchronize(CUstream stream) {
    BEGIN();
    return driver.cuStreamSynchronize(stream);
}
API CUresult hipStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    BEGIN();
    return driver.cuStreamWaitEvent(stream, event, CU_EVENT_WAIT_DEFAULT);
}
API CUresult hipEventCreateWithFlags(CUevent *out, unsigned flags) {
    BEGIN();
    return driver.cuEventCreate(out, flags);
}
API CUresult hipEventDestroy(CUevent event) {
    BEGIN();
    return driver.cuEventDestroy(event);
}
API CUresult hipEventRecord(CUevent event, CUstream stream) {
    BEGIN();
    return driver.cuEventRecord(event, stream);
}
API CUresult hipEventQuery(CUevent event) {
    BEGIN();
    return driver.cuEventQuery(event);
}
API CUresult hipEventSynchronize(CUevent event) {
    BEGIN();
    return driver.cuEventSynchronize(event);
}
API CUresult hipEventElapsedTime(float *ms, CUevent from, CUevent to) {
    BEGIN();
    return driver.cuEventElapsedTime(ms, from, to);
}

/* ---------------------------------------------------------------- graphs */

API CUresult hipStreamBeginCapture(CUstream stream, int mode) {
    BEGIN();
    return driver.cuStreamBeginCapture(stream, static_cast<CUstreamCaptureMode>(mode));
}
API CUresult hipStreamEndCapture(CUstream stream, CUgraph *out) {
    BEGIN();
    return driver.cuStreamEndCapture(stream, out);
}
API CUresult hipStreamIsCapturing(CUstream stream, int *status) {
    BEGIN();
    CUstreamCaptureStatus now = CU_STREAM_CAPTURE_STATUS_NONE;
    CUresult error = driver.cuStreamIsCapturing(stream, &now);
    *status = static_cast<int>(now);
    return error;
}
API CUresult hipGraphInstantiate(CUgraphExec *out, CUgraph graph, void **, char *, size_t) {
    BEGIN();
    return driver.cuGraphInstantiateWithFlags(out, graph, 0);
}
API CUresult hipGraphLaunch(CUgraphExec graph, CUstream stream) {
    BEGIN();
    return driver.cuGraphLaunch(graph, stream);
}
API CUresult hipGraphDestroy(CUgraph graph) {
    BEGIN();
    return driver.cuGraphDestroy(graph);
}
API CUresult hipGraphExecDestroy(CUgraphExec graph) {
    BEGIN();
    return driver.cuGraphExecDestroy(graph);
}

/* ---------------------------------------------------------------- kernels */

API CUresult hipModuleLoadData(CUmodule *out, const void *image) {
    BEGIN();
    return driver.cuModuleLoadData(out, image);
}
API CUresult hipModuleUnload(CUmodule module) {
    BEGIN();
    return driver.cuModuleUnload(module);
}
API CUresult hipModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    BEGIN();
    return driver.cuModuleGetFunction(out, module, name);
}
API CUresult hipModuleLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz,
                                   unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                   CUstream stream, void **parameters, void **extra) {
    BEGIN();
    std::vector<void *> options; /* the same as HIP's but for the end, which is 3 there */
    for (int i = 0; extra && extra[i] != reinterpret_cast<void *>(3); i++)
        options.push_back(extra[i]);
    options.push_back(CU_LAUNCH_PARAM_END);
    return driver.cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters,
                                 extra ? options.data() : nullptr);
}
