// Runs a CUDA source on the host: the threads of a block take turns, and wait for one another where
// they meet. `run_NAME` starts a kernel, `signature_NAME` says what its arguments are.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;

// Shared memory whose size the launch says: as much as any device has.
static uint4 dynamic_shared[(227 << 10) / 16];

static int min(int a, int b) { return a < b ? a : b; }

static int max(int a, int b) { return a > b ? a : b; }

static float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float half_to_float(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? ldexpf((float)fraction, -24)
                                 : ldexpf((float)(fraction + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}

static unsigned short float_to_half(float x) {
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
    if (std::isnan(x)) return (unsigned short)(sign | 0x7e00u);
    float size = fabsf(x);
    int exponent = size < ldexpf(1, -14) ? -14 : ilogbf(size);

    // Rounds to nearest even; a carry runs into the exponent as it should.
    unsigned steps = (unsigned)nearbyintf(ldexpf(size, 10 - (exponent > 16 ? 16 : exponent)));
    if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00u);
    return (unsigned short)(sign | (steps + ((unsigned)(exponent + 14) << 10)));
}

// Threads that meet: the last to come lets all go on.
struct Meeting {
    int size, waiting, number;
};

// Threads keep their stacks, and are switched without a system call once they have begun.
struct Thread {
    jmp_buf at;
    ucontext_t beginning;
    char stack[256 << 10];
    bool begun = false;
};

static jmp_buf scheduler;
static std::vector<std::unique_ptr<Thread>> threads;
static std::vector<char> ended;
static std::vector<Meeting> warps;
static Meeting block;
static float exchange[1024];
static int current;
static bool progress;

static void leave() {
    if (!_setjmp(threads[current]->at)) _longjmp(scheduler, 1);
}

static void meet(Meeting& meeting) {
    int number = meeting.number;
    if (++meeting.waiting == meeting.size) {
        meeting.waiting = 0, meeting.number++, progress = true;
    } else {
        while (meeting.number == number) leave();
    }
}

static void __syncthreads() { meet(block); }

static void __syncwarp() { meet(warps[current / 32]); }

static void __threadfence() {}

template <class V>
static V atomicAdd(V* to, V x) {
    V before = *to;
    *to += x;
    return before;
}

static int add_in_order(int* to, int x) { return atomicAdd(to, x); }

template <class V>
static V __shfl_xor_sync(unsigned, V x, int step) {
    static V given[1024];
    given[current] = x;
    meet(warps[current / 32]);
    V y = given[current ^ step];
    meet(warps[current / 32]);
    return y;
}

template <class V>
static V __shfl_sync(unsigned, V x, int lane) {
    static V given[1024];
    given[current] = x;
    meet(warps[current / 32]);
    V y = given[current / 32 * 32 + lane];
    meet(warps[current / 32]);
    return y;
}

static unsigned __ballot_sync(unsigned, bool truth) {
    exchange[current] = truth;
    meet(warps[current / 32]);
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++)
        all |= (unsigned)(exchange[current / 32 * 32 + lane] != 0) << lane;
    meet(warps[current / 32]);
    return all;
}

static int __popc(unsigned bits) { return __builtin_popcount(bits); }

static int __any_sync(unsigned, bool truth) {
    exchange[current] = truth;
    meet(warps[current / 32]);
    bool any = false;
    for (int lane = 0; lane < 32; lane++) any = any || exchange[current / 32 * 32 + lane];
    meet(warps[current / 32]);
    return any;
}

static float fast_exp2(float x) { return exp2f(x); }

static void read_ahead(const void*) {}

// Copies under way: those of even blocks land at once, those of odd ones when they are waited for.
struct Copy {
    void* to;
    const void* from;
};

static std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, in groups

static void land(const Copy& copy) {
    if (copy.from) {
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}

static void copy16(void* to, const void* from, bool there) {
    Copy copy = {to, there ? from : nullptr};
    if ((blockIdx.x + blockIdx.y + blockIdx.z) % 2 == 0) return land(copy);
    copies[current].back().push_back(copy);
}

static void commit_copies() { copies[current].emplace_back(); }

template <int PENDING>
static void wait_copies() {
    auto& groups = copies[current];
    int landing = (int)groups.size() - 1 - PENDING;
    for (int i = 0; i < landing; i++)
        for (const Copy& copy : groups[i]) land(copy);
    if (landing > 0) groups.erase(groups.begin(), groups.begin() + landing);
}

static unsigned masked_xor(unsigned x, unsigned mask, unsigned bits) { return (x & mask) ^ bits; }

static unsigned sum2_f16(unsigned a, unsigned b) {
    auto sum = [](unsigned a, unsigned b) {
        return (unsigned)float_to_half(half_to_float((unsigned short)a) +
                                       half_to_float((unsigned short)b));
    };
    return sum(a, b) | sum(a >> 16, b >> 16) << 16;
}

// Of values whose sum needs no rounding.
static unsigned sum2_bf16(unsigned a, unsigned b) {
    auto sum = [](unsigned a, unsigned b) {
        return __float_as_uint(__uint_as_float(a << 16) + __uint_as_float(b << 16)) >> 16;
    };
    return sum(a, b) | sum(a >> 16, b >> 16) << 16;
}

// Where the rows are that the lanes of a warp show one another.
static const unsigned short* rows_shown[1024];

// x[i] = the columns 2 (lane % 4) and one more of row lane / 4 of matrix i, or of its transpose.
static void matrices(unsigned* x, const void* row, bool transposed) {
    rows_shown[current] = static_cast<const unsigned short*>(row);
    meet(warps[current / 32]);
    int lane = current % 32, down = lane / 4, right = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
        auto rows = rows_shown + current / 32 * 32 + 8 * i;
        unsigned low = transposed ? rows[right][down] : rows[down][right];
        unsigned high = transposed ? rows[right + 1][down] : rows[down][right + 1];
        x[i] = low | high << 16;
    }
    meet(warps[current / 32]);
}

