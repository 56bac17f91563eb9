// function(gate) · up: a thread computes N columns of a token, of type TO.

#define GATED(FUNCTION, N)                                                                      \
    extern "C" __global__ void gated_##FUNCTION##_##N(const float* gate, const float* up,       \
                                                      TO* y, int T, int width,                  \
                                                      long long row_stride, int y_stride) {     \
        int per_row = width / N;                                                                \
        long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;                      \
        if (item >= (long long)T * per_row) return;                                             \
        long long row = item / per_row;                                                         \
        int column = (int)(item % per_row) * N;                                                 \
        Run<N> g, u;                                                                            \
        load(gate + row * row_stride + column, g);                                              \
        load(up + row * row_stride + column, u);                                                \
        _Pragma("unroll") for (int j = 0; j < N; j++) u.x[j] *= FUNCTION(g.x[j]);               \
        store(y + row * y_stride + column, u);                                                  \
    }

GATED(silu, 1)
GATED(silu, 4)
GATED(gelu_tanh, 1)
GATED(gelu_tanh, 4)
