# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""HIP through hip-python's C functions: devices, memory, streams, events, code objects, launches.

Nothing here needs a HIP header. hip-python (7.2 and 10) gives each HIP function as a capsule whose
name is its C signature; that is compared before the pointer is used. Where there is no such capsule
the pointer comes from the library that hip-python loaded, and launches go through its Python call.
"""

from cpython.pycapsule cimport PyCapsule_GetName, PyCapsule_GetPointer
from libc.stdint cimport uintptr_t

cimport numpy as cnp

from rocmforge.hip._launch cimport RF_ARRIVALS
from rocmforge.ops._arrays cimport array_at

import ctypes
import os
import threading
from importlib.resources import files
from pathlib import Path

import numpy as np

from rocmforge.errors import DeviceError

cnp.import_array()

cdef cnp.dtype _U8 = np.dtype(np.uint8)

# hip-python's functions return 3 with a Python exception set when the HIP library does not load.
ctypedef int (*_count_t)(int *) except? 3 nogil
ctypedef int (*_set_device_t)(int) except? 3 nogil
ctypedef int (*_attribute_t)(int *, int, int) except? 3 nogil
ctypedef int (*_properties_t)(void *, int) except? 3 nogil
ctypedef int (*_malloc_t)(void **, size_t) except? 3 nogil
ctypedef int (*_host_malloc_t)(void **, size_t, unsigned) except? 3 nogil
ctypedef int (*_handle_t)(void *) except? 3 nogil
ctypedef int (*_create_t)(void **, unsigned) except? 3 nogil
ctypedef int (*_pair_t)(void *, void *) except? 3 nogil
ctypedef int (*_wait_t)(void *, void *, unsigned) except? 3 nogil
ctypedef int (*_memory_info_t)(size_t *, size_t *) except? 3 nogil
ctypedef int (*_copy_t)(void *, const void *, size_t, int, void *) except? 3 nogil
ctypedef int (*_set_t)(void *, int, size_t, void *) except? 3 nogil
ctypedef int (*_set_words_t)(void *, int, size_t, void *) except? 3 nogil
ctypedef int (*_load_t)(void **, const void *) except? 3 nogil
ctypedef int (*_function_t)(void **, void *, const char *) except? 3 nogil
ctypedef int (*_status_t)(void *, int *) except? 3 nogil
ctypedef int (*_begin_t)(void *, int) except? 3 nogil
ctypedef int (*_end_t)(void *, void **) except? 3 nogil
ctypedef int (*_instantiate_t)(void **, void *, void **, char *, size_t) except? 3 nogil
ctypedef int (*_void_t)() except? 3 nogil
ctypedef const char *(*_text_t)(int) nogil
ctypedef int (*_launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                          unsigned, void *, void **, void **) except? 3 nogil

cdef struct _Hip:
    _count_t get_device_count
    _count_t get_device
    _set_device_t set_device
    _attribute_t attribute
    _properties_t properties
    _malloc_t malloc
    _handle_t free
    _host_malloc_t host_malloc
    _handle_t host_free
    _memory_info_t memory_info
    _copy_t copy
    _set_t memset
    _set_words_t memset_words
    _create_t stream_create
    _handle_t stream_destroy
    _handle_t stream_synchronize
    _wait_t stream_wait
    _status_t is_capturing
    _begin_t begin_capture
    _end_t end_capture
    _instantiate_t instantiate
    _pair_t graph_launch
    _handle_t graph_destroy
    _handle_t graph_exec_destroy
    _create_t event_create
    _handle_t event_destroy
    _pair_t event_record
    _handle_t event_query
    _handle_t event_synchronize
    _void_t device_synchronize
    _load_t module_load
    _handle_t module_unload
    _function_t module_function
    _launch_t launch
    _text_t error_name
    _text_t error_string

cdef _Hip _hip
cdef bint _loaded = False
cdef object _python_launch = None  # hip-python's own, where its C function is missing
cdef object _properties_type = None
cdef list _devices = []
cdef str _source = ""

# hipError_t and other numbers of the HIP runtime's interface that we need by value.
cdef int _NOT_READY = 600, _NO_BINARY = 209, _OUT_OF_MEMORY = 2
cdef int _WARP_SIZE = 87, _COMPUTE_UNITS = 63  # hipDeviceAttribute_t of hip-python 7 and 10
cdef int _COPY_DEFAULT = 4
cdef int _NON_BLOCKING = 1, _NO_TIMING = 2
cdef void *_PARAM_POINTER = <void *>1
cdef void *_PARAM_SIZE = <void *>2
cdef void *_PARAM_END = <void *>3

cdef dict _SIGNATURES = {
    "hipGetDeviceCount": "(int *)",
    "hipGetDevice": "(int *)",
    "hipSetDevice": "(int)",
    "hipDeviceGetAttribute": "(int *, enum hipDeviceAttribute_t, int)",
    "hipGetDeviceProperties": "(struct hipDeviceProp_tR0600 *, int)",
    "hipMalloc": "(void **, size_t)",
    "hipFree": "(void *)",
    "hipHostMalloc": "(void **, size_t, unsigned int)",
    "hipHostFree": "(void *)",
    "hipMemGetInfo": "(size_t *, size_t *)",
    "hipMemcpyAsync": "(void *, void const *, size_t, enum hipMemcpyKind, hipStream_t)",
    "hipMemsetAsync": "(void *, int, size_t, hipStream_t)",
    "hipMemsetD32Async": "(void *, int, size_t, hipStream_t)",
    "hipStreamCreateWithFlags": "(hipStream_t *, unsigned int)",
    "hipStreamDestroy": "(hipStream_t)",
    "hipStreamSynchronize": "(hipStream_t)",
    "hipStreamWaitEvent": "(hipStream_t, hipEvent_t, unsigned int)",
    "hipStreamIsCapturing": "(hipStream_t, enum hipStreamCaptureStatus *)",
    "hipStreamBeginCapture": "(hipStream_t, enum hipStreamCaptureMode)",
    "hipStreamEndCapture": "(hipStream_t, hipGraph_t *)",
    "hipGraphInstantiate": "(hipGraphExec_t *, hipGraph_t, hipGraphNode_t *, char *, size_t)",
    "hipGraphLaunch": "(hipGraphExec_t, hipStream_t)",
    "hipGraphDestroy": "(hipGraph_t)",
    "hipGraphExecDestroy": "(hipGraphExec_t)",
    "hipEventCreateWithFlags": "(hipEvent_t *, unsigned int)",
    "hipEventDestroy": "(hipEvent_t)",
    "hipEventRecord": "(hipEvent_t, hipStream_t)",
    "hipEventQuery": "(hipEvent_t)",
    "hipEventSynchronize": "(hipEvent_t)",
    "hipDeviceSynchronize": "(void)",
    "hipModuleLoadData": "(hipModule_t *, void const *)",
    "hipModuleUnload": "(hipModule_t)",
    "hipModuleGetFunction": "(hipFunction_t *, hipModule_t, char const *)",
    "hipModuleLaunchKernel": "(hipFunction_t, unsigned int, unsigned int, unsigned int, "
                             "unsigned int, unsigned int, unsigned int, unsigned int, "
                             "hipStream_t, void **, void **)",
    "hipGetErrorName": "(enum hipError_t)",
    "hipGetErrorString": "(enum hipError_t)",
}


# ---------------------------------------------------------------- loading

cdef void *_capsule_pointer(dict capsules, str name) except? NULL:
    """The C function behind hip-python's capsule; NULL where there is none of our signature."""
    capsule = capsules.get(name)
    if capsule is None:
        return NULL
    cdef const char *signature = PyCapsule_GetName(capsule)
    text = signature.decode().replace("unsigned long", "size_t")
    result = "char const *" if name.startswith("hipGetError") else "enum hipError_t "
    if text.replace(" ", "") != (result + _SIGNATURES[name]).replace(" ", ""):
        return NULL
    return PyCapsule_GetPointer(capsule, signature)


