cimport numpy as cnp

from rocmforge.hip._driver cimport Device


cdef class DeviceArray:
    cdef readonly Device device
    # Its shape, strides, type and address. Nobody reads an element: they are not the host's.
    cdef cnp.ndarray _array
    cdef object _owner

cdef DeviceArray new_device_array(Device device, object shape, cnp.dtype dtype)
cdef cnp.ndarray on_device(object x, str name, Device device, size_t stream)
cdef int device_of(object x) except -2
