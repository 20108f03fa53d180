"""libcrypto: AES-256-GCM, HMAC, random bytes."""
cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct ENGINE:
        pass
    const EVP_CIPHER *EVP_aes_256_gcm() noexcept
    const EVP_MD *EVP_sha256() noexcept
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new() noexcept
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *) noexcept
    int EVP_EncryptInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, ENGINE *, const unsigned char *, const unsigned char *) noexcept
    int EVP_EncryptUpdate(EVP_CIPHER_CTX *, unsigned char *, int *, const unsigned char *, int) noexcept
    int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *, unsigned char *, int *) noexcept
    int EVP_DecryptInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, ENGINE *, const unsigned char *, const unsigned char *) noexcept
    int EVP_DecryptUpdate(EVP_CIPHER_CTX *, unsigned char *, int *, const unsigned char *, int) noexcept
    int EVP_DecryptFinal_ex(EVP_CIPHER_CTX *, unsigned char *, int *) noexcept
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *, int type, int argument, void *pointer) noexcept
    int EVP_CTRL_GCM_GET_TAG
    int EVP_CTRL_GCM_SET_TAG

cdef extern from "<openssl/hmac.h>" nogil:
    unsigned char *HMAC(const EVP_MD *, const void *key, int key_bytes, const unsigned char *data, size_t data_bytes,
                        unsigned char *out, unsigned int *out_bytes) noexcept

cdef extern from "<openssl/rand.h>" nogil:
    int RAND_bytes(unsigned char *, int) noexcept

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *, size_t) noexcept
