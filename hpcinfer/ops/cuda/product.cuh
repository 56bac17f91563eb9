// Products of few tokens by matrix units, whatever the weight is made of. WEIGHT is the type that
// the units take.
//
// A block computes 16 outputs of some tokens, eight of them to a tile. Its warps divide the inputs,
// and add up in a fixed order what each has found. The sum over the inputs may be taken in any
// order, so a lane reads eight that follow one another, of two rows of the weight and of one token;
// the units take four of them at a time.
typedef WEIGHT held;

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 800

// Weights travel by shared memory, so that many are under way while few registers hold any: each
// lane copies what it will read itself, a step of 64 bytes of every row after the other, and has
// STAGES of them at a time.
constexpr int WARPS = 8, STAGES = 4;

// Eight inputs of a token as the units take them, in words of two.
__device__ inline void take_up(const WEIGHT* from, unsigned* words) {
    uint4 x = load8(from).words[0];
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
}

__device__ inline void take_up(const float* from, unsigned* words) {
    float x[8];
    unpack(load8(from), x);
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack2<WEIGHT>(x[2 * i], x[2 * i + 1]);
}

// The lane's token of every tile: where its I inputs begin in x. Some other's stand for a token
// that is not there, whose sums nobody reads.
template <int TILES, class X>
struct Tokens {
    const X* x;
    int row[TILES], I;
};

// The tokens of x (T, I).
template <int TILES, class X>
__device__ inline Tokens<TILES, X> tokens_of(const X* x, int T, int I) {
    Tokens<TILES, X> tokens;
#pragma unroll
    for (int n = 0; n < TILES; n++)
        tokens.row[n] = min((int)threadIdx.x % 32 / 4 + 8 * n, T - 1) * I;
    tokens.x = x, tokens.I = I;
    return tokens;
}

// d += eight inputs of the lane's two rows, from a column on, times those of its tokens. Unless the
// step is WHOLE there may be no such inputs.
template <bool WHOLE, int TILES, class X>
__device__ inline void multiply(float (*d)[4], uint4 above, uint4 below,
                                const Tokens<TILES, X>& tokens, int column) {
    unsigned w[8] = {above.x, below.x, above.y, below.y, above.z, below.z, above.w, below.w};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        unsigned x[4] = {0, 0, 0, 0};
        if (WHOLE || (unsigned)column < (unsigned)tokens.I)
            take_up(tokens.x + tokens.row[n] + column, x);
        matrix_product(d[n], w, x, WEIGHT());
        matrix_product(d[n], w + 4, x + 2, WEIGHT());
    }
}

// What a lane has of a step: 16 bytes of each of its two rows.
struct Held {
    uint4 above, below;
};

// A weight (O, I) of 16 bits.
struct Dense {
    // What belongs to a step beside its 64 bytes: nothing.
    struct Scales {};

    // The lane's two rows; a step is 32 inputs.
    struct Rows {
        const uint4 *above, *below;
        int I, steps;

        __device__ bool is_whole(int step) const { return (step + 1) * 32 <= I; }

        __device__ static int column(int step) { return step * 32 + (int)threadIdx.x % 4 * 8; }

        __device__ bool is_there(int step) const { return column(step) < I; }

        __device__ Scales scales(int) const { return Scales(); }

        __device__ static Scales of_step(const Scales&, int) { return Scales(); }

        template <bool WHOLE, int TILES, class X>
        __device__ void multiply_by(const Tokens<TILES, X>& tokens, const Held& held,
                                    const Scales&, int step, float (*d)[4]) const {
            multiply<WHOLE>(d, held.above, held.below, tokens, column(step));
        }
    };

    const WEIGHT* weight;
    int I;

    __device__ Rows rows(int above, int below) const {
        return {reinterpret_cast<const uint4*>(weight + (long long)above * I),
                reinterpret_cast<const uint4*>(weight + (long long)below * I), I, steps()};
    }

    __device__ int steps() const { return (I + 31) / 32; }
};

