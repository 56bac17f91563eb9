// How codes of BITS bits are read, GROUP of which share a scale.
//
// A row is blocks of 64 bytes, of which a lane reads 16: eight words of 16 bits. Place i of word j
// of a block holds its input 32 i + j, so that the words have of each place eight inputs that
// follow one another, and two neighbours lie in a word of 32 bits as the units take them.
#ifdef BITS

constexpr int PLACES = 16 / BITS, BLOCK = 32 * PLACES;

// Places of a block that share a scale, its scales, and blocks that share one.
constexpr int RUN = GROUP < BLOCK ? GROUP / 32 : PLACES, SCALES = PLACES / RUN;
constexpr int SHARING = GROUP > BLOCK ? GROUP / BLOCK : 1;

// The scales of a block side by side in an integer, as in memory and as a lane has them.
template <int BYTES>
struct Integer;

template <>
struct Integer<2> {
    typedef unsigned short type;
};

template <>
struct Integer<4> {
    typedef unsigned type;
};

template <>
struct Integer<8> {
    typedef unsigned long long type;
};

typedef Integer<2 * SCALES>::type StoredScales;
typedef decltype(StoredScales() + 0u) BlockScales;

__device__ inline BlockScales block_scales(const f16* of_row, int block) {
    return *reinterpret_cast<const StoredScales*>(of_row + block / SHARING * SCALES);
}

__device__ inline float scale(BlockScales scales, int i) {
    return half_to_float((unsigned short)(scales >> 16 * i));
}

// As matrix units take them.
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

// Twice the number of WEIGHT, 1024 or 128, whose last bit stands for 1.
__device__ constexpr unsigned unit(f16) { return 0x64006400u; }
__device__ constexpr unsigned unit(bf16) { return 0x43004300u; }

constexpr unsigned UNIT = unit(WEIGHT()), MINUS = 0x80008000u;

__device__ inline unsigned sum2(unsigned a, unsigned b, f16) { return sum2_f16(a, b); }
__device__ inline unsigned sum2(unsigned a, unsigned b, bf16) { return sum2_bf16(a, b); }

// The codes of place i of two words as numbers of WEIGHT: exact, and without a conversion, as the
// bits of a code become the lowest of a number that the sum takes off again.
__device__ inline unsigned numbers(unsigned word, int i) {
    word >>= BITS * i;
#if BITS == 4
    constexpr unsigned zero = UNIT | 0x00080008u;
    return sum2(masked_xor(word, 0x000f000fu, zero), zero | MINUS, WEIGHT());
#else
    unsigned low = masked_xor(word, 0x007f007fu, UNIT);
    return sum2(low, masked_xor(word, 0x00800080u, UNIT | MINUS), WEIGHT());
#endif
}

__device__ inline uint4 numbers(uint4 words, int i) {
    return make_uint4(numbers(words.x, i), numbers(words.y, i), numbers(words.z, i),
                      numbers(words.w, i));
}

// A weight (O, I) as codes: rows of `blocks` blocks and their scales, so far apart; the first input
// is at place `offset`.
struct Coded {
    // The scales of a step; those of four steps are on four lanes.
    struct Scales {
        BlockScales above, below;
    };

    // The lane's two rows; a step is a block.
    struct Rows {
        const uint4 *above, *below;
        const f16 *above_scales, *below_scales;
        int I, steps, offset;

        __device__ bool is_whole(int step) const {
            return step * BLOCK >= offset && (step + 1) * BLOCK <= offset + I;
        }

        __device__ bool is_there(int) const { return true; }

        __device__ Scales scales(int step) const {
            int block = min(step + (int)threadIdx.x % 4, steps - 1);
            return {block_scales(above_scales, block), block_scales(below_scales, block)};
        }

        __device__ static Scales of_step(const Scales& four, int nth) {
            int lane = (int)threadIdx.x % 32 / 4 * 4 + nth;
            return {__shfl_sync(ALL_LANES, four.above, lane),
                    __shfl_sync(ALL_LANES, four.below, lane)};
        }

        // The products of codes that share a scale are added up before they are scaled.
        template <bool WHOLE, int TILES, class X>
        __device__ void multiply_by(const Tokens<TILES, X>& tokens, const Held& held,
                                    const Scales& scales, int step, float (*d)[4]) const {
            int column = step * BLOCK + (int)threadIdx.x % 4 * 8 - offset;
#pragma unroll
            for (int i = 0; i < SCALES; i++) {
                float sums[TILES][4];
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[n][j] = 0;
#pragma unroll
                for (int place = i * RUN; place < (i + 1) * RUN; place++)
                    multiply<WHOLE>(sums, numbers(held.above, place), numbers(held.below, place),
                                    tokens, column + 32 * place);
                float above = scale(scales.above, i), below = scale(scales.below, i);
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) d[n][j] += (j < 2 ? above : below) * sums[n][j];
            }
        }
    };

    const uint4* words;
    const f16* scales;
    int word_stride, scale_stride, blocks, offset, I;

    __device__ Rows rows(int above, int below) const {
        return {words + (long long)above * word_stride,   words + (long long)below * word_stride,
                scales + (long long)above * scale_stride, scales + (long long)below * scale_stride,
                I, blocks, offset};
    }

    __device__ int steps() const { return blocks; }
};

#endif

#endif
