// Rows of an embedding, widened; a thread has N columns that follow one another. HELD is the type of
// the weights. A row below 0 is another rank's, and zero.

__device__ inline float widened(float x) { return x; }

template <class V>
__device__ inline float widened(V x) {
    float y[2];
    unpack2(x.bits, y, x);
    return y[0];
}

__device__ inline void copy(const HELD* from, float (&y)[1]) { y[0] = widened(from[0]); }

__device__ inline void copy(const HELD* from, float (&y)[8]) { unpack(load8(from), y); }

template <int N>
__device__ void embed(const HELD* weight, const int* rows, float* x, long long n, int D) {
    long long item = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (item >= n) return;
    int row = rows[item / D];
    float y[N] = {};
    if (row >= 0) copy(weight + (long long)row * D + item % D, y);
    constexpr int WIDTH = N == 8 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < N; i += WIDTH) {
        Run<WIDTH> run;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) run.x[j] = y[i + j];
        store(x + item + i, run);
    }
}

#define KERNELS(N)                                                                           \
    extern "C" __global__ void embed_##N(const HELD* weight, const int* rows, float* x,      \
                                         long long n, int D) {                               \
        embed<N>(weight, rows, x, n, D);                                                     \
    }

KERNELS(1)
KERNELS(8)
