# Invariants, in words (Cython would print the name of a temporary): checked in every build. One that does not hold ends the
# process before it can hand out a wrong page.
cdef extern from *:
    """
    #ifndef RAMSTER_ASSERT
    #include <stdio.h>
    #include <stdlib.h>
    #define RAMSTER_ASSERT(condition, text) do { if (__builtin_expect(!(condition), 0)) { \
        fprintf(stderr, "ramster: invariant broken: %s (%s:%d)\\n", text, __FILE__, __LINE__); abort(); } } while (0)
    #endif
    """
    void ASSERT "RAMSTER_ASSERT"(bint condition, const char *text) noexcept nogil
