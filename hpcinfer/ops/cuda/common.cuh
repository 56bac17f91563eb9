// What every source of this folder has before it: 16-bit values, loads of eight, sums over threads.
// No header is included, so that a machine needs none to compile it.

#ifdef __CUDACC__

__device__ inline float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ inline unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// A product of matrix units, which a warp makes together: d (16, 8) += a (16, 16) · b (16, 8).
// Lane 4 i + j has of a the rows i and i + 8, in pairs of columns 2 j, 2 j + 1 and 2 j + 8, 2 j + 9;
// of b the same of column i, its rows in place of columns; of d columns 2 j, 2 j + 1 of both rows.
#define MATRIX_PRODUCT(NAME, TYPE)                                                              \
    __device__ inline void NAME(float* d, const unsigned* a, const unsigned* b) {               \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                      \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
    }

// (x & mask) ^ bits, in one instruction even where both are constants.
__device__ inline unsigned masked_xor(unsigned x, unsigned mask, unsigned bits) {
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// Two sums of 16-bit values side by side.
#define SUM2(NAME, INSTRUCTION)                                                                 \
    __device__ inline unsigned NAME(unsigned a, unsigned b) {                                   \
        unsigned sum;                                                                           \
        asm(INSTRUCTION : "=r"(sum) : "r"(a), "r"(b));                                          \
        return sum;                                                                             \
    }

#if __CUDA_ARCH__ >= 800
MATRIX_PRODUCT(mma_f16, "f16")
MATRIX_PRODUCT(mma_bf16, "bf16")
SUM2(sum2_f16, "add.f16x2 %0, %1, %2;")
SUM2(sum2_bf16, "{.reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 %0, %1, one, %2;}")

// Four matrices (8, 8) of 16 bits in shared memory, which a warp loads together. Lane 8 i + j says
// where row j of matrix i is, and has of each the columns 2 (lane % 4) and one more of row lane / 4;
// of the transpose in the second form.
#define LOAD_MATRICES(NAME, WAY)                                                                \
    __device__ inline void NAME(unsigned* x, const void* row) {                                 \
        unsigned at = (unsigned)__cvta_generic_to_shared(row);                                  \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" WAY ".shared.b16 {%0,%1,%2,%3}, [%4];"     \
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])                           \
                     : "r"(at));                                                                \
    }

LOAD_MATRICES(load_matrices, "")
LOAD_MATRICES(load_transposed, ".trans")

// Copies of 16 bytes to shared memory that go on behind the thread's back, zeros if the source is
// not there. They are committed in groups; a wait leaves the last PENDING groups under way.
__device__ inline void copy16(void* to, const void* from, bool there) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
#endif

// 2^x, a unit in the last place or two off; 0 below the normal numbers.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Adds x and returns what was there before. All that the block has written before it met is seen by a
// block that adds later.
__device__ inline int add_in_order(int* to, int x) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

// Have 128 bytes brought to the L2 cache, where a later load finds them as they are then.
__device__ inline void read_ahead(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(from));
}

// Shared memory whose size the launch says.
extern __shared__ uint4 dynamic_shared[];

#endif

// Kernels of a captured step may begin while the one before still runs (`launch.launch`, `early`):
// what they read of others, and all that they write, comes behind this wait.
__device__ inline void wait_for_others() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Values of 16 bits, as they lie in memory.
struct f16 {
    unsigned short bits;
};

struct bf16 {
    unsigned short bits;
};

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800
// A product of matrix units (above) of values of the type of the last argument.
__device__ inline void matrix_product(float* d, const unsigned* a, const unsigned* b, f16) {
    mma_f16(d, a, b);
}

__device__ inline void matrix_product(float* d, const unsigned* a, const unsigned* b, bf16) {
    mma_bf16(d, a, b);
}
#endif

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// x rounded to the type of the second argument, nearest even.
__device__ inline float rounded(float x, float) { return x; }

__device__ inline float rounded(float x, f16) { return half_to_float(float_to_half(x)); }

__device__ inline float rounded(float x, bf16) {
    unsigned bits = __float_as_uint(x);
    bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
    bits = is_number ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    return __uint_as_float(bits & 0xffff0000u);
}

// Write x, rounded to the type at hand.
__device__ inline void narrow(float x, float* to) { *to = x; }

__device__ inline void narrow(float x, f16* to) { to->bits = float_to_half(x); }

__device__ inline void narrow(float x, bf16* to) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    to->bits = (unsigned short)(__float_as_uint(rounded(x, bf16())) >> 16);
#endif
}

// Two values rounded to a type of 16 bits, side by side.
template <class V>
__device__ inline unsigned pack2(float low, float high) {
    V a, b;
    narrow(low, &a), narrow(high, &b);
    return a.bits | (unsigned)b.bits << 16;
}

#if __CUDA_ARCH__ >= 800
#define PACK(NAME, TYPE)                                                                        \
    template <>                                                                                 \
    __device__ inline unsigned pack2<NAME>(float low, float high) {                             \
        unsigned word;                                                                          \
        asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));            \
        return word;                                                                            \
    }

PACK(f16, "f16")
PACK(bf16, "bf16")
#endif

