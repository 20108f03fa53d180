from libc.stdint cimport uint64_t

cdef enum:
    NOTE_TEXT = 128        # of a note, NUL included
    NOTE_KINDS = 6         # kinds of notes that are told apart at a time; beyond, one stands for the others
    REGION_NAME = 200      # bytes of a region's name, the longest with NUL


cdef struct Notes:
    # One kind of note that was written a short while ago: what else of it comes is counted.
    uint64_t kind          # 0: free
    uint64_t since_ns
    uint64_t held
    char last[NOTE_TEXT]


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
    char name[REGION_NAME]
    Notes notes[NOTE_KINDS]            # the guardian's alone
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
