// Products of few tokens with a weight that is kept as codes of BITS bits, which the device reads
// once, and its numbers in another type. GROUP inputs share a scale; WEIGHT is the type in which
// matrix units take codes and tokens.

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

#define CODED_PRODUCT(X, TILES)                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 4 - TILES) product_##X##_##TILES(         \
        const X* x, const uint4* words, const f16* scales, int word_stride, int scale_stride,   \
        int blocks, int offset, const float* bias, float* y, int T, int I, int O) {             \
        Coded weight = {words, scales, word_stride, scale_stride, blocks, offset, I};           \
        product<TILES>(weight, x, bias, y, T, I, O);                                            \
    }

#define GATED_CODED_PRODUCT(FUNCTION, TILES)                                                    \
    extern "C" __global__ void __launch_bounds__(256, 4 - TILES) FUNCTION##_product_##TILES(    \
        const WEIGHT* x, const uint4* words, const f16* scales, int word_stride,                \
        int scale_stride, int blocks, int offset, const float* bias, WEIGHT* y, int T, int I,   \
        int F, int y_stride) {                                                                  \
        Coded weight = {words, scales, word_stride, scale_stride, blocks, offset, I};           \
        gated_product<TILES, FUNCTION>(weight, x, bias, y, T, I, F, y_stride);                  \
    }

CODED_PRODUCT(float, 1)
CODED_PRODUCT(float, 2)
CODED_PRODUCT(held, 1)
CODED_PRODUCT(held, 2)
GATED_CODED_PRODUCT(silu, 1)
GATED_CODED_PRODUCT(silu, 2)
GATED_CODED_PRODUCT(gelu_tanh, 1)
GATED_CODED_PRODUCT(gelu_tanh, 2)

#endif

// y (O, places of a row) = code · scale, of type TO: a thread has 16 bytes of a row.
template <class TO>
__device__ void dequantize(const uint4* words, const f16* scales, int word_stride,
                           int scale_stride, int blocks, TO* y, int O) {
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long row = item / (4 * blocks);
    if (row >= O) return;
    int block = (int)(item % (4 * blocks)) / 4;
    uint4 held = words[row * word_stride + item % (4 * blocks)];
    BlockScales of_block = block_scales(scales + row * scale_stride, block);
    unsigned pairs[4] = {held.x, held.y, held.z, held.w};
    TO* to = y + (row * blocks + block) * BLOCK + item % 4 * 8;
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
        float factor = scale(of_block, i / RUN);
        Run<8> numbers;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            unsigned at_the_top = pairs[j / 2] << (32 - BITS - (j % 2 * 16 + BITS * i));
            numbers.x[j] = (float)((int)at_the_top >> (32 - BITS)) * factor;
        }
        store(to + 32 * i, numbers);
    }
}

#define DEQUANTIZE(NAME, TO)                                                                    \
    extern "C" __global__ void dequantize_##NAME(const uint4* words, const f16* scales,         \
                                                 int word_stride, int scale_stride, int blocks, \
                                                 TO* y, int O) {                                \
        dequantize(words, scales, word_stride, scale_stride, blocks, y, O);                     \
    }

DEQUANTIZE(float, float)
DEQUANTIZE(held, WEIGHT)