cdef void *_library_pointer(str name) except NULL:
    symbol = {"hipGetDeviceProperties": "hipGetDevicePropertiesR0600"}.get(name, name)
    try:
        function = getattr(ctypes.CDLL("libamdhip64.so"), symbol)
    except (OSError, AttributeError) as error:
        raise DeviceError(f"hip-python gives no C function {name} of the expected signature, and "
                          f"the HIP library does not either: {error}") from None
    return <void *><uintptr_t>ctypes.cast(function, ctypes.c_void_p).value


cdef void *_find(dict capsules, str name) except NULL:
    cdef void *pointer = _capsule_pointer(capsules, name)
    return pointer if pointer != NULL else _library_pointer(name)


def _modules():
    """hip-python's module of Python calls and that of C functions."""
    try:
        from hip import chip, hip  # hip-python 7
        return hip, chip
    except ImportError:
        pass
    try:
        from rocm.bindings import cyhip, hip  # 10
        return hip, cyhip
    except ImportError:
        raise DeviceError("hip-python is not installed: pip install hip-python, in the version of "
                          "your ROCm") from None


cdef int _load() except -1:
    """Find hip-python and the HIP library, once; ask for nothing before that is needed."""
    global _loaded, _python_launch, _properties_type, _source
    if _loaded:
        return 0
    hip, c_functions = _modules()
    cdef dict capsules = getattr(c_functions, "__pyx_capi__", {})
    if os.environ.get("ROCMFORGE_HIP_NO_CAPSULES"):  # for tests of what happens without them
        capsules = {}
    cdef _Hip h
    cdef int count = 0, status
    # One call through hip-python's Python face first: it loads the library and says why not.
    try:
        hip.hipGetDeviceCount()
    except RuntimeError as error:
        raise DeviceError(" ".join(str(error).split())) from None
    h.get_device_count = <_count_t>_find(capsules, "hipGetDeviceCount")
    h.get_device = <_count_t>_find(capsules, "hipGetDevice")
    h.set_device = <_set_device_t>_find(capsules, "hipSetDevice")
    h.attribute = <_attribute_t>_find(capsules, "hipDeviceGetAttribute")
    h.properties = <_properties_t>_find(capsules, "hipGetDeviceProperties")
    h.malloc = <_malloc_t>_find(capsules, "hipMalloc")
    h.free = <_handle_t>_find(capsules, "hipFree")
    h.host_malloc = <_host_malloc_t>_find(capsules, "hipHostMalloc")
    h.host_free = <_handle_t>_find(capsules, "hipHostFree")
    h.memory_info = <_memory_info_t>_find(capsules, "hipMemGetInfo")
    h.copy = <_copy_t>_find(capsules, "hipMemcpyAsync")
    h.memset = <_set_t>_find(capsules, "hipMemsetAsync")
    h.memset_words = <_set_words_t>_find(capsules, "hipMemsetD32Async")
    h.stream_create = <_create_t>_find(capsules, "hipStreamCreateWithFlags")
    h.stream_destroy = <_handle_t>_find(capsules, "hipStreamDestroy")
    h.stream_synchronize = <_handle_t>_find(capsules, "hipStreamSynchronize")
    h.stream_wait = <_wait_t>_find(capsules, "hipStreamWaitEvent")
    h.is_capturing = <_status_t>_find(capsules, "hipStreamIsCapturing")
    h.begin_capture = <_begin_t>_find(capsules, "hipStreamBeginCapture")
    h.end_capture = <_end_t>_find(capsules, "hipStreamEndCapture")
    h.instantiate = <_instantiate_t>_find(capsules, "hipGraphInstantiate")
    h.graph_launch = <_pair_t>_find(capsules, "hipGraphLaunch")
    h.graph_destroy = <_handle_t>_find(capsules, "hipGraphDestroy")
    h.graph_exec_destroy = <_handle_t>_find(capsules, "hipGraphExecDestroy")
    h.event_create = <_create_t>_find(capsules, "hipEventCreateWithFlags")
    h.event_destroy = <_handle_t>_find(capsules, "hipEventDestroy")
    h.event_record = <_pair_t>_find(capsules, "hipEventRecord")
    h.event_query = <_handle_t>_find(capsules, "hipEventQuery")
    h.event_synchronize = <_handle_t>_find(capsules, "hipEventSynchronize")
    h.device_synchronize = <_void_t>_find(capsules, "hipDeviceSynchronize")
    h.module_load = <_load_t>_find(capsules, "hipModuleLoadData")
    h.module_unload = <_handle_t>_find(capsules, "hipModuleUnload")
    h.module_function = <_function_t>_find(capsules, "hipModuleGetFunction")
    h.error_name = <_text_t>_find(capsules, "hipGetErrorName")
    h.error_string = <_text_t>_find(capsules, "hipGetErrorString")
    h.launch = <_launch_t>_capsule_pointer(capsules, "hipModuleLaunchKernel")
    _python_launch = hip.hipModuleLaunchKernel if h.launch == NULL else None
    _properties_type = hip.hipDeviceProp_t
    _source = c_functions.__name__
    global _hip
    _hip = h
    status = h.get_device_count(&count)
    if status != 0:
        count = 0
    found = [None] * count
    _devices[:] = found
    _loaded = True
    return 0


