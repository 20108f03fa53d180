"""libzstd: one page at a time, with contexts that are made once and kept: the compressor's by its owner, the decoder's by each
thread that meets such a page, until it ends.
"""
cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_CCtx:
        pass
    ZSTD_CCtx *ZSTD_createCCtx() noexcept
    size_t ZSTD_freeCCtx(ZSTD_CCtx *) noexcept
    size_t ZSTD_compressCCtx(ZSTD_CCtx *, void *target, size_t target_bytes, const void *source, size_t source_bytes, int level) noexcept
    unsigned ZSTD_isError(size_t) noexcept

cdef extern from *:
    """
    #include <pthread.h>
    #include <zstd.h>
    static pthread_once_t ramster_zstd_once = PTHREAD_ONCE_INIT;
    static pthread_key_t ramster_zstd_key;
    static int ramster_zstd_ready;
    static void ramster_zstd_free(void *context) { ZSTD_freeDCtx(context); }
    static void ramster_zstd_make(void) { ramster_zstd_ready = pthread_key_create(&ramster_zstd_key, ramster_zstd_free) == 0; }
    static size_t ramster_zstd_decompress(void *target, size_t target_bytes, const void *source, size_t source_bytes)
    {
        ZSTD_DCtx *context;
        pthread_once(&ramster_zstd_once, ramster_zstd_make);
        if (!ramster_zstd_ready)
            return 0;
        context = pthread_getspecific(ramster_zstd_key);
        if (context == NULL) {
            context = ZSTD_createDCtx();
            if (context == NULL || pthread_setspecific(ramster_zstd_key, context) != 0)
                return ZSTD_freeDCtx(context), 0;
        }
        return ZSTD_decompressDCtx(context, target, target_bytes, source, source_bytes);
    }
    """
    # The decompressed bytes; anything else than what was expected is a failure.
    size_t zstd_decompress "ramster_zstd_decompress"(void *target, size_t target_bytes, const void *source, size_t source_bytes) noexcept nogil
