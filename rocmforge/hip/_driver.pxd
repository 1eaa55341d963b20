cdef class Device:
    cdef readonly int index
    cdef readonly str name
    cdef readonly str architecture
    cdef readonly int wave_size
    cdef readonly int compute_units
    cdef readonly bint one_die
    cdef dict _modules
    cdef dict _kernels
    cdef dict _workspaces
    cdef object scratch_lock  # held from `workspace` to the last launch that uses it
    cdef dict _families
    cdef void *_module(self, str family) except NULL
    cdef bint has(self, str family) except -1
    cdef void *kernel(self, str family, str name) except NULL
    cdef void *workspace(self, void *stream, size_t size) except NULL


cdef class Memory:
    cdef void *data
    cdef readonly size_t nbytes
    cdef readonly Device device
    cdef readonly bint pinned

cdef int launch(Device device, void *kernel, unsigned x, unsigned y, unsigned z, void *stream,
                void *arguments, size_t size) except -1
cdef void *stream_handle(object stream) except? NULL
cdef int fill_bytes(Device device, void *to, int value, size_t nbytes, void *stream) except -1
cdef int fill_words(Device device, void *to, int value, size_t words, void *stream) except -1