cdef int _check(int status, str what) except -1:
    """The one place where a HIP status becomes an exception."""
    if status == 0:
        return 0
    raise DeviceError(f"{what}: {_hip.error_name(status).decode()}: "
                      f"{_hip.error_string(status).decode()}")


cdef class _On:
    """Makes a device the thread's current one, and gives back the one that was."""

    cdef int index, before

    def __cinit__(self, Device device):
        self.index = self.before = -1 if device is None else device.index

    def __enter__(self):
        if self.index < 0:
            return
        _check(_hip.get_device(&self.before), "hipGetDevice")
        if self.before != self.index:
            _check(_hip.set_device(self.index), "hipSetDevice")

    def __exit__(self, kind, *_):
        cdef int status
        if self.before != self.index:
            status = _hip.set_device(self.before)
            if kind is None:
                _check(status, "hipSetDevice")


# ---------------------------------------------------------------- devices

def device_count():
    """Give the number of HIP devices.

    Raises
    ------
    DeviceError
        hip-python or the HIP library is not there.
    """
    _load()
    return len(_devices)


def binding():
    """Give the name of hip-python's module whose C functions are used, and how launches go."""
    _load()
    return _source, "C" if _python_launch is None else "Python"


def get_device(device=0):
    """Give a HIP device.

    Parameters
    ----------
    device : int, str or Device
        Its index, ``"hip:1"``, or ``"hip"`` for the first one.

    Raises
    ------
    DeviceError
        There is no such device, or no HIP at all.
    """
    if isinstance(device, Device):
        return device
    index = device
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        if kind != "hip" or (number and not number.isdecimal()) or device.endswith(":"):
            raise ValueError(f'device: expected "hip" or "hip:0", got {device!r}')
        index = int(number or 0)
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError("device: expected an index, a name or a Device, "
                        f"got {type(device).__name__}")
    _load()
    if not 0 <= index < len(_devices):
        raise DeviceError(f"hip:{index} is not there: this machine has {len(_devices)} HIP devices")
    if _devices[index] is None:
        _devices[index] = Device(index)
    return _devices[index]


