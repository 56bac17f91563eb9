// Many choices of the experts of a mixture: they are ordered by expert, and matrix units multiply
// tiles of them by tiles of their expert's matrices. Nothing of it waits for the host. WEIGHT is the
// type of the weights; a choice is as in `experts`.

// The order of the own experts' choices, each expert's in the order of the tokens, and items as
// `experts` says, of `tile` choices at most. A block has an expert; each counts them all.
constexpr int MOST_EXPERTS = 1024, GROUPING_WARPS = 8;

extern "C" __global__ void __launch_bounds__(256)
    group_choices(const int* ids, int* order, int* items, int n, int first_expert, int E, int tile,
                  int most_items) {
    __shared__ int counts[MOST_EXPERTS], of_warp[GROUPING_WARPS], choices_before, items_before;
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, own = (int)blockIdx.x;
    for (int e = thread; e < E; e += (int)blockDim.x) counts[e] = 0;
    if (thread == 0) choices_before = items_before = 0;
    __syncthreads();
    for (int i = thread; i < n; i += (int)blockDim.x) {
        int e = ids[i] - first_expert;
        if (0 <= e && e < E) atomicAdd(&counts[e], 1);
    }
    __syncthreads();

    // What comes before this expert's choices and items.
    int choices = 0, tiles = 0;
    for (int e = thread; e < own; e += (int)blockDim.x)
        choices += counts[e], tiles += (counts[e] + tile - 1) / tile;
    if (choices) atomicAdd(&choices_before, choices), atomicAdd(&items_before, tiles);

    // The warps divide the choices: count those of each, then write them behind one another.
    int share = (n + 32 * GROUPING_WARPS - 1) / (32 * GROUPING_WARPS) * 32, found = 0;
    int from = warp * share, to = min(from + share, n);
    for (int i = from; i < to; i += 32) {
        bool is_own = i + lane < to && ids[i + lane] - first_expert == own;
        found += __popc(__ballot_sync(ALL_LANES, is_own));
    }
    if (lane == 0) of_warp[warp] = found;
    __syncthreads();
    int at = choices_before;
    for (int i = 0; i < warp; i++) at += of_warp[i];
    for (int i = from; i < to; i += 32) {
        bool is_own = i + lane < to && ids[i + lane] - first_expert == own;
        unsigned all = __ballot_sync(ALL_LANES, is_own);
        if (is_own) order[at + __popc(all & ((1u << lane) - 1))] = i + lane;
        at += __popc(all);
    }

    // Its items; the last expert's block ends the list.
    int own_tiles = (counts[own] + tile - 1) / tile;
    for (int i = thread; i < own_tiles; i += (int)blockDim.x) {
        int* item = items + 3 * (items_before + i);
        item[0] = own, item[1] = choices_before + i * tile;
        item[2] = min(tile, counts[own] - i * tile);
    }
    if (own == E - 1)
        for (int i = items_before + own_tiles + thread; i < most_items; i += (int)blockDim.x)
            items[3 * i] = -1;
}

// y (T, D) = the weighted sum of each token's choices in z (T k, D), those of other ranks' experts
// left out.
extern "C" __global__ void combine_choices(const float* z, const int* ids, const float* weights,
                                           float* y, int T, int k, int first_expert, int E,
                                           int D) {
    long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int token = (int)(item / (D / 4)), column = (int)(item % (D / 4)) * 4;
    if (token >= T) return;
    Run<4> sum = {{0, 0, 0, 0}}, own;
    for (int choice = token * k; choice < token * k + k; choice++) {
        int e = ids[choice] - first_expert;
        if (e < 0 || e >= E) continue;
        load(z + (long long)choice * D + column, own);
#pragma unroll
        for (int i = 0; i < 4; i++) sum.x[i] += weights[choice] * own.x[i];
    }
    store(y + (long long)token * D + column, sum);
}

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

// A block multiplies CHOICES choices by two times ROWS rows, DEPTH inputs of which are a stage. Its
// warps are four along the choices and two along the rows, and have 32 of each, of both halves.
constexpr int CHOICES = 128, ROWS = 64, DEPTH = 32, STAGES = 3;

// A row of a stage is four times eight inputs, in places that differ from row to row, so that eight
// rows can be read at once.
struct Stage {
    uint4 x[CHOICES][4], w[2 * ROWS][4];
};

__device__ inline int place(int row, int eight) { return eight ^ (row >> 1 & 3); }

// Where the rows begin of which a thread copies a part: two of the choices' inputs, below 0 for one
// that is not there, and two of the matrix.
struct Sources {
    const WEIGHT *x, *matrix;
    int of_x[2], of_w[2];
};

// Send for a stage.
__device__ inline void fetch(const Sources& from, int I, int stage, Stage& to) {
    int row = (int)threadIdx.x / 4, eight = (int)threadIdx.x % 4, column = stage * DEPTH + eight * 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = row + ROWS * i;
        copy16(&to.x[at][place(at, eight)], from.x + max(from.of_x[i], 0) + column,
               from.of_x[i] >= 0 && column < I);
        copy16(&to.w[at][place(at, eight)], from.matrix + from.of_w[i] + column, column < I);
    }
    commit_copies();
}

