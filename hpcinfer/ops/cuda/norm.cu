// Norms over the last axis, one block for a row, rounded to the type TO. Rows lie `inner` to a group,
// with a stride within the group and one between groups, so that heads within wider tokens need no
// copy. Where there is a `sum`, its rows, end to end, are first added to those of x, in its memory.

// sum += x, a row; returns the sum, of which every thread will read what it has written.
template <int N>
__device__ inline const float* added(const float* x, float* sum, int D) {
    Run<N> value, more;
    for (int i = (int)threadIdx.x * N; i < D; i += (int)blockDim.x * N) {
        load(x + i, value), load(sum + i, more);
#pragma unroll
        for (int j = 0; j < N; j++) more.x[j] += value.x[j];
        store(sum + i, more);
    }
    return sum;
}

template <int N>
__device__ void rms_norm(const float* x, float* sum, const float* weight, TO* y, int D,
                         int inner, long long outer_stride, long long inner_stride, float eps) {
    __shared__ float partial[32];
    int row = (int)blockIdx.x;
    x += (row / inner) * outer_stride + (row % inner) * inner_stride;
    y += (long long)row * D;
    if (sum != nullptr) x = added<N>(x, sum + (long long)row * D, D);
    int first = (int)threadIdx.x * N, step = (int)blockDim.x * N;

    // Add up the squares.
    float squares = 0;
    Run<N> value, factor;
    for (int i = first; i < D; i += step) {
        load(x + i, value);
#pragma unroll
        for (int j = 0; j < N; j++) squares += value.x[j] * value.x[j];
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, partial) / D + eps);

    // Scale; the row is read again from the cache.
    for (int i = first; i < D; i += step) {
        load(x + i, value);
        load(weight + i, factor);
#pragma unroll
        for (int j = 0; j < N; j++) value.x[j] = value.x[j] * inverse * factor.x[j];
        store(y + i, value);
    }
}

template <int N>
__device__ void layer_norm(const float* x, float* sum, const float* weight, const float* bias,
                           TO* y, int D, int inner, long long outer_stride, long long inner_stride,
                           float eps) {
    __shared__ float partial[32];
    int row = (int)blockIdx.x;
    x += (row / inner) * outer_stride + (row % inner) * inner_stride;
    y += (long long)row * D;
    if (sum != nullptr) x = added<N>(x, sum + (long long)row * D, D);
    int first = (int)threadIdx.x * N, step = (int)blockDim.x * N;

    // The mean first: a difference of two large sums would be inexact.
    float total = 0;
    Run<N> value, factor, shift;
    for (int i = first; i < D; i += step) {
        load(x + i, value);
#pragma unroll
        for (int j = 0; j < N; j++) total += value.x[j];
    }
    float mean = block_sum(total, partial) / D;

    // The variance from centred values.
    float squares = 0;
    for (int i = first; i < D; i += step) {
        load(x + i, value);
#pragma unroll
        for (int j = 0; j < N; j++) squares += (value.x[j] - mean) * (value.x[j] - mean);
    }
    float inverse = 1.0f / sqrtf(block_sum(squares, partial) / D + eps);

    // Scale and shift.
    for (int i = first; i < D; i += step) {
        load(x + i, value);
        load(weight + i, factor);
#pragma unroll
        for (int j = 0; j < N; j++) value.x[j] = (value.x[j] - mean) * inverse * factor.x[j];
        if (bias != nullptr) {
            load(bias + i, shift);
#pragma unroll
            for (int j = 0; j < N; j++) value.x[j] += shift.x[j];
        }
        store(y + i, value);
    }
}

#define KERNELS(N)                                                                              \
    extern "C" __global__ void rms_norm_##N(                                                    \
        const float* x, float* sum, const float* weight, TO* y, int D, int inner,               \
        long long outer_stride, long long inner_stride, float eps) {                            \
        rms_norm<N>(x, sum, weight, y, D, inner, outer_stride, inner_stride, eps);              \
    }                                                                                           \
    extern "C" __global__ void layer_norm_##N(                                                  \
        const float* x, float* sum, const float* weight, const float* bias, TO* y, int D,       \
        int inner, long long outer_stride, long long inner_stride, float eps) {                 \
        layer_norm<N>(x, sum, weight, bias, y, D, inner, outer_stride, inner_stride, eps);      \
    }

KERNELS(1)
KERNELS(4)
