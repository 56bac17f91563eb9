// Runs a CUDA source on the host: the threads of a block take turns, and wait for one another where
// they meet. `run_NAME` starts a kernel, `signature_NAME` says what its arguments are.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static std::vector<char> ended;
static std::vector<Meeting> warps;
static Meeting block;
static float exchange[1024];
static int current;
static bool progress;

static void meet(Meeting& meeting) {
    int number = meeting.number;
    if (++meeting.waiting == meeting.size) {
        meeting.waiting = 0, meeting.number++, progress = true;
    } else {
        while (meeting.number == number) swapcontext(&threads[current], &scheduler);
    }
}

static void __syncthreads() { meet(block); }

static void __syncwarp() { meet(warps[current / 32]); }

static int add_in_order(int* to, int x) {
    int before = *to;
    *to += x;
    return before;
}

static float __shfl_xor_sync(unsigned, float x, int step) {
    exchange[current] = x;
    meet(warps[current / 32]);
    float y = exchange[current ^ step];
    meet(warps[current / 32]);
    return y;
}

static float __shfl_sync(unsigned, float x, int from) {
    exchange[current] = x;
    meet(warps[current / 32]);
    float y = exchange[current / 32 * 32 + from % 32];
    meet(warps[current / 32]);
    return y;
}

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
    body(arguments);
    ended[current] = 1, progress = true;
}

static int run(const unsigned* grid, int n) {
    static std::vector<std::vector<char>> stacks;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {(unsigned)n, 1, 1};
    while ((int)stacks.size() < n) stacks.emplace_back(256 << 10);
    threads.resize(n);
    for (unsigned i = 0; i < grid[0] * grid[1] * grid[2]; i++) {
        blockIdx = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
        ended.assign(n, 0), warps.assign(n / 32, {32, 0, 0}), block = {n, 0, 0};
        copies.assign(n, std::vector<std::vector<Copy>>(1));
        for (int t = 0; t < n; t++) {
            getcontext(&threads[t]);
            threads[t].uc_stack.ss_sp = stacks[t].data();
            threads[t].uc_stack.ss_size = stacks[t].size();
            threads[t].uc_link = &scheduler;
            makecontext(&threads[t], one_thread, 0);
        }
        for (int left = n; left > 0;) {
            left = 0, progress = false;
            for (current = 0; current < n; current++) {
                if (ended[current]) continue;
                threadIdx = {(unsigned)current, 0, 0};
                swapcontext(&scheduler, &threads[current]);
                left += !ended[current];
            }
            if (left && !progress) return 1;  // some wait for others that never come
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
