// Products of few tokens with a 16-bit weight, which the device reads once. WEIGHT is its type.

typedef WEIGHT held;

// Eight inputs of a token, rounded to the weight's type.
__device__ inline void operands(const WEIGHT* from, float* y) { unpack(load8(from), y); }

__device__ inline void operands(const float* from, float* y) {
    unpack(load8(from), y);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = rounded(y[i], WEIGHT());
}

// Eight inputs of each run of some rows of the weight, zero behind the end.
template <int ROWS, int RUNS>
__device__ inline void read_rows(const WEIGHT* const (&rows)[ROWS], int first, int I,
                                 Eight<WEIGHT> (&values)[RUNS][ROWS]) {
#pragma unroll
    for (int i = 0; i < RUNS; i++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int column = first + 256 * i;
            values[i][r] = column < I ? load8(rows[r] + column) : zero8<WEIGHT>();
        }
}

// Of one token: `parts` warps of a block share the columns of ROWS rows of the weight, RUNS times
// 256 columns at a time, and add up what they have found in a fixed order.
template <int ROWS, int RUNS, class X>
__device__ inline void dot_rows(const X* x, const WEIGHT* const (&rows)[ROWS], int I, int parts,
                                float (&sums)[ROWS]) {
    __shared__ float partial[8][ROWS];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int step = parts * RUNS * 256, first = warp % parts * RUNS * 256 + lane * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;

    // Read the weights of a step before any is used, the first ones before x is there.
    Eight<WEIGHT> packed[RUNS][ROWS];
    read_rows<ROWS, RUNS>(rows, first, I, packed);
    wait_for_others();
    for (int base = first; base < I; base += step) {
        if (base > first) read_rows<ROWS, RUNS>(rows, base, I, packed);
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            int column = base + 256 * i;
            if (column >= I) continue;
            float values[8], w[8];
            operands(x + column, values);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                unpack(packed[i][r], w);
#pragma unroll
                for (int j = 0; j < 8; j++) sums[r] += values[j] * w[j];
            }
        }
    }

    // Add up the lanes, then the warps.
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = lanes_sum<32>(sums[r]);
    if (parts == 1) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane == 0) partial[warp][r] = sums[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sums[r] = 0;
        for (int i = 0; i < parts; i++) sums[r] += partial[warp / parts * parts + i][r];
    }
}

// Row of the weight that this warp has a part of; all of a block go on, as they meet.
__device__ inline int row_of_warp(int parts) {
    int warps = (int)blockDim.x / 32;
    return (int)blockIdx.x * (warps / parts) + (int)threadIdx.x / 32 / parts;
}

// y (O,) = weight · x + bias.
template <class X>
__device__ void one_token(const X* x, const WEIGHT* weight, const float* bias, float* y, int I,
                          int O, int parts) {
    int row = row_of_warp(parts);
    const WEIGHT* rows[1] = {weight + (long long)min(row, O - 1) * I};
    float sums[1];
    dot_rows<1, 4>(x, rows, I, parts, sums);
    if (row < O && threadIdx.x % (32 * parts) == 0)
        y[row] = sums[0] + (bias == nullptr ? 0.0f : bias[row]);
}

// y (F,) = function(gate · x) · (up · x), as `gated_product`.
template <float (*FUNCTION)(float)>
__device__ void one_gated(const WEIGHT* x, const WEIGHT* weight, const float* bias, WEIGHT* y,
                          int I, int F, int parts) {
    int row = row_of_warp(parts), own = min(row, F - 1);
    const WEIGHT* rows[2] = {weight + (long long)own * I, weight + (long long)(F + own) * I};
    float sums[2];
    dot_rows<2, 2>(x, rows, I, parts, sums);
    if (bias != nullptr) sums[0] += bias[own], sums[1] += bias[F + own];
    if (row < F && threadIdx.x % (32 * parts) == 0) narrow(FUNCTION(sums[0]) * sums[1], y + row);
}

#define ONE_TOKEN(X)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) one_##X(                                  \
        const X* x, const WEIGHT* weight, const float* bias, float* y, int I, int O,            \
        int parts) {                                                                            \
        one_token(x, weight, bias, y, I, O, parts);                                             \
    }

#define ONE_GATED(FUNCTION)                                                                     \
    extern "C" __global__ void __launch_bounds__(256) one_##FUNCTION(                           \
        const WEIGHT* x, const WEIGHT* weight, const float* bias, WEIGHT* y, int I, int F,      \
        int parts) {                                                                            \
        one_gated<FUNCTION>(x, weight, bias, y, I, F, parts);                                   \
    }

ONE_TOKEN(float)
ONE_TOKEN(held)
ONE_GATED(silu)
ONE_GATED(gelu_tanh)

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
