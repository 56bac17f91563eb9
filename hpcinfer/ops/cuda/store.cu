// Keys and values into the pages of a cache: a thread writes one column of a head of a token, of the
// keys where blockIdx.y is 0. HELD is the type of the cache; `places` has the rows, then the slots.

__device__ inline void write_rows(const float* x, const int* places, HELD* pages, int n, int G, int K,
                             int page, long long token_stride, long long head_stride) {
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)n * G * K) return;
    int column = (int)(item % K), head = (int)(item / K % G), i = (int)(item / K / G);
    int row = places[i], slot = places[n + i];
    float value = x[row * token_stride + head * head_stride + column];
    long long block = (long long)(slot / page) * G + head;
    narrow(value, pages + (block * page + slot % page) * K + column);
}

extern "C" __global__ void store_rows(const float* k, const float* v, const int* places,
                                      HELD* k_pages, HELD* v_pages, int n, int G, int page,
                                      int k_width, int v_width, long long k_token_stride,
                                      long long k_head_stride, long long v_token_stride,
                                      long long v_head_stride) {
    if (blockIdx.y == 0)
        write_rows(k, places, k_pages, n, G, k_width, page, k_token_stride, k_head_stride);
    else
        write_rows(v, places, v_pages, n, G, v_width, page, v_token_stride, v_head_stride);
}