// sums[half][m][n] += the products of a stage: 16 choices and eight rows each.
__device__ inline void multiply(const Stage& stage, float (*sums)[2][4][4]) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int choice = warp % 4 * 32, row = warp / 4 * 32;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        unsigned a[2][4], b[4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int at = choice + m * 16 + lane % 16;
            load_matrices(a[m], &stage.x[at][place(at, pair + lane / 16)]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                int at = half * ROWS + row + n * 8 + lane / 16 * 8 + lane % 8;
                load_matrices(b, &stage.w[at][place(at, pair + lane / 8 % 2)]);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    matrix_product(sums[half][m][n], a[m], b, WEIGHT());
                    matrix_product(sums[half][m][n + 1], a[m], b + 2, WEIGHT());
                }
            }
    }
}

// The products of an item's choices with rows of its expert's matrix (O, I), of which the first half
// begins at `first` and the other at `second`; rows past the last repeat it.
__device__ inline void tile_product(const WEIGHT* matrix, const WEIGHT* x, const int* choices,
                                    int n, int sharing, int I, int first, int second,
                                    int last_first, int last_second, float (*sums)[2][4][4]) {
    __shared__ Stage stages[STAGES];
    int row = (int)threadIdx.x / 4, warp = (int)threadIdx.x / 32, n_stages = (I + DEPTH - 1) / DEPTH;
    Sources from = {x, matrix, {-1, -1}};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + ROWS * i < n) from.of_x[i] = choices[row + ROWS * i] / sharing * I;
    from.of_w[0] = min(first + row, last_first) * I;
    from.of_w[1] = min(second + row, last_second) * I;
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i / 8][i / 4 % 2][i % 4][j] = 0;

    // A stage arrives while the one before it is multiplied.
    for (int s = 0; s < STAGES - 1; s++) fetch(from, I, s, stages[s]);
    for (int s = 0; s < n_stages; s++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        fetch(from, I, s + STAGES - 1, stages[(s + STAGES - 1) % STAGES]);
        if (warp % 4 * 32 < n) multiply(stages[s % STAGES], sums);
    }
    wait_copies<0>();
}

// Number of the choice among the item's, and column among the half's, of value i of two that follow
// one another in sums[half][m][n].
__device__ inline int choice_of(int m, int i) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    return warp % 4 * 32 + m * 16 + i / 2 * 8 + lane / 4;
}

__device__ inline int column_of(int n) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    return warp / 4 * 32 + n * 8 + lane % 4 * 2;
}

// Call `write(choice, m, i)` for each choice of which this thread has sums, which are [..][m][..] from
// i on.
template <class F>
__device__ inline void for_choices(const int* choices, int n_choices, F write) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            int nth = choice_of(m, i);
            if (nth < n_choices) write(choices[nth], m, i);
        }
}

// h = function(x · gateᵀ) · (x · upᵀ) of the items' choices, ROWS columns to a block, rounded.
template <float (*FUNCTION)(float)>
__device__ void tile_gated(const WEIGHT* up, const WEIGHT* x, const int* order, const int* items,
                           WEIGHT* h, int k, int D, int F) {
    const int* item = items + 3 * blockIdx.y;
    if (item[0] < 0) return;
    const int* choices = order + item[1];
    int n_choices = item[2], first = (int)blockIdx.x * ROWS;
    float sums[2][2][4][4];
    tile_product(up + (long long)item[0] * 2 * F * D, x, choices, n_choices, k, D, first, F + first,
                 F - 1, 2 * F - 1, sums);
    for_choices(choices, n_choices, [&](int choice, int m, int i) {
        WEIGHT* to = h + (long long)choice * F + first;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int column = column_of(n);
            const float *gate = sums[0][m][n] + i, *more = sums[1][m][n] + i;
            if (first + column < F)
                *reinterpret_cast<unsigned*>(to + column) =
                    pack2<WEIGHT>(FUNCTION(gate[0]) * more[0], FUNCTION(gate[1]) * more[1]);
        }
    });
}

#define TILE_GATED(FUNCTION)                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 2) tile_##FUNCTION(                       \
        const WEIGHT* up, const WEIGHT* x, const int* order, const int* items, WEIGHT* h,       \
        int k, int D, int F) {                                                                  \
        tile_gated<FUNCTION>(up, x, order, items, h, k, D, F);                                  \
    }

TILE_GATED(silu)
TILE_GATED(gelu_tanh)

// z = h · downᵀ of the items' choices, 2 ROWS columns to a block.
extern "C" __global__ void __launch_bounds__(256, 2)
    tile_down(const WEIGHT* down, const WEIGHT* h, const int* order, const int* items,
                      float* z, int D, int F) {
    const int* item = items + 3 * blockIdx.y;
    if (item[0] < 0) return;
    const int* choices = order + item[1];
    int n_choices = item[2], first = (int)blockIdx.x * 2 * ROWS;
    float sums[2][2][4][4];
    tile_product(down + (long long)item[0] * D * F, h, choices, n_choices, 1, F, first,
                 first + ROWS, D - 1, D - 1, sums);
    for_choices(choices, n_choices, [&](int choice, int m, int i) {
        float* to = z + (long long)choice * D + first;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int column = j / 4 * ROWS + column_of(j % 4);
            const float* found = sums[j / 4][m][j % 4] + i;
            if (first + column < D)
                *reinterpret_cast<uint2*>(to + column) =
                    make_uint2(__float_as_uint(found[0]), __float_as_uint(found[1]));
        }
    });
}

#endif
