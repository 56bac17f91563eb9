// Rotary embedding: a thread rotates one pair of columns of a head, or copies one column behind them.

extern "C" __global__ void rotate(const float* x, const float* cos, const float* sin, float* y,
                                  int items, int H, int K, int half, long long token_stride,
                                  long long head_stride) {
    int item = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (item >= items) return;
    int per_head = K - half, column = item % per_head, row = item / per_head, token = row / H;
    x += token * token_stride + (row % H) * head_stride;
    y += (long long)row * K;
    if (column < half) {
        float c = cos[token * half + column], s = sin[token * half + column];
        float first = x[column], second = x[column + half];
        y[column] = first * c - second * s;
        y[column + half] = second * c + first * s;
    } else {
        y[column + half] = x[column + half];
    }
}
