// Products of the experts of a mixture with a few tokens each, the number of which only the device
// knows. Their weights are of 16 bits or, where BITS is defined, codes; WEIGHT is the type that
// matrix units take.
//
// Choice c is number c % k of token c / k; a row of h (choices, F) and of z (choices, D) belongs to
// a choice.
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

// The matrices of all experts, and what a kernel is given for them.
#ifdef BITS

struct Experts {
    Coded first;
    long long words, scales;  // of an expert

    __device__ Coded operator[](int e) const {
        Coded own = first;
        own.words += e * words, own.scales += e * scales;
        return own;
    }
};

#define EXPERTS                                                                                 \
    const uint4 *words, const f16 *scales, int word_stride, int scale_stride, int blocks,       \
        int offset, long long expert_words, long long expert_scales

#define GIVEN(I)                                                                                \
    Experts {                                                                                   \
        {words, scales, word_stride, scale_stride, blocks, offset, I}, expert_words,            \
            expert_scales                                                                       \
    }

#else

struct Experts {
    Dense first;
    long long numbers;  // of an expert

    __device__ Dense operator[](int e) const {
        return {first.weight + e * numbers, first.I};
    }
};

#define EXPERTS const WEIGHT *weight, long long expert_numbers

#define GIVEN(I) Experts{{weight, I}, expert_numbers}

#endif

// Choices of one expert that a block serves, at most so many.
template <int TILES>
struct Chosen {
    int expert, n, choices[8 * TILES];
};

// Where the inputs of each choice begin: those of its token, or its own if `sharing` is 1.
template <int TILES, class X>
__device__ inline Tokens<TILES, X> inputs_of(const Chosen<TILES>& chosen, const X* x, int sharing,
                                             int I) {
    Tokens<TILES, X> tokens;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int nth = min((int)threadIdx.x % 32 / 4 + 8 * n, chosen.n - 1);
        tokens.row[n] = chosen.choices[nth] / sharing * I;
    }
    tokens.x = x, tokens.I = I;
    return tokens;
}

// Eight columns of h = function(x · gateᵀ) · (x · upᵀ) of some choices, rounded.
template <int TILES, float (*FUNCTION)(float), class X>
__device__ inline void gated_columns(const Experts& up, const Chosen<TILES>& chosen, const X* x,
                                     WEIGHT* h, int k, int D, int F) {
    __shared__ float sums[16][8 * TILES];
    int first = (int)blockIdx.x * 8;
    block_product(up[chosen.expert], inputs_of(chosen, x, k, D), first, F + first, F - 1,
                  2 * F - 1, sums);
    for (int item = (int)threadIdx.x; item < 8 * chosen.n; item += 32 * WARPS) {
        int row = item % 8, nth = item / 8;
        if (first + row < F)
            narrow(FUNCTION(sums[row][nth]) * sums[row + 8][nth],
                   h + (long long)chosen.choices[nth] * F + first + row);
    }
}

// Few choices: each block finds the own expert of all of them itself, -1 for none.

constexpr int FEW = 64;

__device__ inline void find_own(const int* ids, int n, int first_expert, int E, int* own) {
    if ((int)threadIdx.x < n) {
        int e = ids[threadIdx.x] - first_expert;
        own[threadIdx.x] = 0 <= e && e < E ? e : -1;
    }
    __syncthreads();
}

// Block (, choice) serves the choices of the same expert, from its own on, unless an earlier one's
// does.
template <float (*FUNCTION)(float)>
__device__ void few_gated(const Experts& up, const float* x, const int* ids, WEIGHT* h, int n,
                          int k, int first_expert, int E, int D, int F) {
    __shared__ int own[FEW];
    __shared__ Chosen<1> chosen;
    int choice = (int)blockIdx.y, nth = (int)threadIdx.x;
    find_own(ids, n, first_expert, E, own);
    int expert = own[choice], before = 0, rank = 0, all = 0;
    for (int i = 0; i < n; i++) {
        bool same = own[i] == expert;
        before += same && i < choice, all += same && i >= choice;
        rank += same && i >= choice && i < nth;
    }
    if (expert < 0 || before % 8) return;
    if (nth < n && nth >= choice && own[nth] == expert && rank < 8) chosen.choices[rank] = nth;
    if (nth == 0) chosen.expert = expert, chosen.n = min(all, 8);
    __syncthreads();
    gated_columns<1, FUNCTION>(up, chosen, x, h, k, D, F);
}

// The different experts of the choices of eight tokens, in their order, and which choice each
// token's of each is, -1 for none.
struct Different {
    int n, experts[FEW], choices[FEW][8];
};

__device__ inline void find_different(const int* own, int first, int n, int k,
                                      Different& different) {
    __shared__ int is_new[FEW];
    int nth = (int)threadIdx.x;
    if (nth < n) {
        bool known = own[nth] < 0;
        for (int i = 0; i < nth; i++) known = known || own[i] == own[nth];
        is_new[nth] = !known;
    }
    for (int i = nth; i < 8 * FEW; i += 32 * WARPS) different.choices[i / 8][i % 8] = -1;
    __syncthreads();
    if (nth < n) {
        int place = 0;
        for (int i = 0; i < nth; i++) place += is_new[i];
        if (is_new[nth]) different.experts[place] = own[nth];
        if (nth == n - 1) different.n = place + is_new[nth];
    }
    __syncthreads();
    if (nth < n && own[nth] >= 0) {
        int place = 0;
        while (different.experts[place] != own[nth]) place++;
        different.choices[place][nth / k] = first + nth;
    }
    __syncthreads();
}

