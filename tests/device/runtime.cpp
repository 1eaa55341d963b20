/* A stand-in for AMD's libamdhip64.so: the calls that ROCmForge makes, over simulated devices.
 *
 * Device memory is the host's, but can be touched only while a kernel or a copy of its device runs;
 * past its end lies a page that nobody can touch (with the address sanitizer: exact bounds
 * instead). What a stream is given runs when somebody waits for it, so that a missing wait reads
 * old data. A capture records launches and copies, and refuses what real captures refuse.
 *
 * RF_SIM_DEVICES   their architectures, "gfx1100,gfx942:sramecc+:xnack-" (default the first)
 * RF_SIM_MEMORY    bytes of each, 1 GiB by default
 * RF_SIM_SEED      not 0: lanes and workgroups run in a random order
 *
 * rf_sim_* at the end is for tests: make the n-th call fail, count what is alive. */
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

namespace {

enum Error { /* HIP's numbers */
             ok = 0,
             invalid_value = 1,
             out_of_memory = 2,
             no_device = 100,
             invalid_device = 101,
             invalid_image = 200,
             no_binary = 209,
             invalid_handle = 400,
             not_found = 500,
             not_ready = 600,
             launch_failure = 719,
             capture_unsupported = 900,
             capture_invalidated = 901,
};
const std::map<int, std::pair<const char *, const char *>> errors = {
    {ok, {"hipSuccess", "no error"}},
    {invalid_value, {"hipErrorInvalidValue", "invalid argument"}},
    {out_of_memory, {"hipErrorOutOfMemory", "out of memory"}},
    {no_device, {"hipErrorNoDevice", "no ROCm-capable device is detected"}},
    {invalid_device, {"hipErrorInvalidDevice", "invalid device ordinal"}},
    {invalid_image, {"hipErrorInvalidImage", "device kernel image is invalid"}},
    {no_binary,
     {"hipErrorNoBinaryForGpu", "no kernel image is available for execution on the device"}},
    {invalid_handle, {"hipErrorInvalidHandle", "invalid resource handle"}},
    {not_found, {"hipErrorNotFound", "named symbol not found"}},
    {not_ready, {"hipErrorNotReady", "device not ready"}},
    {launch_failure, {"hipErrorLaunchFailure", "unspecified launch failure"}},
    {capture_unsupported,
     {"hipErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"}},
    {capture_invalidated,
     {"hipErrorStreamCaptureInvalidated",
      "operation failed due to a previous error during capture"}},
};

struct Device {
    std::string arch;
    size_t total = 0, used = 0;
    unsigned wave_size() const { return arch.compare(0, 4, "gfx9") == 0 ? 64 : 32; }
};

struct Memory {
    char *base = nullptr; /* of what is mapped */
    size_t mapped = 0, size = 0;
    int device = 0;
    bool pinned = false;
};

typedef std::function<Error()> Work;
struct Graph {
    std::vector<Work> nodes;
};
struct Stream {
    int device = 0;
    bool blocking = true; /* waits for the null stream, and it for this */
    std::deque<Work> work;
    uint64_t given = 0, done = 0;
    std::unique_ptr<Graph> capture;
    bool invalidated = false;
};
struct Event {
    int device = 0;
    Stream *stream = nullptr;
    uint64_t at = 0;
};
struct Module {
    void *library = nullptr;
    int file = -1, device = 0;
};
struct Function {
    Module *module = nullptr;
    const rf_sim_kernel *kernel = nullptr;
};

std::recursive_mutex lock;
std::vector<Device> devices;
thread_local int current_device = 0;
std::map<char *, Memory> memories; /* by the address that the caller has */
std::set<Stream *> streams;
std::set<Event *> events;
std::set<Module *> modules;
std::set<Graph *> graphs;
std::map<std::pair<Module *, std::string>, Function> functions;
std::map<int, Stream> null_streams;
Error sticky = ok; /* a kernel that failed takes its context with it */
int64_t calls = 0, fail_at = -1, launches = 0;
int fail_with = launch_failure;
uint64_t seed = 0;
std::string last_message;

void start() {
    static bool started = false;
    if (started) return;
    started = true;
    const char *list = std::getenv("RF_SIM_DEVICES"), *bytes = std::getenv("RF_SIM_MEMORY");
    const char *random = std::getenv("RF_SIM_SEED");
    std::string names = list ? list : "gfx1100";
    seed = random ? std::strtoull(random, nullptr, 10) : 0;
    for (size_t at = 0; at < names.size();) {
        size_t end = names.find(',', at);
        if (end == std::string::npos) end = names.size();
        Device d;
        d.arch = names.substr(at, end - at);
        d.total = bytes ? std::strtoull(bytes, nullptr, 10) : size_t{1} << 30;
        devices.push_back(d);
        at = end + 1;
    }
}

/* What every call does first. */
Error begin() {
    start();
    if (calls++ == fail_at) return static_cast<Error>(fail_with);
    return sticky;
}
#define CALL()                                                                                     \
    std::lock_guard<std::recursive_mutex> guard(lock);                                             \
    if (Error error = begin()) return error

bool capturing() {
    for (Stream *s : streams)
        if (s->capture) return true;
    return false;
}
/* A call that no capture permits: the capture is lost. */
Error refuse() {
    for (Stream *s : streams)
        if (s->capture) s->invalidated = true;
    return capture_unsupported;
}

/* ---------------------------------------------------------------- memory */

#if defined(__SANITIZE_ADDRESS__)
char *map_memory(Memory &m) {
    m.base = static_cast<char *>(std::malloc(m.size ? m.size : 1));
    return m.base;
}
void unmap_memory(Memory &m) { std::free(m.base); }
void open_memory(int, bool) {}
#else
char *map_memory(Memory &m) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t rounded = (m.size + 255) / 256 * 256;
    m.mapped = (rounded + page - 1) / page * page + page;
    void *base =
        mmap(nullptr, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    m.base = static_cast<char *>(base);
    mprotect(m.base + m.mapped - page, page, PROT_NONE);
    return m.base + m.mapped - page - rounded;
}
void unmap_memory(Memory &m) { munmap(m.base, m.mapped); }
/* Lets a device's memory be touched, or nobody. */
void open_memory(int device, bool open) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (auto &entry : memories) {
        Memory &m = entry.second;
        if (m.pinned || m.device != device) continue;
        mprotect(m.base, m.mapped - page, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
}
#endif

struct Opened {
    int device;
    explicit Opened(int d) : device(d) { open_memory(d, true); }
    ~Opened() { open_memory(device, false); }
};

Memory *memory_of(const void *p) {
    auto *address = static_cast<char *>(const_cast<void *>(p));
    auto it = memories.upper_bound(address);
    if (it == memories.begin()) return nullptr;
    --it;
    return address < it->first + it->second.size ? &it->second : nullptr;
}

Error allocate(void **out, size_t size, bool pinned) {
    if (!out) return invalid_value;
    if (capturing()) return refuse();
    Memory m;
    m.size = size;
    m.device = current_device;
    m.pinned = pinned;
    Device &d = devices[static_cast<size_t>(current_device)];
    if (size == 0) {
        *out = nullptr;
        return ok;
    }
    if (!pinned && d.used + size > d.total) return out_of_memory;
    char *p = map_memory(m);
    if (!p) return out_of_memory;
    std::memset(p, 0xa5, size); /* not zero: nobody may rely on it */
#if !defined(__SANITIZE_ADDRESS__)
    if (!pinned) mprotect(m.base, m.mapped - static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
#endif
    if (!pinned) d.used += size;
    memories[p] = m;
    *out = p;
    return ok;
}

/* ---------------------------------------------------------------- streams */

Stream *stream_of(void *handle) {
    if (!handle) {
        Stream &s = null_streams[current_device];
        s.device = current_device;
        return &s;
    }
    auto *s = static_cast<Stream *>(handle);
    return streams.count(s) ? s : nullptr;
}

Error drain(Stream *s, uint64_t upto) {
    while (s->done < upto && !s->work.empty()) {
        Work w = std::move(s->work.front());
        s->work.pop_front();
        s->done++;
        if (Error error = w()) {
            sticky = error;
            return error;
        }
    }
    return ok;
}
Error drain_all(int device) {
    for (auto &entry : null_streams)
        if (entry.first == device)
            if (Error error = drain(&entry.second, UINT64_MAX)) return error;
    for (Stream *s : streams)
        if (s->device == device)
            if (Error error = drain(s, UINT64_MAX)) return error;
    return ok;
}
Error drain_blocking(int device) {
    for (Stream *s : streams)
        if (s->device == device && s->blocking)
            if (Error error = drain(s, UINT64_MAX)) return error;
    return ok;
}

Error give(void *handle, Work work) {
    Stream *s = stream_of(handle);
    if (!s) return invalid_handle;
    if (s->capture) {
        if (s->invalidated) return capture_invalidated;
        s->capture->nodes.push_back(std::move(work));
        return ok;
    }
    if (!handle) { /* legacy: after all blocking streams' work, before what they get later */
        if (capturing()) return refuse();
        if (Error error = drain_blocking(s->device)) return error;
    } else if (s->blocking) {
        Stream &null = null_streams[s->device];
        if (Error error = drain(&null, UINT64_MAX)) return error;
    }
    s->work.push_back(std::move(work));
    s->given++;
    return ok;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

/* ---------------------------------------------------------------- devices */

API Error hipGetDeviceCount(int *count) {
    CALL();
    *count = static_cast<int>(devices.size());
    return devices.empty() ? no_device : ok;
}
API Error hipGetDevice(int *device) {
    CALL();
    *device = current_device;
    return ok;
}
API Error hipSetDevice(int device) {
    CALL();
    if (device < 0 || device >= static_cast<int>(devices.size())) return invalid_device;
    current_device = device;
    return ok;
}
API Error hipDeviceGetAttribute(int *value, int attribute, int device) {
    CALL();
    if (device < 0 || device >= static_cast<int>(devices.size())) return invalid_device;
    if (attribute == 87)
        *value = static_cast<int>(devices[static_cast<size_t>(device)].wave_size());
    else if (attribute == 63) *value = 60; /* compute units */
    else return invalid_value;
    return ok;
}
/* hipDeviceProp_tR0600: 1472 bytes, the name at 0, gcnArchName at 1160. */
API Error hipGetDevicePropertiesR0600(void *properties, int device) {
    CALL();
    if (device < 0 || device >= static_cast<int>(devices.size())) return invalid_device;
    char *p = static_cast<char *>(properties);
    std::memset(p, 0, 1472);
    std::snprintf(p, 256, "Simulated device %d", device);
    std::snprintf(p + 1160, 256, "%s", devices[static_cast<size_t>(device)].arch.c_str());
    return ok;
}
API Error hipDeviceSynchronize() {
    CALL();
    if (capturing()) return refuse();
    return drain_all(current_device);
}
API Error hipRuntimeGetVersion(int *version) {
    CALL();
    *version = 70000000;
    return ok;
}
API const char *hipGetErrorName(Error error) {
    auto it = errors.find(error);
    return it == errors.end() ? "hipErrorUnknown" : it->second.first;
}
API const char *hipGetErrorString(Error error) {
    auto it = errors.find(error);
    return it == errors.end() ? "unknown error" : it->second.second;
}
API Error hipGetLastError() { return ok; }

/* ---------------------------------------------------------------- memory */

API Error hipMalloc(void **out, size_t size) {
    CALL();
    return allocate(out, size, false);
}
API Error hipHostMalloc(void **out, size_t size, unsigned) {
    CALL();
    return allocate(out, size, true);
}
static Error release(void *p, bool pinned) {
    if (!p) return ok;
    if (capturing()) return refuse();
    auto it = memories.find(static_cast<char *>(p));
    if (it == memories.end() || it->second.pinned != pinned) return invalid_value;
    if (Error error = drain_all(it->second.device)) return error; /* as hipFree waits */
    if (!pinned) devices[static_cast<size_t>(it->second.device)].used -= it->second.size;
    unmap_memory(it->second);
    memories.erase(it);
    return ok;
}
API Error hipFree(void *p) {
    std::lock_guard<std::recursive_mutex> guard(lock); /* never made to fail, nor counted: */
    start();                                           /* nobody could do anything about it */
    return release(p, false);
}
API Error hipHostFree(void *p) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    start();
    return release(p, true);
}
API Error hipMemGetInfo(size_t *free, size_t *total) {
    CALL();
    const Device &d = devices[static_cast<size_t>(current_device)];
    *free = d.total - d.used;
    *total = d.total;
    return ok;
}

static Error move(void *to, const void *from, size_t size) {
    const Memory *a = memory_of(to), *b = memory_of(from);
    if (a && !a->pinned && static_cast<char *>(to) + size > a->base + a->mapped && a->mapped)
        return invalid_value;
    if (a) open_memory(a->device, true);
    if (b) open_memory(b->device, true);
    std::memcpy(to, from, size);
    if (a) open_memory(a->device, false);
    if (b) open_memory(b->device, false);
    return ok;
}
API Error hipMemcpy(void *to, const void *from, size_t size, int) {
    CALL();
    if (capturing()) return refuse();
    if (Error error = drain_blocking(current_device)) return error;
    if (Error error = drain(stream_of(nullptr), UINT64_MAX)) return error;
    return move(to, from, size);
}
API Error hipMemcpyAsync(void *to, const void *from, size_t size, int, void *stream) {
    CALL();
    Stream *s = stream_of(stream);
    if (!s) return invalid_handle;
    bool pageable = !memory_of(to) || !memory_of(from);
    if (pageable && s->capture) return refuse();
    if (pageable) { /* waits for what is before it, and is done when it returns */
        if (Error error = drain(s, UINT64_MAX)) return error;
        return move(to, from, size);
    }
    return give(stream, [=] { return move(to, from, size); });
}
API Error hipMemsetAsync(void *to, int value, size_t size, void *stream) {
    CALL();
    const Memory *m = memory_of(to);
    if (!m) return invalid_value;
    int device = m->device;
    return give(stream, [=] {
        Opened opened(device);
        std::memset(to, value, size);
        return ok;
    });
}

API Error hipMemsetD32Async(void *to, int value, size_t count, void *stream) {
    CALL();
    const Memory *m = memory_of(to);
    if (!m) return invalid_value;
    int device = m->device;
    return give(stream, [=] {
        Opened opened(device);
        for (size_t i = 0; i < count; i++) static_cast<int *>(to)[i] = value;
        return ok;
    });
}

/* ---------------------------------------------------------------- streams and events */

API Error hipStreamCreateWithFlags(void **out, unsigned flags) {
    CALL();
    auto *s = new Stream;
    s->device = current_device;
    s->blocking = flags == 0;
    streams.insert(s);
    *out = s;
    return ok;
}
API Error hipStreamDestroy(void *stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto *s = static_cast<Stream *>(stream);
    if (!streams.count(s)) return invalid_handle;
    drain(s, UINT64_MAX);
    for (Event *e : events)
        if (e->stream == s) e->stream = nullptr;
    streams.erase(s);
    delete s;
    return ok;
}
API Error hipStreamSynchronize(void *stream) {
    CALL();
    Stream *s = stream_of(stream);
    if (!s) return invalid_handle;
    if (capturing()) return refuse();
    if (!stream)
        if (Error error = drain_blocking(s->device)) return error;
    return drain(s, UINT64_MAX);
}
API Error hipStreamWaitEvent(void *stream, void *event, unsigned) {
    CALL();
    auto *e = static_cast<Event *>(event);
    if (!events.count(e)) return invalid_handle;
    Stream *other = e->stream;
    uint64_t at = e->at;
    if (!other || (stream_of(stream) && stream_of(stream)->capture)) return ok;
    return give(stream, [=] { return streams.count(other) ? drain(other, at) : ok; });
}
API Error hipEventCreateWithFlags(void **out, unsigned) {
    CALL();
    auto *e = new Event;
    e->device = current_device;
    events.insert(e);
    *out = e;
    return ok;
}
API Error hipEventDestroy(void *event) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto *e = static_cast<Event *>(event);
    if (!events.erase(e)) return invalid_handle;
    delete e;
    return ok;
}
API Error hipEventRecord(void *event, void *stream) {
    CALL();
    auto *e = static_cast<Event *>(event);
    Stream *s = stream_of(stream);
    if (!events.count(e) || !s || s->device != e->device) return invalid_handle;
    if (s->capture) return ok;
    e->stream = s;
    e->at = s->given;
    return ok;
}
API Error hipEventQuery(void *event) {
    CALL();
    auto *e = static_cast<Event *>(event);
    if (!events.count(e)) return invalid_handle;
    if (capturing()) return refuse();
    if (!e->stream || e->stream->done >= e->at) return ok;
    if (Error error = drain(e->stream, e->stream->done + 1)) return error; /* time goes by */
    return e->stream->done >= e->at ? ok : not_ready;
}
API Error hipEventSynchronize(void *event) {
    CALL();
    auto *e = static_cast<Event *>(event);
    if (!events.count(e)) return invalid_handle;
    if (capturing()) return refuse();
    return e->stream ? drain(e->stream, e->at) : ok;
}
API Error hipEventElapsedTime(float *ms, void *, void *) {
    CALL();
    *ms = 0.001f;
    return ok;
}

/* ---------------------------------------------------------------- graphs */

API Error hipStreamBeginCapture(void *stream, int) {
    CALL();
    Stream *s = stream ? stream_of(stream) : nullptr;
    if (!s || s->capture) return invalid_value;
    s->capture = std::make_unique<Graph>();
    s->invalidated = false;
    return ok;
}
API Error hipStreamEndCapture(void *stream, void **out) {
    CALL();
    Stream *s = stream ? stream_of(stream) : nullptr;
    if (!s || !s->capture) return invalid_value;
    std::unique_ptr<Graph> graph = std::move(s->capture);
    *out = nullptr;
    if (s->invalidated) return capture_invalidated;
    *out = graph.release();
    graphs.insert(static_cast<Graph *>(*out));
    return ok;
}
API Error hipStreamIsCapturing(void *stream, int *status) {
    CALL();
    Stream *s = stream_of(stream);
    if (!s) return invalid_handle;
    *status = s->capture ? (s->invalidated ? 2 : 1) : 0;
    return ok;
}
API Error hipGraphInstantiate(void **out, void *graph, void **, char *, size_t) {
    CALL();
    auto *g = static_cast<Graph *>(graph);
    if (!graphs.count(g)) return invalid_value;
    auto *copy = new Graph(*g);
    graphs.insert(copy);
    *out = copy;
    return ok;
}
API Error hipGraphLaunch(void *graph, void *stream) {
    CALL();
    auto *g = static_cast<Graph *>(graph);
    if (!graphs.count(g)) return invalid_value;
    for (const Work &node : g->nodes)
        if (Error error = give(stream, node)) return error;
    return ok;
}
static Error drop_graph(void *graph) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto *g = static_cast<Graph *>(graph);
    if (!graphs.erase(g)) return invalid_value;
    delete g;
    return ok;
}
API Error hipGraphDestroy(void *graph) { return drop_graph(graph); }
API Error hipGraphExecDestroy(void *graph) { return drop_graph(graph); }

/* ---------------------------------------------------------------- code objects and launches */

API Error hipModuleLoadData(void **out, const void *image) {
    CALL();
    if (capturing()) return refuse();
    auto *header = static_cast<const Elf64_Ehdr *>(image);
    if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return invalid_image;
    if (header->e_machine != EM_X86_64) return no_binary; /* a real GPU's code */
    size_t size = header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
    int file = memfd_create("code object", MFD_CLOEXEC);
    if (file < 0 || write(file, image, size) != static_cast<ssize_t>(size)) return out_of_memory;
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::fprintf(stderr, "simulated device: %s\n", dlerror());
        close(file);
        return invalid_image;
    }
    auto *wave = static_cast<const int *>(dlsym(library, "rf_sim_wave"));
    if (!wave ||
        *wave != static_cast<int>(devices[static_cast<size_t>(current_device)].wave_size())) {
        dlclose(library);
        close(file);
        return no_binary;
    }
    auto *m = new Module;
    m->library = library;
    m->file = file;
    m->device = current_device;
    modules.insert(m);
    *out = m;
    return ok;
}
API Error hipModuleUnload(void *module) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto *m = static_cast<Module *>(module);
    if (!modules.erase(m)) return invalid_handle;
    drain_all(m->device);
    for (auto it = functions.begin(); it != functions.end();)
        it = it->first.first == m ? functions.erase(it) : std::next(it);
    dlclose(m->library);
    close(m->file);
    delete m;
    return ok;
}
API Error hipModuleGetFunction(void **out, void *module, const char *name) {
    CALL();
    auto *m = static_cast<Module *>(module);
    if (!modules.count(m)) return invalid_handle;
    auto *kernel = static_cast<const rf_sim_kernel *>(dlsym(m->library, name));
    if (!kernel) return not_found;
    Function &f = functions[{m, name}];
    f.module = m;
    f.kernel = kernel;
    *out = &f;
    return ok;
}
API Error hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                unsigned by, unsigned bz, unsigned shared, void *stream,
                                void **parameters, void **extra) {
    CALL();
    auto *f = static_cast<Function *>(function);
    Stream *s = stream_of(stream);
    if (!s || !f) return invalid_handle;
    if (f->module->device != s->device) return invalid_handle;
    if (!gx || !gy || !gz || !bx || by != 1 || bz != 1 || shared || gy > 65535 || gz > 65535 ||
        uint64_t{gx} * bx > UINT32_MAX)
        return invalid_value;
    const void *arguments = nullptr;
    size_t size = 0;
    for (int i = 0; extra && extra[i] != reinterpret_cast<void *>(3); i += 2) {
        if (extra[i] == reinterpret_cast<void *>(1)) arguments = extra[i + 1];
        else if (extra[i] == reinterpret_cast<void *>(2))
            size = *static_cast<size_t *>(extra[i + 1]);
        else return invalid_value;
    }
    if (parameters || !arguments || size != f->kernel->size) return invalid_value;
    auto copy = std::make_shared<std::vector<char>>(size);
    std::memcpy(copy->data(), arguments, size);
    launches++;
    int device = s->device;
    unsigned wave = devices[static_cast<size_t>(device)].wave_size();
    auto **lane = static_cast<rf_sim_lane **>(dlsym(f->module->library, "rf_sim"));
    const rf_sim_kernel *kernel = f->kernel;
    return give(stream, [=] {
        Opened opened(device);
        unsigned grid[3] = {gx, gy, gz};
        last_message = rf_sim_run(*kernel, lane, grid, bx, wave, copy->data(), seed);
        if (last_message.empty()) return ok;
        std::fprintf(stderr, "simulated device: %s\n", last_message.c_str());
        return launch_failure;
    });
}

/* ---------------------------------------------------------------- for tests */

API int64_t rf_sim_calls() { return calls; }
API int64_t rf_sim_launches() { return launches; }
/* The call that many calls from now fails once with that HIP error; negative: none. */
API void rf_sim_fail(int64_t from_now, int error) {
    start();
    fail_at = from_now < 0 ? -1 : calls + from_now;
    fail_with = error;
}
API void rf_sim_set_seed(uint64_t value) {
    start();
    seed = value;
}
API void rf_sim_set_memory(size_t bytes) {
    start();
    for (Device &d : devices) d.total = bytes;
}
/* Allocations of device memory, pinned ones, streams, events, modules, graphs that are alive. */
API void rf_sim_live(int64_t *out) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    out[0] = out[1] = 0;
    for (const auto &entry : memories) out[entry.second.pinned ? 1 : 0]++;
    out[2] = static_cast<int64_t>(streams.size());
    out[3] = static_cast<int64_t>(events.size());
    out[4] = static_cast<int64_t>(modules.size());
    out[5] = static_cast<int64_t>(graphs.size());
}
API void rf_sim_reset_error() { sticky = ok; }