// d += the products of some steps, whose weights arrive in the warp's own memory.
template <class MATRIX, int TILES, class X>
__device__ inline void add_steps(const typename MATRIX::Rows& rows,
                                 const Tokens<TILES, X>& tokens, int first, int n,
                                 uint4 (*arriving)[2][32], float (*d)[4]) {
    int lane = (int)threadIdx.x % 32, at = first * 4 + lane % 4;
    const uint4 *above = rows.above + at, *below = rows.below + at;
    auto fetch = [&](unsigned nth) {
        bool there = (int)nth < n && rows.is_there(first + (int)nth);
        copy16(&arriving[nth % STAGES][0][lane], above, there);
        copy16(&arriving[nth % STAGES][1][lane], below, there);
        commit_copies();
        above += 4, below += 4;
    };
#pragma unroll
    for (unsigned nth = 0; nth < STAGES - 1; nth++) fetch(nth);
    auto next = rows.scales(first);
    wait_for_others();
    for (unsigned four = 0; (int)four < n; four += 4) {
        auto scales = next;
        next = rows.scales(first + (int)four + 4);
#pragma unroll 1
        for (unsigned nth = four; (int)nth < min((int)four + 4, n); nth++) {
            // Take up a step, and send for the one that will have its place.
            wait_copies<STAGES - 2>();
            Held held = {arriving[nth % STAGES][0][lane], arriving[nth % STAGES][1][lane]};
            fetch(nth + STAGES - 1);
            int step = first + (int)nth;
            auto own = rows.of_step(scales, nth % 4);
            if (rows.is_whole(step))
                rows.template multiply_by<true>(tokens, held, own, step, d);
            else
                rows.template multiply_by<false>(tokens, held, own, step, d);
        }
    }
    wait_copies<0>();
}

// sums[row][token] of what the warps have found, for all threads of the block.
template <int TILES>
__device__ inline void add_up_warps(const float (*d)[4], float sums[16][8 * TILES]) {
    __shared__ float partial[WARPS][16][8 * TILES];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            partial[warp][lane / 4 + i / 2 * 8][8 * n + lane % 4 * 2 + i % 2] = d[n][i];
    __syncthreads();
    for (int item = (int)threadIdx.x; item < 16 * 8 * TILES; item += 32 * WARPS) {
        int row = item % 16, token = item / 16;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += partial[i][row][token];
        sums[row][token] = sum;
    }
    __syncthreads();
}

// The sums of the block's 16 rows, of which the first eight begin at `first` and the others at
// `second`: sums[row][token]. Rows past the last repeat it.
template <int TILES, class MATRIX, class X>
__device__ inline void block_product(const MATRIX& weight, const Tokens<TILES, X>& tokens,
                                     int first, int second, int last_first, int last_second,
                                     float sums[16][8 * TILES]) {
    __shared__ uint4 arriving[WARPS][STAGES][2][32];
    int warp = (int)threadIdx.x / 32, group = (int)threadIdx.x % 32 / 4;
    auto rows = weight.rows(min(first + group, last_first), min(second + group, last_second));
    float d[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[n][i] = 0;
    int share = (rows.steps + WARPS - 1) / WARPS, from = warp * share;
    add_steps<MATRIX>(rows, tokens, from, min(share, rows.steps - from), arriving[warp], d);
    add_up_warps<TILES>(d, sums);
}

// y (T, O) = x (T, I) · weightᵀ + bias. Blocks of the same outputs follow one another.
template <int TILES, class MATRIX, class X>
__device__ void product(const MATRIX& weight, const X* x, const float* bias, float* y, int T,
                        int I, int O) {
    __shared__ float sums[16][8 * TILES];
    int first = (int)blockIdx.y * 16, from = (int)blockIdx.x * 8 * TILES;
    T = min(T - from, 8 * TILES);
    auto tokens = tokens_of<TILES>(x + (long long)from * I, T, I);
    block_product(weight, tokens, first, first + 8, O - 1, O - 1, sums);
    for (int item = (int)threadIdx.x; item < 16 * T; item += 32 * WARPS) {
        int row = item % 16, token = item / 16;
        if (first + row < O)
            y[(long long)(from + token) * O + first + row] =
                sums[row][token] + (bias == nullptr ? 0.0f : bias[first + row]);
    }
}

// y (T, F) = function(x · gateᵀ) · (x · upᵀ), rounded: the gate is the first F rows of the weight,
// the up the F behind them. A row of y is y_stride long.
template <int TILES, float (*FUNCTION)(float), class MATRIX, class X>
__device__ void gated_product(const MATRIX& weight, const X* x, const float* bias, WEIGHT* y,
                              int T, int I, int F, int y_stride) {
    __shared__ float sums[16][8 * TILES];
    int first = (int)blockIdx.y * 8, from = (int)blockIdx.x * 8 * TILES;
    T = min(T - from, 8 * TILES);
    auto tokens = tokens_of<TILES>(x + (long long)from * I, T, I);
    block_product(weight, tokens, first, F + first, F - 1, 2 * F - 1, sums);
    for (int item = (int)threadIdx.x; item < 8 * T; item += 32 * WARPS) {
        int row = item % 8, token = item / 8;
        if (first + row >= F) continue;
        float gate = sums[row][token], up = sums[row + 8][token];
        if (bias != nullptr) gate += bias[first + row], up += bias[F + first + row];
        narrow(FUNCTION(gate) * up, y + (long long)(from + token) * y_stride + first + row);
    }
}

#endif
