# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Tensors in device memory: our own, and those of other libraries by DLPack.

A tensor is described by a NumPy array at the device's address, so that shapes, strides and views
are NumPy's and the checks of `rocmforge.ops` serve both backends. Its elements are never read here.
"""

cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint64_t, uintptr_t

from rocmforge.hip._driver cimport Device, Memory, fill_bytes, stream_handle
from rocmforge.ops._arrays cimport (
    array_at, dlpack_array, dlpack_type, exchange_of, rf_dl_exchange, rf_dl_managed, rf_dl_tensor,
    rf_dl_versioned, tensor_array, writable)

import numpy as np

from rocmforge.hip._driver import copy_async, get_device, synchronize

cnp.import_array()

cdef extern from "rf/dlpack.h" nogil:
    enum: RF_DL_CPU
    enum: RF_DL_CUDA_HOST
    enum: RF_DL_ROCM
    enum: RF_DL_ROCM_HOST
    uint64_t RF_DL_READ_ONLY


cdef struct _Exported:
    rf_dl_versioned versioned
    rf_dl_managed plain
    int64_t shape[8]
    int64_t strides[8]
    PyObject *owner


cdef void _drop(_Exported *e) noexcept with gil:
    Py_DECREF(<object>e.owner)
    PyMem_Free(e)


cdef void _delete_versioned(rf_dl_versioned *managed) noexcept nogil:
    _drop(<_Exported *>managed.context)


cdef void _delete_plain(rf_dl_managed *managed) noexcept nogil:
    _drop(<_Exported *>managed.context)


cdef void _forget(object capsule) noexcept:
    """Free what nobody took out of its capsule."""
    if PyCapsule_IsValid(capsule, "dltensor_versioned"):
        _drop(<_Exported *>(<rf_dl_versioned *>PyCapsule_GetPointer(
            capsule, "dltensor_versioned")).context)
    elif PyCapsule_IsValid(capsule, "dltensor"):
        _drop(<_Exported *>(<rf_dl_managed *>PyCapsule_GetPointer(capsule, "dltensor")).context)


cdef class DeviceArray:
    """A tensor in the memory of a HIP device.

    Made by `empty`, `zeros`, `from_numpy` or `from_dlpack`; goes to other libraries by DLPack
    without a copy (`torch.from_dlpack(array)`). Work on it is ordered by the streams that the
    caller uses.

    Attributes
    ----------
    device : Device
    shape : tuple of int
    strides : tuple of int
        In bytes.
    dtype : numpy.dtype
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("a DeviceArray is made by empty, zeros, from_numpy or from_dlpack of "
                        "rocmforge.hip")

    @property
    def shape(self):
        return (<object>self._array).shape

    @property
    def strides(self):
        return (<object>self._array).strides

    @property
    def dtype(self):
        return self._array.dtype

    @property
    def ndim(self):
        return cnp.PyArray_NDIM(self._array)

    @property
    def nbytes(self):
        return cnp.PyArray_SIZE(self._array) * cnp.PyArray_ITEMSIZE(self._array)

    @property
    def address(self):
        """The device's address of the first element, as an integer."""
        return <uintptr_t>cnp.PyArray_DATA(self._array)

    def __len__(self):
        return len(self._array)

    def __repr__(self):
        return f"<DeviceArray {self.dtype} {list(self.shape)} on {self.device}>"

    def __getitem__(self, key):
        """A view, by integers, slices, ``...`` and ``None``; not of a single element."""
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if not (part is None or part is Ellipsis or isinstance(part, (int, slice))):
                raise TypeError("a DeviceArray takes integers, slices, ... and None, got "
                                f"{type(part).__name__}")
        if sum([isinstance(part, int) for part in parts]) == self.ndim:
            key = (*parts, ...)  # a view of no dimension, where NumPy would read the element
        return self._view(self._array[key])

    def view(self, dtype):
        """The same bytes as elements of another type."""
        return self._view(self._array.view(dtype))

    def reshape(self, *shape):
        """A view of another shape; the elements must lie one after the other."""
        if not cnp.PyArray_IS_C_CONTIGUOUS(self._array):
            raise ValueError(f"reshape: expected a C-contiguous array, got strides {self.strides}")
        return self._view(self._array.reshape(*shape))

    def _view(self, cnp.ndarray array):
        cdef DeviceArray view = DeviceArray.__new__(DeviceArray)
        view.device, view._array, view._owner = self.device, array, self._owner
        return view

    def numpy(self, stream=None):
        """Copy to a new NumPy array, and wait for it.

        Parameters
        ----------
        stream : optional
            Whose earlier work is waited for; the default stream if None.
        """
        bounds = np.lib.array_utils.byte_bounds(self._array) if self.nbytes else (0, 0)
        buffer = np.empty(bounds[1] - bounds[0], np.uint8)
        copy_async(buffer.ctypes.data, bounds[0], buffer.nbytes, stream, self.device)
        synchronize(stream, self.device)
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        view = np.ndarray(self.shape, self.dtype, buffer, self.address - bounds[0], self.strides)
        return view if view.flags.c_contiguous else view.copy()

    def copy_from(self, array, stream=None):
        """Copy a NumPy array or another DeviceArray of the same shape and type to here.

        Enqueued on the stream; a NumPy array may be changed when the call returns, unless its
        memory is pinned.
        """
        if not isinstance(array, (np.ndarray, DeviceArray)):
            raise TypeError("copy_from: expected a NumPy array or a DeviceArray, got "
                            f"{type(array).__name__}")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"copy_from: expected {self.dtype} {list(self.shape)}, got "
                             f"{array.dtype} {list(array.shape)}")
        if not cnp.PyArray_IS_C_CONTIGUOUS(self._array):
            raise ValueError(f"copy_from: expected a C-contiguous target, got {self.strides}")
        writable(self._array, "copy_from: the target")
        if isinstance(array, DeviceArray):
            if not cnp.PyArray_IS_C_CONTIGUOUS((<DeviceArray>array)._array):
                raise ValueError(f"copy_from: expected a C-contiguous source, got {array.strides}")
            source = array.address
        else:
            array = np.ascontiguousarray(array)
            source = array.ctypes.data
        copy_async(self.address, source, self.nbytes, stream, self.device)
        return self

    def __dlpack_device__(self):
        """kDLROCM and the device's index."""
        return RF_DL_ROCM, self.device.index

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """The tensor as a DLPack capsule.

        The consumer's stream is not synchronised with: it must be the one that the array was
        written on, or wait for it.
        """
        if copy:
            raise BufferError("a DeviceArray is exported without a copy")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on {self.device}, not on DLPack device {dl_device}")
        if self.ndim > 8:
            raise BufferError("a DLPack export has at most 8 dimensions")
        cdef bint versioned = max_version is not None and tuple(max_version) >= (1, 0)
        cdef bint read_only = not cnp.PyArray_ISWRITEABLE(self._array)
        if read_only and not versioned:
            raise BufferError("the array is read-only, which DLPack says from version 1 on")
        cdef _Exported *e = <_Exported *>PyMem_Malloc(sizeof(_Exported))
        if e == NULL:
            raise MemoryError()
        cdef rf_dl_tensor *t = &e.versioned.tensor if versioned else &e.plain.tensor
        cdef int i
        t.data = cnp.PyArray_DATA(self._array)
        t.device_type, t.device_id = RF_DL_ROCM, self.device.index
        t.ndim = self.ndim
        t.byte_offset = 0
        try:
            dlpack_type(self._array.descr, t)
        except ValueError as error:
            PyMem_Free(e)
            raise BufferError(str(error)) from None
        for i in range(t.ndim):
            e.shape[i] = cnp.PyArray_DIM(self._array, i)
            e.strides[i] = cnp.PyArray_STRIDE(self._array, i) // cnp.PyArray_ITEMSIZE(self._array)
        t.shape, t.strides = e.shape, e.strides
        owner = self
        Py_INCREF(owner)
        e.owner = <PyObject *>owner
        if versioned:
            e.versioned.major, e.versioned.minor = 1, 0
            e.versioned.context, e.versioned.deleter = e, _delete_versioned
            e.versioned.flags = RF_DL_READ_ONLY if read_only else 0
            return PyCapsule_New(&e.versioned, "dltensor_versioned", _forget)
        e.plain.context, e.plain.deleter = e, _delete_plain
        return PyCapsule_New(&e.plain, "dltensor", _forget)


