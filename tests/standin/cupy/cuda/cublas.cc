// cuBLAS by its own names, as far as hpcinfer calls it: products are handed to Python.

struct Handle {
    void *stream, *workspace;
};

using Product = int (*)(void* stream, int transa, int transb, int m, int n, int k,
                        const void* alpha, const void* A, int Atype, int lda, const void* B,
                        int Btype, int ldb, const void* beta, void* C, int Ctype, int ldc,
                        int computeType, int algo);

static Product product;

extern "C" {

void standin_product(Product function) { product = function; }

int cublasCreate_v2(Handle** handle) {
    *handle = new Handle();
    return 0;
}

// As in cuBLAS, another stream takes the workspace away.
int cublasSetStream_v2(Handle* handle, void* stream) {
    handle->stream = stream, handle->workspace = nullptr;
    return 0;
}

int cublasSetWorkspace_v2(Handle* handle, void* workspace, unsigned long) {
    handle->workspace = workspace;
    return 0;
}

int cublasGemmEx(Handle* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                 const void* A, int Atype, int lda, const void* B, int Btype, int ldb,
                 const void* beta, void* C, int Ctype, int ldc, int computeType, int algo) {
    if (!handle->workspace) return 3;  // CUBLAS_STATUS_ALLOC_FAILED: it would allocate
    return product(handle->stream, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb,
                   beta, C, Ctype, ldc, computeType, algo);
}
}
