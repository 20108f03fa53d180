"""LZ4 block format (liblz4) and CRC32C (ISA-L, with run-time dispatch)."""
cdef extern from "<lz4.h>" nogil:
    int LZ4_compress_default(const char *source, char *target, int source_bytes, int target_bytes) noexcept
    int LZ4_decompress_safe(const char *source, char *target, int source_bytes, int target_bytes) noexcept

cdef extern from "<isa-l/crc.h>" nogil:
    unsigned int crc32_iscsi(unsigned char *buffer, int length, unsigned int seed) noexcept