def default_device():
    """The first device that a code object loads for, and else why there is none.

    Returns
    -------
    (Device, None) or (None, str)
    """
    try:
        count = device_count()
    except DeviceError as error:
        return None, str(error)
    reason = "the HIP runtime sees no device"
    for index in range(count):
        try:
            device = get_device(index)
            (<Device>device)._module("merge")
            return device, None
        except DeviceError as error:
            reason = str(error)
    return None, reason


cdef dict _GENERIC = {
    "gfx9-generic": ("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c"),
    "gfx9-4-generic": ("gfx940", "gfx941", "gfx942", "gfx950"),
    "gfx10-3-generic": tuple(f"gfx103{i}" for i in range(7)),
    "gfx11-generic": ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152",
                      "gfx1153"),
    "gfx12-generic": ("gfx1200", "gfx1201"),
}


def code_object_folder():
    """Where the code objects are: ``ROCMFORGE_CODE_OBJECTS``, else the installed ones."""
    folder = os.environ.get("ROCMFORGE_CODE_OBJECTS")
    return Path(folder) if folder else files("rocmforge") / "code_objects"


def built_architectures():
    """List the architectures that all kernel families were built for."""
    folder = code_object_folder()
    if not folder.is_dir():
        return []
    names = [entry.name.split(".") for entry in folder.iterdir() if entry.name.endswith(".hsaco")]
    found = {}
    for name in names:
        if len(name) == 3:
            found.setdefault(name[1], set()).add(name[0])
    return sorted(a for a, families in found.items()
                  if families >= {"attention", "write", "merge", "copy"})


def _candidates(architecture):
    """Names of the objects that a device may run, best first.

    Objects are built for any setting of a chip's features, so ``gfx942:sramecc+:xnack-`` takes
    that of ``gfx942``.
    """
    exact = architecture.partition(":")[0]
    return [exact, *(name for name, members in _GENERIC.items() if exact in members)]


cdef str _text(object text):
    """What hip-python 7 gives as bytes and 10 as str."""
    return text.decode() if isinstance(text, bytes) else text


