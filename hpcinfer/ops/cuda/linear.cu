// Products of few tokens with a 16-bit weight, which the device reads once. WEIGHT is its type.

// By matrix units.
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

#define PRODUCT(X, TILES)                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 4 - TILES) product_##X##_##TILES(         \
        const X* x, const WEIGHT* weight, const float* bias, float* y, int T, int I, int O) {   \
        product<TILES>(Dense{weight, I}, x, bias, y, T, I, O);                                  \
    }

#define GATED_PRODUCT(FUNCTION, TILES)                                                          \
    extern "C" __global__ void __launch_bounds__(256, 4 - TILES) FUNCTION##_product_##TILES(    \
        const WEIGHT* x, const WEIGHT* weight, const float* bias, WEIGHT* y, int T, int I,      \
        int F, int y_stride) {                                                                  \
        gated_product<TILES, FUNCTION>(Dense{weight, I}, x, bias, y, T, I, F, y_stride);        \
    }

PRODUCT(float, 1)
PRODUCT(float, 2)
PRODUCT(held, 1)
PRODUCT(held, 2)
GATED_PRODUCT(silu, 1)
GATED_PRODUCT(silu, 2)
GATED_PRODUCT(gelu_tanh, 1)
GATED_PRODUCT(gelu_tanh, 2)

#endif

// Without matrix units of that kind: a warp computes ROWS outputs of all tokens, and every lane
// eight of the columns at a time.

template <int TOKENS, int ROWS>
__device__ void matvec(const float* x, const WEIGHT* weight, const float* bias, float* y, int T,
                       int I, int O) {
    int lane = (int)threadIdx.x % 32;
    int warp = (int)(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    int first = warp * ROWS;
    if (first >= O) return;
    float sums[ROWS][TOKENS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) sums[r][t] = 0;

    for (int column = lane * 8; column < I; column += 256) {
        // Read the weights of all rows before any is used; rows past the end repeat the last one.
        Eight<WEIGHT> packed[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            packed[r] = load8(weight + (long long)min(first + r, O - 1) * I + column);
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) unpack(packed[r], w[r]);

        // Multiply by x, rounded to the weight's type.
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float values[8];
            unpack(load8(x + (long long)min(t, T - 1) * I + column), values);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float value = rounded(values[i], WEIGHT());
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r][t] += value * w[r][i];
            }
        }
    }

    // Add up the lanes' columns.
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = lanes_sum<32>(sums[r][t]);
            if (lane == 0 && t < T && first + r < O)
                y[(long long)t * O + first + r] = sum + (bias == nullptr ? 0.0f : bias[first + r]);
        }
}

#define MATVEC(TOKENS, ROWS)                                                                    \
    extern "C" __global__ void matvec_##TOKENS##_##ROWS(const float* x, const WEIGHT* weight,   \
                                                        const float* bias, float* y, int T,     \
                                                        int I, int O) {                         \
        matvec<TOKENS, ROWS>(x, weight, bias, y, T, I, O);                                      \
    }

MATVEC(1, 1)
MATVEC(1, 2)
MATVEC(1, 4)
MATVEC(2, 1)
MATVEC(2, 2)
MATVEC(2, 4)
MATVEC(4, 1)
MATVEC(4, 2)
MATVEC(4, 4)
MATVEC(8, 1)
MATVEC(8, 2)
MATVEC(8, 4)
