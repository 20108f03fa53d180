"""libssl: TLS over non-blocking sockets."""
cdef extern from "<openssl/bio.h>" nogil:
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    BIO_METHOD *BIO_meth_new(int type, const char *name) noexcept
    int BIO_meth_set_write(BIO_METHOD *, int (*)(BIO *, const char *, int) noexcept nogil) noexcept
    int BIO_meth_set_ctrl(BIO_METHOD *, long (*)(BIO *, int, long, void *) noexcept nogil) noexcept
    int BIO_get_new_index() noexcept
    BIO *BIO_new(const BIO_METHOD *) noexcept
    void BIO_set_init(BIO *, int) noexcept
    void BIO_set_data(BIO *, void *) noexcept
    void *BIO_get_data(BIO *) noexcept
    void BIO_set_retry_write(BIO *) noexcept
    void BIO_clear_retry_flags(BIO *) noexcept
    int BIO_TYPE_SOURCE_SINK, BIO_CTRL_FLUSH

cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct X509:
        pass
    ctypedef struct OPENSSL_INIT_SETTINGS:
        pass
    const SSL_METHOD *TLS_method() noexcept
    SSL_CTX *SSL_CTX_new(const SSL_METHOD *) noexcept
    void SSL_CTX_free(SSL_CTX *) noexcept
    int SSL_CTX_set_min_proto_version(SSL_CTX *, int) noexcept
    int SSL_CTX_set_num_tickets(SSL_CTX *, size_t) noexcept
    int SSL_CTX_set_ciphersuites(SSL_CTX *, const char *) noexcept
    long SSL_CTX_set_mode(SSL_CTX *, long) noexcept
    long SSL_CTX_set_session_cache_mode(SSL_CTX *, long) noexcept
    void SSL_CTX_set_read_ahead(SSL_CTX *, int) noexcept
    void SSL_CTX_set_verify(SSL_CTX *, int, void *) noexcept
    int SSL_CTX_load_verify_locations(SSL_CTX *, const char *, const char *) noexcept
    int SSL_CTX_use_certificate_chain_file(SSL_CTX *, const char *) noexcept
    int SSL_CTX_use_PrivateKey_file(SSL_CTX *, const char *, int) noexcept
    int SSL_CTX_check_private_key(const SSL_CTX *) noexcept
    SSL *SSL_new(SSL_CTX *) noexcept
    void SSL_free(SSL *) noexcept
    int SSL_set_fd(SSL *, int) noexcept
    int SSL_set_min_proto_version(SSL *, int) noexcept
    int SSL_set_cipher_list(SSL *, const char *) noexcept
    unsigned long long SSL_set_options(SSL *, unsigned long long) noexcept
    void SSL_set_accept_state(SSL *) noexcept
    void SSL_set_connect_state(SSL *) noexcept
    int SSL_do_handshake(SSL *) noexcept
    int SSL_read(SSL *, void *, int) noexcept
    int SSL_write(SSL *, const void *, int) noexcept
    int SSL_get_error(const SSL *, int) noexcept
    int SSL_key_update(SSL *, int) noexcept
    long SSL_get_verify_result(const SSL *) noexcept
    X509 *SSL_get1_peer_certificate(const SSL *) noexcept
    const char *SSL_get_version(const SSL *) noexcept
    void SSL_set0_wbio(SSL *, BIO *) noexcept
    void SSL_set_msg_callback(SSL *, void (*)(int, int, int, const void *, size_t, SSL *, void *) noexcept nogil) noexcept
    void SSL_set_msg_callback_arg(SSL *, void *) noexcept
    void SSL_set_shutdown(SSL *, int) noexcept
    int SSL3_RT_HANDSHAKE, SSL_RECEIVED_SHUTDOWN
    int OPENSSL_init_ssl(unsigned long long, const OPENSSL_INIT_SETTINGS *) noexcept
    int TLS1_2_VERSION, TLS1_3_VERSION
    unsigned long long SSL_OP_NO_RENEGOTIATION, SSL_OP_NO_TICKET
    long SSL_MODE_ENABLE_PARTIAL_WRITE, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
    long SSL_SESS_CACHE_OFF
    int SSL_VERIFY_PEER, SSL_VERIFY_FAIL_IF_NO_PEER_CERT, SSL_FILETYPE_PEM
    int SSL_ERROR_NONE, SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_ZERO_RETURN, SSL_ERROR_SYSCALL
    int SSL_KEY_UPDATE_NOT_REQUESTED, SSL_KEY_UPDATE_REQUESTED
    unsigned long long OPENSSL_INIT_NO_ATEXIT

cdef extern from "<openssl/x509.h>" nogil:
    int i2d_X509(X509 *, unsigned char **) noexcept
    void X509_free(X509 *) noexcept

cdef extern from "<openssl/x509_vfy.h>" nogil:
    const char *X509_verify_cert_error_string(long) noexcept
    long X509_V_OK, X509_V_ERR_OUT_OF_MEM

cdef extern from "<openssl/err.h>" nogil:
    unsigned long ERR_get_error() noexcept
    unsigned long ERR_peek_error() noexcept
    void ERR_clear_error() noexcept
    int ERR_GET_REASON(unsigned long) noexcept
    int ERR_R_MALLOC_FAILURE
    const char *ERR_reason_error_string(unsigned long) noexcept
