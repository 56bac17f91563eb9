// Largest value, target's value and sum of exponentials of every row, in one pass: a block has a
// slice of a row, and the last block of the row to end merges all. `places` has every row's target,
// as a column, then a ticket, 0 before.

// Reduce over the threads of a block, on each of them.
template <bool IS_SUM>
__device__ double block_reduced(double x) {
    __shared__ double partial[32];
    int warps = (int)blockDim.x / 32;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        double other = __shfl_xor_sync(ALL_LANES, x, step);
        x = IS_SUM ? x + other : fmax(x, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    double result = partial[0];
    for (int i = 1; i < warps; i++) result = IS_SUM ? result + partial[i] : fmax(result, partial[i]);
    return result;
}

// What exponentials are taken below: a slice of nothing but -inf adds nothing.
__device__ inline double base_of(double largest) { return largest == minus_infinity() ? 0 : largest; }

extern "C" __global__ void softmax_parts(const float* x, int* places, double* parts, double* result,
                                         long long stride, int n, int span) {
    __shared__ int ticket;
    int row = (int)blockIdx.y, slices = (int)gridDim.x, t = (int)threadIdx.x;
    int first = (int)blockIdx.x * span, last = min(first + span, n);
    x += row * stride;
    parts += (long long)row * slices * 2;

    // Find the largest, then sum; the slice is read again from the cache. NaN is in the sum.
    double largest = minus_infinity(), sum = 0;
    for (int i = first + t; i < last; i += (int)blockDim.x) largest = fmax(largest, (double)x[i]);
    largest = block_reduced<false>(largest);
    for (int i = first + t; i < last; i += (int)blockDim.x) sum += exp(x[i] - base_of(largest));
    sum = block_reduced<true>(sum);

    // Leave the slice's to the last block of the row.
    if (t == 0) {
        parts[2 * blockIdx.x] = largest, parts[2 * blockIdx.x + 1] = sum;
        __threadfence();
        ticket = atomicAdd(places + gridDim.y + row, 1);
    }
    __syncthreads();
    if (ticket != slices - 1) return;
    __threadfence();

    // Merge.
    largest = minus_infinity(), sum = 0;
    for (int i = t; i < slices; i += (int)blockDim.x) largest = fmax(largest, parts[2 * i]);
    largest = block_reduced<false>(largest);
    for (int i = t; i < slices; i += (int)blockDim.x)
        sum += parts[2 * i + 1] * exp(parts[2 * i] - base_of(largest));
    sum = block_reduced<true>(sum);
    if (t == 0) {
        int target = places[row];
        result[3 * row] = largest, result[3 * row + 2] = sum;
        result[3 * row + 1] = target < 0 ? minus_infinity() : x[target];
    }
}