// Eight values as they lie in memory, at a multiple of 16 bytes.
template <class V>
struct Eight {
    uint4 words[sizeof(V) / 2];
};

template <class V>
__device__ inline Eight<V> load8(const V* from) {
    Eight<V> x;
#pragma unroll
    for (int i = 0; i < (int)sizeof(V) / 2; i++)
        x.words[i] = reinterpret_cast<const uint4*>(from)[i];
    return x;
}

template <class V>
__device__ inline Eight<V> zero8() {
    Eight<V> x;
#pragma unroll
    for (int i = 0; i < (int)sizeof(V) / 2; i++) x.words[i] = make_uint4(0, 0, 0, 0);
    return x;
}

__device__ inline void unpack2(unsigned word, float* y, f16) {
    y[0] = half_to_float((unsigned short)(word & 0xffffu));
    y[1] = half_to_float((unsigned short)(word >> 16));
}

__device__ inline void unpack2(unsigned word, float* y, bf16) {
    y[0] = __uint_as_float(word << 16);
    y[1] = __uint_as_float(word & 0xffff0000u);
}

// The eight values in float32.
template <class V>
__device__ inline void unpack(const Eight<V>& x, float* y) {
    unpack2(x.words[0].x, y, V());
    unpack2(x.words[0].y, y + 2, V());
    unpack2(x.words[0].z, y + 4, V());
    unpack2(x.words[0].w, y + 6, V());
}

__device__ inline void unpack(const Eight<float>& x, float* y) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        y[4 * i] = __uint_as_float(x.words[i].x);
        y[4 * i + 1] = __uint_as_float(x.words[i].y);
        y[4 * i + 2] = __uint_as_float(x.words[i].z);
        y[4 * i + 3] = __uint_as_float(x.words[i].w);
    }
}

// N values that follow one another, 4 of them at a multiple of 16 bytes.
template <int N>
struct Run {
    float x[N];
};

__device__ inline void load(const float* from, Run<1>& y) { y.x[0] = from[0]; }

__device__ inline void load(const float* from, Run<4>& y) {
    float4 x = *reinterpret_cast<const float4*>(from);
    y.x[0] = x.x, y.x[1] = x.y, y.x[2] = x.z, y.x[3] = x.w;
}

template <class V>
__device__ inline void store(V* to, const Run<1>& y) {
    narrow(y.x[0], to);
}

__device__ inline void store(float* to, const Run<4>& y) {
    *reinterpret_cast<float4*>(to) = make_float4(y.x[0], y.x[1], y.x[2], y.x[3]);
}

template <class V>
__device__ inline void store(V* to, const Run<4>& y) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<V>(y.x[0], y.x[1]), pack2<V>(y.x[2], y.x[3]));
}

__device__ inline void store(float* to, const Run<8>& y) {
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4*>(to + i) =
            make_float4(y.x[i], y.x[i + 1], y.x[i + 2], y.x[i + 3]);
}

template <class V>
__device__ inline void store(V* to, const Run<8>& y) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack2<V>(y.x[0], y.x[1]), pack2<V>(y.x[2], y.x[3]),
                   pack2<V>(y.x[4], y.x[5]), pack2<V>(y.x[6], y.x[7]));
}

// Non-linearities of an FFN's gate.
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ inline float gelu_tanh(float x) {
    float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// Sum over groups of WIDTH lanes that follow one another, on each of them.
template <int WIDTH>
__device__ inline float lanes_sum(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline float lanes_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Sum over the threads of a block, on each of them; `partial` is room for one value a warp.
__device__ inline float block_sum(float x, float* partial) {
    x = lanes_sum<32>(x);
    int warps = (int)blockDim.x / 32;
    if (warps == 1) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < warps; i++) sum += partial[i];
    return sum;
}

// True in the block that comes last of so many; all that the others have written can then be read.
__device__ inline bool is_last(int* arrived, int blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = add_in_order(arrived, 1) == blocks - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    return last;
}

// Weights of up to MOST splits of a row's keys, by the rule of `hpcinfer.ops.attention.merge`, and the
// log-sum-exp of all, from those of the splits, which lie at one distance. A warp does it.
template <int MOST>
__device__ inline float weigh_splits(const float* lse, long long distance, int splits,
                                     float* weights) {
    float of_lane[MOST / 32], largest = minus_infinity(), total = 0;
    int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < MOST / 32; j++) {
        int s = lane + 32 * j;
        of_lane[j] = s < splits ? lse[s * distance] : minus_infinity();
        largest = fmaxf(largest, of_lane[j]);
    }
    largest = lanes_max(largest);
    bool empty = largest == minus_infinity();
#pragma unroll
    for (int j = 0; j < MOST / 32; j++) {
        of_lane[j] = empty ? 0.0f : expf(of_lane[j] - largest);
        total += of_lane[j];
    }
    total = lanes_sum<32>(total);
#pragma unroll
    for (int j = 0; j < MOST / 32; j++)
        weights[lane + 32 * j] = empty ? 0.0f : of_lane[j] / total;
    return empty ? largest : largest + logf(total);
}