cdef DeviceArray new_device_array(Device device, object shape, cnp.dtype dtype):
    size = dtype.itemsize
    for n in shape:
        size *= n
    cdef Memory memory = Memory(device, size)
    cdef DeviceArray result = DeviceArray.__new__(DeviceArray)
    result.device, result._owner = device, memory
    result._array = array_at(memory.data, shape, dtype, memory)
    return result


def empty(shape, dtype, device=0):
    """A new array on a device, its elements not set.

    Raises
    ------
    DeviceError
        The device has not enough memory, with how much was asked for and how much is there.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return new_device_array(get_device(device), shape, np.dtype(dtype))


def zeros(shape, dtype, device=0, stream=None):
    """A new array on a device, set to zero on a stream."""
    cdef DeviceArray result = empty(shape, dtype, device)
    fill_bytes(result.device, cnp.PyArray_DATA(result._array), 0, result.nbytes,
               stream_handle(stream))
    return result


def from_dlpack(array, stream=None):
    """Describe a tensor of another library (PyTorch, CuPy, JAX) that is on a device; no copy.

    Elements that the library holds as bytes, as float8 often are, get their type by `view`:
    ``from_dlpack(pool).view("float8_e4m3fnuz")`` is a cache for `rocmforge.ops`.

    Parameters
    ----------
    array : object with ``__dlpack__`` and ``__dlpack_device__``
    stream : optional
        Work on it waits for the array's own earlier work, if the library cares for that.

    Raises
    ------
    ValueError, TypeError
        It is not on a HIP device, or of a type that no argument of an operation can have.
    """
    cdef int index = device_of(array)
    if index < 0:
        raise ValueError(f"array must be on a HIP device, got {type(array).__name__}")
    cdef DeviceArray result = DeviceArray.__new__(DeviceArray)
    result.device = get_device(index)
    result._array = on_device(array, "array", result.device, <uintptr_t>stream_handle(stream))
    result._owner = result._array
    return result


def from_numpy(array, device=0, stream=None):
    """Copy a NumPy array to a new one on a device."""
    array = np.ascontiguousarray(array)
    return empty(array.shape, array.dtype, device).copy_from(array, stream)


cdef int device_of(object x) except -2:
    """Index of the HIP device that an array is on; -1: it is not on any."""
    if isinstance(x, DeviceArray):
        return (<DeviceArray>x).device.index
    cdef const rf_dl_exchange *api = exchange_of(x)
    cdef rf_dl_tensor t
    if api != NULL:
        api.describe(<void *>x, &t)
        return t.device_id if t.device_type == RF_DL_ROCM else -1
    if isinstance(x, cnp.ndarray) or not hasattr(x, "__dlpack_device__"):
        return -1
    kind, index = x.__dlpack_device__()
    return int(index) if int(kind) == RF_DL_ROCM else -1


cdef str _where(object x):
    if isinstance(x, cnp.ndarray) or not hasattr(x, "__dlpack_device__"):
        return "in host memory"
    kind, index = x.__dlpack_device__()
    if int(kind) in (RF_DL_CPU, RF_DL_CUDA_HOST, RF_DL_ROCM_HOST):
        return "in host memory"
    return f"on hip:{index}" if int(kind) == RF_DL_ROCM else f"on DLPack device type {int(kind)}"


cdef cnp.ndarray on_device(object x, str name, Device device, size_t stream):
    """Any array on the device, described; work on `stream` comes after the array's."""
    if isinstance(x, DeviceArray) and (<DeviceArray>x).device is device:
        return (<DeviceArray>x)._array
    cdef const rf_dl_exchange *api = exchange_of(x)
    cdef rf_dl_tensor t
    cdef void *current = NULL
    if api != NULL:
        api.describe(<void *>x, &t)
        # On the stream that the library itself works on, nothing needs to wait for anything.
        if t.device_type == RF_DL_ROCM and t.device_id == device.index and api.current_stream:
            api.current_stream(RF_DL_ROCM, device.index, &current)
            if current == <void *>stream:
                return tensor_array(&t, name, cnp.NPY_ARRAY_WRITEABLE, x)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be an array with __dlpack__ on {device}, got "
                        f"{type(x).__name__}")
    cdef int index = device_of(x)
    if index != device.index:
        raise ValueError(f"{name} must be on {device}, as query or key is, got a "
                         f"{type(x).__name__} {_where(x)}")
    try:
        capsule = x.__dlpack__(max_version=(1, 0), stream=stream)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = x.__dlpack__(stream=stream)
    return dlpack_array(capsule, x, name)