cdef class Device:
    """A HIP device: what it is, its kernels, and scratch memory for each stream.

    Attributes
    ----------
    index, wave_size, compute_units : int
    one_die : bool
        Whether all its compute units share one second-level cache, so that they see what others
        have written at little cost. MI250's dies are devices of their own.
    name : str
    architecture : str
        With its features, as the runtime names it: ``gfx942:sramecc+:xnack-``.
    """

    def __cinit__(self, int index):
        self.index = index
        self._modules, self._kernels, self._workspaces, self._families = {}, {}, {}, {}
        self.scratch_lock = threading.RLock()
        properties = _properties_type()
        cdef void *p = <void *><uintptr_t>int(properties)
        cdef int value = 0
        _check(_hip.properties(p, index), "hipGetDeviceProperties")
        self.name = _text(properties.name)
        self.architecture = _text(properties.gcnArchName)
        _check(_hip.attribute(&value, _WARP_SIZE, index), "hipDeviceGetAttribute")
        self.wave_size = value
        _check(_hip.attribute(&value, _COMPUTE_UNITS, index), "hipDeviceGetAttribute")
        self.compute_units = value
        self.one_die = self.architecture.startswith(("gfx90", "gfx10", "gfx11", "gfx12"))

    def __repr__(self):
        return f"<Device hip:{self.index} {self.name} {self.architecture}>"

    def __str__(self):
        return f"hip:{self.index}"

    def code_object(self):
        """Name of the architecture whose code objects this device runs.

        Raises
        ------
        DeviceError
            None fits, with what was built and how to build what is missing.
        """
        built = built_architectures()
        for name in _candidates(self.architecture):
            if name in built:
                return name
        raise DeviceError(
            f"no code object for {self.architecture}; built are: {', '.join(built) or 'none'}. "
            f"Build it with ROCMFORGE_HIP_ARCHS={self.architecture.partition(':')[0]} pip install "
            ". (needs a compiler: pip install ziglang)")

    cdef void *_module(self, str family) except NULL:
        cdef void *module = NULL
        cdef const char *image
        known = self._modules.get(family)
        if known is None:
            name = self.code_object()
            data = (code_object_folder() / f"{family}.{name}.hsaco").read_bytes()
            image = data
            with _On(self):
                _check(_hip.module_load(&module, image),
                       f"hipModuleLoadData({family}.{name}.hsaco) on {self.architecture}")
                known = self._modules.setdefault(family, <uintptr_t>module)
        return <void *><uintptr_t>known

    cdef bint has(self, str family) except -1:
        """Whether a family that not all architectures have was built for this one."""
        known = self._families.get(family)
        if known is None:
            known = (code_object_folder() / f"{family}.{self.code_object()}.hsaco").is_file()
            self._families[family] = known
        return known

    cdef void *kernel(self, str family, str name) except NULL:
        cdef void *function = NULL
        cdef void *module
        known = self._kernels.get(name)
        if known is None:
            module = self._module(family)
            text = name.encode()
            with _On(self):
                _check(_hip.module_function(&function, module, text),
                       f"hipModuleGetFunction({name})")
            known = self._kernels.setdefault(name, <uintptr_t>function)
        return <void *><uintptr_t>known

    cdef void *workspace(self, void *stream, size_t size) except NULL:
        """Scratch memory that calls on one stream share, as they run one after the other.

        The caller holds `scratch_lock` until all that uses it is enqueued: launches let other
        threads in, whose calls would come between, or free it for a larger one.
        It begins with RF_ARRIVALS counters, zero at first, that each call leaves as they were.
        """
        key = <uintptr_t>stream
        memory = self._workspaces.get(key)
        if memory is None or (<Memory>memory).nbytes < size:
            memory = Memory(self, size)
            fill_words(self, (<Memory>memory).data, 0, RF_ARRIVALS, stream)
            self._workspaces[key] = memory  # what was there is freed, which waits for the device
        return (<Memory>memory).data

    def release(self):
        """Free scratch memory and unload the kernels; they come back when needed."""
        self._workspaces.clear()
        self._kernels.clear()
        for module in self._modules.values():
            _hip.module_unload(<void *><uintptr_t>module)
        self._modules.clear()
        self._families.clear()

    def synchronize(self):
        """Wait for everything that was given to the device."""
        cdef int status
        with _On(self):
            with nogil:
                status = _hip.device_synchronize()
            _check(status, "hipDeviceSynchronize")

    def memory_info(self):
        """Give the free and the total bytes of the device's memory."""
        cdef size_t free = 0, total = 0
        with _On(self):
            _check(_hip.memory_info(&free, &total), "hipMemGetInfo")
        return free, total