// d += the weighted products of one expert's steps, for tokens that chose it.
__device__ inline void add_weighted(const Experts& down, const Different& different, int which,
                                    const WEIGHT* h, const float* weights, int first_row,
                                    int last_row, int F, int step, int n,
                                    uint4 (*arriving)[2][32], float (*d)[4]) {
    int lane = (int)threadIdx.x % 32, group = lane / 4;
    auto rows = down[different.experts[which]].rows(min(first_row + group, last_row),
                                                    min(first_row + 8 + group, last_row));
    Tokens<1, WEIGHT> tokens;
    tokens.x = h, tokens.I = F, tokens.row[0] = max(different.choices[which][group], 0) * F;
    float sums[1][4] = {{0, 0, 0, 0}};
    add_steps<decltype(down[0])>(rows, tokens, step, n, arriving, sums);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int choice = different.choices[which][lane % 4 * 2 + i % 2];
        if (choice >= 0) d[0][i] += weights[choice] * sums[0][i];
    }
}

// y (T, D) = the weighted sum of each token's choices, in a fixed order: a block has 16 columns of
// eight tokens, and its warps divide the steps of all experts that they chose.
__device__ inline void sum_few(const Experts& down, const WEIGHT* h, const int* ids,
                               const float* weights, float* y, int T, int k, int first_expert,
                               int E, int D, int F) {
    __shared__ int own[FEW];
    __shared__ Different different;
    __shared__ uint4 arriving[WARPS][STAGES][2][32];
    __shared__ float sums[16][8];
    int token = (int)blockIdx.y * 8, n_tokens = min(T - token, 8), warp = (int)threadIdx.x / 32;
    find_own(ids + token * k, n_tokens * k, first_expert, E, own);
    find_different(own, token * k, n_tokens * k, k, different);
    float d[1][4] = {{0, 0, 0, 0}};

    // Take an expert's part of this warp's steps after the other.
    int steps = down[0].steps(), share = (different.n * steps + WARPS - 1) / WARPS;
    int at = warp * share, end = min(at + share, different.n * steps), first = (int)blockIdx.x * 16;
    while (at < end) {
        int n = min(steps - at % steps, end - at);
        add_weighted(down, different, at / steps, h, weights, first, D - 1, F, at % steps, n,
                     arriving[warp], d);
        at += n;
    }
    add_up_warps<1>(d, sums);
    for (int item = (int)threadIdx.x; item < 16 * n_tokens; item += 32 * WARPS) {
        int row = item % 16, nth = item / 16;
        if (first + row < D) y[(long long)(token + nth) * D + first + row] = sums[row][nth];
    }
}

#define FEW_GATED(FUNCTION)                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 3) few_##FUNCTION(                        \
        EXPERTS, const float* x, const int* ids, WEIGHT* h, int n, int k, int first_expert,     \
        int E, int D, int F) {                                                                  \
        few_gated<FUNCTION>(GIVEN(D), x, ids, h, n, k, first_expert, E, D, F);                  \
    }

FEW_GATED(silu)
FEW_GATED(gelu_tanh)

extern "C" __global__ void __launch_bounds__(256, 2)
    few_sum(EXPERTS, const WEIGHT* h, const int* ids, const float* weights, float* y, int T,
            int k, int first_expert, int E, int D, int F) {
    sum_few(GIVEN(F), h, ids, weights, y, T, k, first_expert, E, D, F);
}

// More choices, which `grouped` has ordered by expert: an item is an expert, where 16 choices of it
// begin in the order, and how many of them there are; no expert for no more items.

__device__ inline bool find_item(const int* order, const int* items, Chosen<2>& chosen) {
    const int* item = items + 3 * blockIdx.y;
    if (item[0] < 0) return false;
    int nth = (int)threadIdx.x;
    if (nth < item[2]) chosen.choices[nth] = order[item[1] + nth];
    if (nth == 0) chosen.expert = item[0], chosen.n = item[2];
    __syncthreads();
    return true;
}

#define ITEM_GATED(FUNCTION)                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 2) item_##FUNCTION(                       \
        EXPERTS, const WEIGHT* x, const int* order, const int* items, WEIGHT* h, int k, int D,  \
        int F) {                                                                                \
        __shared__ Chosen<2> chosen;                                                            \
        if (find_item(order, items, chosen))                                                    \
            gated_columns<2, FUNCTION>(GIVEN(D), chosen, x, h, k, D, F);                        \
    }

ITEM_GATED(silu)
ITEM_GATED(gelu_tanh)

// z = h · downᵀ, 16 columns of an item's choices.
extern "C" __global__ void __launch_bounds__(256, 2)
    item_product(EXPERTS, const WEIGHT* h, const int* order, const int* items, float* z, int D,
                 int F) {
    __shared__ Chosen<2> chosen;
    __shared__ float sums[16][16];
    if (!find_item(order, items, chosen)) return;
    int first = (int)blockIdx.x * 16;
    block_product(GIVEN(F)[chosen.expert], inputs_of(chosen, h, 1, F), first, first + 8, D - 1,
                  D - 1, sums);
    for (int i = (int)threadIdx.x; i < 16 * chosen.n; i += 32 * WARPS) {
        int row = i % 16, nth = i / 16;
        if (first + row < D)
            z[(long long)chosen.choices[nth] * D + first + row] = sums[row][nth];
    }
}

#endif
