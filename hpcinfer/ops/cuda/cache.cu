// Keys and values into the pages of a cache. HELD is the type of the cache; slots has for every
// token page · page length + offset, or -1 if it is not stored here.

__device__ inline HELD* place_of(HELD* pages, int slot, int head, int G, int K, int page) {
    return pages + (((long long)(slot / page) * G + head) * page + slot % page) * K;
}

// A thread writes one column of a head of a token.
__device__ inline void write_rows(const float* x, const int* slots, HELD* pages, int T, int G,
                                  int K, int page, long long token_stride,
                                  long long head_stride) {
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (long long)T * G * K) return;
    int column = (int)(item % K), head = (int)(item / K % G), token = (int)(item / K / G);
    if (slots[token] < 0) return;
    float value = x[token * token_stride + head * head_stride + column];
    narrow(value, place_of(pages, slots[token], head, G, K, page) + column);
}

// The keys where blockIdx.y is 0, else the values.
extern "C" __global__ void store_rows(const float* k, const float* v, const int* slots,
                                      HELD* k_pages, HELD* v_pages, int T, int G, int page,
                                      int k_width, int v_width, long long k_token_stride,
                                      long long k_head_stride, long long v_token_stride,
                                      long long v_head_stride) {
    if (blockIdx.y == 0)
        write_rows(k, slots, k_pages, T, G, k_width, page, k_token_stride, k_head_stride);
    else
        write_rows(v, slots, v_pages, T, G, v_width, page, v_token_stride, v_head_stride);
}

constexpr int MOST_VALUES = 8, WARPS = 4;

// Heads of x (T, H + 2 G, K): a warp has one of a token. Queries and keys are normed, where there is
// a weight, rotated, where there are angles, and written to y (T, H + G, K); keys and values go to
// their pages.
extern "C" __global__ void __launch_bounds__(128)
    place_heads(const float* x, const float* q_norm, const float* k_norm, const float* cos,
                const float* sin, const int* slots, float* y, HELD* k_pages, HELD* v_pages, int T,
                int H, int G, int K, int half, int page, float eps) {
    __shared__ float rows[WARPS][32 * MOST_VALUES];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int item = (int)blockIdx.x * WARPS + warp, heads = H + 2 * G;
    if (item >= T * heads) return;
    int token = item / heads, head = item % heads, slot = slots[token];
    bool is_value = head >= H + G;
    float* row = rows[warp];
    float values[MOST_VALUES];
    wait_for_others();
#pragma unroll
    for (int i = 0; i < MOST_VALUES; i++) {
        int column = lane + 32 * i;
        values[i] = column < K ? x[(long long)item * K + column] : 0.0f;
    }

    // Norm.
    const float* weight = is_value ? nullptr : head < H ? q_norm : k_norm;
    if (weight != nullptr) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < MOST_VALUES; i++) squares += values[i] * values[i];
        float inverse = 1.0f / sqrtf(lanes_sum<32>(squares) / K + eps);
#pragma unroll
        for (int i = 0; i < MOST_VALUES; i++)
            if (lane + 32 * i < K) values[i] *= inverse * weight[lane + 32 * i];
    }

    // Rotate: every column has its partner from another lane.
    if (!is_value && half > 0) {
#pragma unroll
        for (int i = 0; i < MOST_VALUES; i++) row[lane + 32 * i] = values[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MOST_VALUES; i++) {
            int column = lane + 32 * i, pair = column < half ? column : column - half;
            if (column >= 2 * half) continue;
            float c = cos[token * half + pair], s = sin[token * half + pair];
            float other = row[column < half ? column + half : pair];
            values[i] = values[i] * c + (column < half ? -other : other) * s;
        }
    }

    // Write.
    float* to = y + ((long long)token * (H + G) + head) * K;
    HELD* pages = is_value ? v_pages : k_pages;
    HELD* place = place_of(pages, max(slot, 0), is_value ? head - H - G : head - H, G, K, page);
#pragma unroll
    for (int i = 0; i < MOST_VALUES; i++) {
        int column = lane + 32 * i;
        if (column >= K) continue;
        if (!is_value) to[column] = values[i];
        if (head >= H && slot >= 0) narrow(values[i], place + column);
    }
}