# ---------------------------------------------------------------- memory

cdef class Memory:
    """Device memory, or pinned host memory; freed with its last reference."""

    def __cinit__(self, Device device not None, size_t nbytes, bint pinned=False):
        self.data = NULL
        self.device = device
        self.nbytes = nbytes
        self.pinned = pinned
        cdef int status
        with _On(device):
            if pinned:
                status = _hip.host_malloc(&self.data, nbytes, 0)
            else:
                status = _hip.malloc(&self.data, nbytes)
        if status == 0:
            return
        self.data = NULL
        text = f"{nbytes} bytes of {'pinned host' if pinned else 'device'} memory on {device}"
        if status == _OUT_OF_MEMORY and not pinned:
            free, total = device.memory_info()
            text += f" ({free} of {total} free)"
        _check(status, f"{'hipHostMalloc' if pinned else 'hipMalloc'}: {text}")

    def __dealloc__(self):
        if self.data != NULL:
            if self.pinned:
                _hip.host_free(self.data)
            else:
                _hip.free(self.data)

    @property
    def address(self):
        """The address as an integer."""
        return <uintptr_t>self.data

    def numpy(self):
        """Pinned memory as uint8 [nbytes]: a view, which keeps the memory."""
        if not self.pinned:
            raise ValueError("numpy: expected pinned memory; the host cannot read a device's")
        return array_at(self.data, (self.nbytes,), _U8, self)


def copy_async(to, source, size_t nbytes, stream=None, Device device=None):
    """Enqueue a copy between addresses (integers), whatever memory they are in."""
    cdef void *handle = stream_handle(stream)
    cdef void *a = <void *><uintptr_t>to
    cdef void *b = <void *><uintptr_t>source
    if nbytes == 0:
        return
    cdef int status
    with _On(device):
        with nogil:
            status = _hip.copy(a, b, nbytes, _COPY_DEFAULT, handle)
        _check(status, "hipMemcpyAsync")


cdef int fill_bytes(Device device, void *to, int value, size_t nbytes, void *stream) except -1:
    """Enqueue setting bytes."""
    if nbytes == 0:
        return 0
    with _On(device):
        return _check(_hip.memset(to, value, nbytes, stream), "hipMemsetAsync")


cdef int fill_words(Device device, void *to, int value, size_t words, void *stream) except -1:
    """Enqueue setting 32-bit words."""
    if words == 0:
        return 0
    with _On(device):
        return _check(_hip.memset_words(to, value, words, stream), "hipMemsetD32Async")


# ---------------------------------------------------------------- streams and events

cdef void *stream_handle(object stream) except? NULL:
    """The hipStream_t of None (the default stream), an integer, or an object that has one."""
    if stream is None:
        return NULL
    if type(stream) is int:
        return <void *><uintptr_t>stream
    if isinstance(stream, Stream):
        return (<Stream>stream).handle
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return <void *><uintptr_t>int(protocol()[1])
    for attribute in ("cuda_stream", "hip_stream", "ptr", "handle"):
        value = getattr(stream, attribute, None)
        if isinstance(value, int):
            return <void *><uintptr_t>value
    if hasattr(stream, "__index__"):
        return <void *><uintptr_t>stream.__index__()
    raise TypeError("stream must be None, an integer handle, or an object with __cuda_stream__, "
                    f"cuda_stream or ptr, got {type(stream).__name__}")


def stream_address(stream):
    """The hipStream_t of a stream as an integer; 0 for None."""
    return <uintptr_t>stream_handle(stream)


