from libc.stdint cimport uint64_t


cdef struct Guard:
    # What the guardian thread and the fork handler use: plain memory, so that neither ever needs the interpreter.
    Guard *next
    unsigned long thread
    char *base
    size_t size
    int memfd
    int uffd
    int channel            # guard channel to the node
    int stop               # eventfd: the mapping is gone, leave
    int empty              # memfd of length 0: mapped over a page, any touch of it is SIGBUS
    int node_wait_ms
    bint poison
    int node_gone          # atomic: 1 once the guardian serves the faults itself
    uint64_t replaced      # pages poisoned or mapped over since the mapping was made
    bint reserved          # in a forked child: the range is its parent's, and without access here
    char forked[512]       # what such a child says that touches it


cdef class Mapping:
    cdef Guard *guard
    cdef Py_ssize_t _exports
    cdef bint _closing
    cdef bint _closed
    cdef Py_ssize_t _shape[1]
    cdef Py_ssize_t _strides[1]
    cdef object __weakref__
    cdef readonly int creator
    cdef readonly uint64_t features
    cdef readonly bint user_mode_only
    cdef void _check(self) except *
    cdef void _release(self) noexcept
    cdef Guard *_mapped(self) except NULL
