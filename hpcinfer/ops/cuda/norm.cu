// Norms over the last axis, one block for a row, rounded to the type TO. Rows lie `inner` to a group,
// with a stride within the group and one between groups, so that heads within wider tokens need no
// copy. Where there is a `sum`, its rows, end to end, are first added to those of x, in its memory.

// Values of a thread, all of which it keeps: runs of N, at most so many.
constexpr int RUNS = 4;

// A row's values (of x, or of the sum that x is added to): run i of this thread begins at column
// (threads · i + thread) · N, and is zero behind the end.
template <int N>
__device__ inline void take_up(const float* x, float* sum, int D, Run<N>* values) {
    Run<N> more;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        int column = ((int)blockDim.x * i + (int)threadIdx.x) * N;
#pragma unroll
        for (int j = 0; j < N; j++) values[i].x[j] = 0;
        if (column >= D) continue;
        load(x + column, values[i]);
        if (sum == nullptr) continue;
        load(sum + column, more);
#pragma unroll
        for (int j = 0; j < N; j++) values[i].x[j] += more.x[j];
        store(sum + column, values[i]);
    }
}

// y = (values - mean) · inverse · weight + bias.
template <int N>
__device__ inline void write(const Run<N>* values, float mean, float inverse, const float* weight,
                             const float* bias, TO* y, int D) {
    Run<N> factor, shift, result;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        int column = ((int)blockDim.x * i + (int)threadIdx.x) * N;
        if (column >= D) continue;
        load(weight + column, factor);
#pragma unroll
        for (int j = 0; j < N; j++)
            result.x[j] = (values[i].x[j] - mean) * inverse * factor.x[j];
        if (bias != nullptr) {
            load(bias + column, shift);
#pragma unroll
            for (int j = 0; j < N; j++) result.x[j] += shift.x[j];
        }
        store(y + column, result);
    }
}

template <int N>
__device__ void rms_norm(const float* x, float* sum, const float* weight, TO* y, int D,
                         float eps) {
    __shared__ float partial[32];
    Run<N> values[RUNS];
    take_up<N>(x, sum, D, values);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < RUNS; i++)
#pragma unroll
        for (int j = 0; j < N; j++) squares += values[i].x[j] * values[i].x[j];
    float inverse = 1.0f / sqrtf(block_sum(squares, partial) / D + eps);
    write<N>(values, 0.0f, inverse, weight, nullptr, y, D);
}

template <int N>
__device__ void layer_norm(const float* x, float* sum, const float* weight, const float* bias,
                           TO* y, int D, float eps) {
    __shared__ float partial[32];
    Run<N> values[RUNS];
    take_up<N>(x, sum, D, values);

    // The mean first: a difference of two large sums would be inexact.
    float total = 0;
#pragma unroll
    for (int i = 0; i < RUNS; i++)
#pragma unroll
        for (int j = 0; j < N; j++) total += values[i].x[j];
    float mean = block_sum(total, partial) / D;

    // The variance from centred values.
    float squares = 0;
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        int column = ((int)blockDim.x * i + (int)threadIdx.x) * N;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float centred = values[i].x[j] - mean;
            squares += column < D ? centred * centred : 0.0f;
        }
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, partial) / D + eps);
    write<N>(values, mean, inverse, weight, bias, y, D);
}

// What a block's row is of.
#define ROW                                                                                     \
    int row = (int)blockIdx.x;                                                                  \
    x += (row / inner) * outer_stride + (row % inner) * inner_stride;                           \
    y += (long long)row * D;                                                                    \
    if (sum != nullptr) sum += (long long)row * D;

#define KERNELS(N)                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) rms_norm_##N(                            \
        const float* x, float* sum, const float* weight, TO* y, int D, int inner,               \
        long long outer_stride, long long inner_stride, float eps) {                            \
        ROW rms_norm<N>(x, sum, weight, y, D, eps);                                             \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(1024) layer_norm_##N(                          \
        const float* x, float* sum, const float* weight, const float* bias, TO* y, int D,       \
        int inner, long long outer_stride, long long inner_stride, float eps) {                 \
        ROW layer_norm<N>(x, sum, weight, bias, y, D, eps);                                     \
    }

KERNELS(1)
KERNELS(4)