cdef class Stream:
    """An ordered queue of work on one device; independent of the default stream."""

    cdef void *handle
    cdef readonly Device device

    def __cinit__(self, device=0):
        self.handle = NULL
        self.device = get_device(device)
        with _On(self.device):
            _check(_hip.stream_create(&self.handle, _NON_BLOCKING), "hipStreamCreateWithFlags")

    def __dealloc__(self):
        if self.handle != NULL:
            _hip.stream_destroy(self.handle)

    def __cuda_stream__(self):
        """The stream protocol: version 0, and the handle."""
        return 0, <uintptr_t>self.handle

    def synchronize(self):
        """Wait for everything that was given to the stream."""
        cdef int status
        with nogil:
            status = _hip.stream_synchronize(self.handle)
        _check(status, "hipStreamSynchronize")

    def wait(self, Event event not None):
        """Let the stream's later work wait for an event."""
        _check(_hip.stream_wait(self.handle, event.handle, 0), "hipStreamWaitEvent")

    def is_capturing(self):
        """Whether a graph is being captured from the stream."""
        return is_capturing(self)

    def begin_capture(self):
        """Record what the stream is given into a graph, from now on."""
        _check(_hip.begin_capture(self.handle, 0), "hipStreamBeginCapture")

    def end_capture(self):
        """Give the graph of what was recorded.

        Raises
        ------
        DeviceError
            Something that cannot be captured was called meanwhile.
        """
        cdef void *graph = NULL
        _check(_hip.end_capture(self.handle, &graph), "hipStreamEndCapture")
        cdef Graph result = Graph.__new__(Graph)
        try:
            _check(_hip.instantiate(&result.handle, graph, NULL, NULL, 0), "hipGraphInstantiate")
        finally:
            _hip.graph_destroy(graph)
        return result


cdef class Graph:
    """Recorded work, to be launched again and again; memory that it uses must stay alive."""

    cdef void *handle

    def __dealloc__(self):
        if self.handle != NULL:
            _hip.graph_exec_destroy(self.handle)

    def launch(self, stream=None):
        """Give all of it to a stream."""
        _check(_hip.graph_launch(self.handle, stream_handle(stream)), "hipGraphLaunch")


cdef class Event:
    """A point in the work of a stream of its device that others wait for."""

    cdef void *handle
    cdef readonly Device device

    def __cinit__(self, device=0):
        self.handle = NULL
        self.device = get_device(device)
        with _On(self.device):
            _check(_hip.event_create(&self.handle, _NO_TIMING), "hipEventCreateWithFlags")

    def __dealloc__(self):
        if self.handle != NULL:
            _hip.event_destroy(self.handle)

    def record(self, stream=None):
        """Take the place after what the stream was given so far."""
        cdef void *handle = stream_handle(stream)
        with _On(self.device):  # whose default stream None is
            _check(_hip.event_record(self.handle, handle), "hipEventRecord")

    def query(self):
        """Whether everything before it is done."""
        cdef int status = _hip.event_query(self.handle)
        if status == _NOT_READY:
            return False
        _check(status, "hipEventQuery")
        return True

    def synchronize(self):
        """Wait until everything before it is done."""
        cdef int status
        with nogil:
            status = _hip.event_synchronize(self.handle)
        _check(status, "hipEventSynchronize")


def synchronize(stream=None, Device device=None):
    """Wait for everything that was given to a stream.

    Parameters
    ----------
    stream : optional
        None: the default stream of the device.
    device : Device, optional
        The thread's current one if None.
    """
    _load()
    cdef void *handle = stream_handle(stream)
    cdef int status
    with _On(device):
        with nogil:
            status = _hip.stream_synchronize(handle)
        _check(status, "hipStreamSynchronize")


def is_capturing(stream):
    """Whether a graph is being captured from a stream; never from a default stream, None."""
    cdef void *handle = stream_handle(stream)
    cdef int status = 0
    if handle == NULL:
        return False
    _check(_hip.is_capturing(handle, &status), "hipStreamIsCapturing")
    return status != 0


# ---------------------------------------------------------------- launches

cdef int launch(Device device, void *kernel, unsigned x, unsigned y, unsigned z, void *stream,
                void *arguments, size_t size) except -1:
    """Enqueue a kernel of RF_WAVES waves a workgroup; the arguments are copied at once."""
    cdef void *extra[5]
    cdef int status, now = 0
    cdef unsigned threads = 4 * device.wave_size
    extra[0], extra[1] = _PARAM_POINTER, arguments
    extra[2], extra[3] = _PARAM_SIZE, &size
    extra[4] = _PARAM_END
    _check(_hip.get_device(&now), "hipGetDevice")
    if now != device.index:
        _check(_hip.set_device(device.index), "hipSetDevice")
    if _python_launch is None:
        with nogil:
            status = _hip.launch(kernel, x, y, z, threads, 1, 1, 0, stream, NULL, extra)
    else:
        status = int(_python_launch(<uintptr_t>kernel, x, y, z, threads, 1, 1, 0,
                                    <uintptr_t>stream, None, <uintptr_t>&extra[0])[0])
    if now != device.index:
        _check(_hip.set_device(now), "hipSetDevice")
    return _check(status, "hipModuleLaunchKernel")