static void load_matrices(unsigned* x, const void* row) { matrices(x, row, false); }

static void load_transposed(unsigned* x, const void* row) { matrices(x, row, true); }

// Words that the lanes of a warp show one another.
static unsigned shown[1024][6];

// d += a · b as a warp's matrix units make it; `number` reads a 16-bit value.
template <class F>
static void matrix_product(float* d, const unsigned* a, const unsigned* b, F number) {
    memcpy(shown[current], a, 16), memcpy(shown[current] + 4, b, 8);
    meet(warps[current / 32]);
    const unsigned(*lanes)[6] = shown + current / 32 * 32;
    auto half = [&](int lane, int word, int k) {
        return number((unsigned short)(lanes[lane][word] >> 16 * (k & 1)));
    };
    int row = current % 32 / 4, column = current % 4 * 2;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            int lane = k % 8 / 2, word = k / 8;
            float left = half(row * 4 + lane, 2 * word + i / 2, k);
            d[i] += left * half((column + i % 2) * 4 + lane, 4 + word, k);
        }
    meet(warps[current / 32]);
}

static void mma_f16(float* d, const unsigned* a, const unsigned* b) {
    static std::vector<float> known;
    for (int x = (int)known.size(); x < 1 << 16; x++) known.push_back(half_to_float(x));
    matrix_product(d, a, b, [](unsigned short x) { return known[x]; });
}

static void mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    matrix_product(d, a, b, [](unsigned short x) { return __uint_as_float((unsigned)x << 16); });
}

// Kernels with the arguments that `a` points to.
template <class... P, size_t... I>
static void call(void (*kernel)(P...), void** a, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(a[I])...);
}

template <class... P>
static void call(void (*kernel)(P...), void** a) {
    call(kernel, a, std::index_sequence_for<P...>());
}

static char letter(const void*) { return 'p'; }
static char letter(int) { return 'i'; }
static char letter(long long) { return 'l'; }
static char letter(float) { return 'f'; }

template <class... P>
static void signature(void (*)(P...), char* text) {
    char letters[] = {letter(P())..., 0};
    strcpy(text, letters);
}

static void (*body)(void**);
static void** arguments;

static void one_thread() {
    for (;;) {
        body(arguments);
        ended[current] = 1, progress = true;
        leave();
    }
}

static void enter(int t) {
    current = t, threadIdx = {(unsigned)t, 0, 0};
    if (_setjmp(scheduler)) return;
    Thread& thread = *threads[t];
    if (thread.begun) _longjmp(thread.at, 1);
    thread.begun = true;
    getcontext(&thread.beginning);
    thread.beginning.uc_stack.ss_sp = thread.stack;
    thread.beginning.uc_stack.ss_size = sizeof thread.stack;
    makecontext(&thread.beginning, one_thread, 0);
    setcontext(&thread.beginning);
}

// Where the threads of a block are taken: upwards, downwards or shuffled, by SHIM_ORDER 0, 1 or 2.
static std::vector<int> order_of(int n) {
    const char* text = getenv("SHIM_ORDER");
    int kind = text ? atoi(text) : 0;
    std::vector<int> order(n);
    for (int t = 0; t < n; t++) order[t] = kind == 1 ? n - 1 - t : t;
    for (int t = n - 1; kind > 1 && t > 0; t--) std::swap(order[t], order[rand() % (t + 1)]);
    return order;
}

static int run(const unsigned* grid, int n) {
    std::vector<int> order = order_of(n);
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {(unsigned)n, 1, 1};
    while ((int)threads.size() < n) threads.emplace_back(new Thread);
    for (size_t i = 0; i < (size_t)grid[0] * grid[1] * grid[2]; i++) {
        size_t row = i / grid[0];
        blockIdx = {(unsigned)(i % grid[0]), (unsigned)(row % grid[1]), (unsigned)(row / grid[1])};
        ended.assign(n, 0), warps.assign((n + 31) / 32, {32, 0, 0}), block = {n, 0, 0};
        copies.assign(n, std::vector<std::vector<Copy>>(1));
        for (int left = n; left > 0;) {
            left = 0, progress = false;
            for (int t : order) {
                if (ended[t]) continue;
                enter(t);
                left += !ended[t];
            }
            if (left && !progress) return threads.clear(), 1;  // some wait for ever
        }
    }
    return 0;
}

#define RUN(NAME)                                                                           \
    extern "C" int run_##NAME(const unsigned* grid, int n, void** a) {                      \
        body = [](void** a) { call(NAME, a); }, arguments = a;                              \
        return run(grid, n);                                                                \
    }                                                                                       \
    extern "C" void signature_##NAME(char* text) { signature(NAME, text); }

// Arithmetic that is not to be fused.
static float __fmul_rn(float x, float y) { return x * y; }

static float __fsub_rn(float x, float y) { return x - y; }

static int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

static int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }

static double __longlong_as_double(long long bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

static long long __double_as_longlong(double x) {
    long long bits;
    memcpy(&bits, &x, 8);
    return bits;
}
