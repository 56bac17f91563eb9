// Attention of many queries to the keys in pages, in the manner of flash attention 2 (Dao 2023,
// arXiv:2307.08691): a block keeps ROWS rows while the keys pass by in tiles of KEYS, and the
// scores, the weights and the sums of a row never leave the registers of its warp. A row is a query
// head of a token; those of one key/value head lie side by side, so that they share its keys.
//
// HELD is the type of the cache, K the columns of a head, ROW_STRIDE those from key to key; WARPS the warps of a block, each with
// TILES tiles of 16 rows; STAGES the tiles of keys that are in shared memory; BLOCKS the blocks that
// a multiprocessor is to have room for.
//
// The table, in int32:
//   an item for every block of rows   as in `Item`, heavy ones first
//   an entry for every key/value head first query head, how many
//   positions                         of every query
//   pages                             place and first position of each, in the order of positions;
//                                     those of a tile are there, seen or not

constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int PAGE = 32, PAGES = KEYS / PAGE, OCTETS = K / 8, STRIDE = K + 8;
constexpr int THREADS = 32 * WARPS, ROWS = 16 * TILES * WARPS, TILE = KEYS * STRIDE;
constexpr int MOST_SPLITS = 288;

// Sums are corrected to a new largest score when it is so much larger: weights then stay below
// 2^SLACK, and most tiles correct nothing.
constexpr float SLACK = 8;

struct alignas(16) Item {
    int token, row, rows;      // first query of its sequence, first row among the sequence's, rows
    int pages_at, pages;       // the pages that any of the rows sees
    int whole_from, whole_to;  // tiles of keys that each row sees whole
    int last;                  // last position that any of them sees
};

struct alignas(8) Two {
    float x, y;
};

// Row of the block that a thread has as its `i`-th of two in tile t of its warp.
__device__ inline int own_row(int t, int i) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    return (warp * TILES + t) * 16 + i * 8 + lane / 4;
}

// What a block must know of its rows: which head of the queries, counted through all tokens, which
// head of the results, -1 for none, and the token's position. Of the n rows of a token a key/value
// head with fewer query heads leaves some.
struct Rows {
    int from[ROWS], to[ROWS], positions[ROWS];
};

__device__ inline void find_rows(const Item& item, const int* entry, const int* positions,
                                 int q_heads, int H, int n, Rows& rows) {
    for (int row = (int)threadIdx.x; row < ROWS; row += THREADS) {
        int token = item.token + (item.row + row) / n, head = (item.row + row) % n;
        bool there = row < item.rows && head < entry[1];
        head += entry[0];
        rows.from[row] = token * q_heads + head, rows.to[row] = there ? token * H + head : -1;
        rows.positions[row] = there ? positions[token] : -1;
    }
}

// Take up the queries, scaled and rounded to the cache's type.
__device__ inline void load_queries(const float* q, const Rows& rows, float scale, HELD* to) {
    for (int i = (int)threadIdx.x; i < ROWS * OCTETS; i += THREADS) {
        int row = i / OCTETS, column = i % OCTETS * 8;
        const float* from = q + (long long)rows.from[row] * K + column;
        float x[8];
        unpack(rows.to[row] < 0 ? zero8<float>() : load8(from), x);
        unsigned words[4];
#pragma unroll
        for (int c = 0; c < 4; c++) words[c] = pack2<HELD>(x[2 * c] * scale, x[2 * c + 1] * scale);
        *reinterpret_cast<uint4*>(to + row * STRIDE + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Pages of a tile: their places, and how many keys of each any row sees.
struct Pages {
    int place[PAGES], seen[PAGES];
};

__device__ inline Pages find_pages(const int* pages, int tile, int last) {
    Pages found;
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
        const int* page = pages + 2 * (tile * PAGES + p);
        found.place[p] = page[0], found.seen[p] = last + 1 - page[1];
    }
    return found;
}

// Start to copy a tile of keys or values, zeros for those that no row sees. Where a pass takes whole
// rows, those of a thread follow at one distance: `from` and `to` are then where its first one is.
constexpr int PASSES = (PAGE * OCTETS + THREADS - 1) / THREADS, ROWS_OF_PASS = THREADS / OCTETS;
constexpr bool WHOLE = THREADS % OCTETS == 0 && PAGE % ROWS_OF_PASS == 0;

__device__ inline void load_tile(const HELD* held, int page_stride, const Pages& pages, HELD* to) {
    int thread = (int)threadIdx.x;
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
        const HELD* from = held + (long long)pages.place[p] * page_stride;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int i = pass * THREADS + thread;
            int row = WHOLE ? pass * ROWS_OF_PASS : i / OCTETS, column = WHOLE ? 0 : i % OCTETS * 8;
            int key = WHOLE ? row + thread / OCTETS : row;
            if (WHOLE || row < PAGE)
                copy16(to + (p * PAGE + row) * STRIDE + column, from + row * ROW_STRIDE + column,
                       key < pages.seen[p]);
        }
    }
}

// Scores of the warp's rows with a tile of keys.
__device__ inline void score(const HELD* q, const HELD* k, float (&s)[TILES][KEYS / 8][4]) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    q += (warp * TILES * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    k += (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0;
#pragma unroll
    for (int column = 0; column < K; column += 16) {
        unsigned a[TILES][4], b[4];
#pragma unroll
        for (int t = 0; t < TILES; t++) load_matrices(a[t], q + t * 16 * STRIDE + column);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            load_matrices(b, k + n * 8 * STRIDE + column);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                matrix_product(s[t][n], a[t], b, HELD());
                matrix_product(s[t][n + 1], a[t], b + 2, HELD());
            }
        }
    }
}

// Hide what lies behind a row's position, or before its window.
__device__ inline void hide(float (&s)[TILES][KEYS / 8][4], const int* pages, int tile,
                            const int* positions, int last, int window) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        int first = pages[2 * (tile * PAGES + n * 8 / PAGE) + 1];
        int key = first + n * 8 % PAGE + (int)threadIdx.x % 4 * 2;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int position = positions[own_row(t, i / 2)];
                bool seen = key + i % 2 <= min(position, last);
                seen = seen && key + i % 2 > position - window;
                if (!seen) s[t][n][i] = minus_infinity();
            }
    }
}

// Take scores to weights, 2^(score - m). Where a largest score has grown too far above m the sums so
// far are corrected, of the whole warp at a time.
__device__ inline void weigh(float (&s)[TILES][KEYS / 8][4], float (&m)[TILES][2],
                             float (&total)[TILES][2], float (&o)[TILES][OCTETS][4]) {
    float largest[TILES][2];
    bool grown = false;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = m[t][i];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                x = fmaxf(x, fmaxf(s[t][n][2 * i], s[t][n][2 * i + 1]));
            x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
            largest[t][i] = x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
            grown = grown || x > m[t][i] + SLACK;
        }

    if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float correction = fast_exp2(m[t][i] - largest[t][i]);
                m[t][i] = largest[t][i], total[t][i] *= correction;
#pragma unroll
                for (int c = 0; c < OCTETS; c++)
                    o[t][c][2 * i] *= correction, o[t][c][2 * i + 1] *= correction;
            }
    }

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                total[t][i / 2] += s[t][n][i] = fast_exp2(s[t][n][i] - m[t][i / 2]);
}

// Add a tile's values, by the weights.
__device__ inline void add(const float (&s)[TILES][KEYS / 8][4], const HELD* v,
                           float (&o)[TILES][OCTETS][4]) {
    int lane = (int)threadIdx.x % 32;
    v += lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
        unsigned a[TILES][4], b[4];
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* two = s[t][n + i / 2] + i % 2 * 2;
                a[t][i] = pack2<HELD>(two[0], two[1]);
            }
#pragma unroll
        for (int c = 0; c < OCTETS; c += 2) {
            load_transposed(b, v + n * 8 * STRIDE + c * 8);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                matrix_product(o[t][c], a[t], b, HELD());
                matrix_product(o[t][c + 1], a[t], b + 2, HELD());
            }
        }
    }
}

// Row of the results of a split that belongs to a row of this block.
__device__ inline long long part_row(int split, int row) {
    long long block = ((long long)split * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    return block * ROWS + row;
}

// Divide, and write o and lse: of all keys to the rows of the queries, or of one split's.
__device__ inline void finish(const Rows& rows, const float (&m)[TILES][2],
                              const float (&total)[TILES][2],
                              const float (&sums)[TILES][OCTETS][4], float* o, float* lse) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = lanes_sum<4>(total[t][i]), factor = sum == 0 ? 0.0f : 1 / sum;
            int row = own_row(t, i), column = (int)threadIdx.x % 4 * 2;
            long long to = gridDim.z > 1 ? part_row((int)blockIdx.z, row) : rows.to[row];
            if (to < 0) continue;
#pragma unroll
            for (int c = 0; c < OCTETS; c++) {
                const float* two = sums[t][c] + 2 * i;
                *reinterpret_cast<Two*>(o + to * K + c * 8 + column) = {two[0] * factor,
                                                                        two[1] * factor};
            }
            if (column == 0)
                lse[to] = sum == 0 ? minus_infinity() : (m[t][i] + log2f(sum)) * LN_2;
        }
}

// Blocks: (key/value heads, items, splits of an item's keys).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    prefill(const float* q, const HELD* k, const HELD* v, const int* table, float* o, float* lse,
            int entries_at, int positions_at, int pages_at, int q_heads, int H, int n, int window,
            float scale, int page_stride, int head_stride) {
    __shared__ Rows rows;
    HELD* q_rows = reinterpret_cast<HELD*>(dynamic_shared);
    HELD *k_tiles = q_rows + ROWS * STRIDE, *v_tiles = k_tiles + STAGES * TILE;
    Item item = reinterpret_cast<const Item*>(table)[blockIdx.y];
    const int *entry = table + entries_at + 2 * blockIdx.x;
    const int *pages = table + pages_at + 2 * item.pages_at;
    int row = WHOLE ? (int)threadIdx.x / OCTETS : 0;
    int column = WHOLE ? (int)threadIdx.x % OCTETS * 8 : 0;
    int from = (int)blockIdx.x * head_stride + row * ROW_STRIDE + column;
    HELD *k_to = k_tiles + row * STRIDE + column, *v_to = v_tiles + row * STRIDE + column;
    k += from, v += from;

    // Divide the tiles among the splits, and let the first come.
    int tiles = (item.pages + PAGES - 1) / PAGES, splits = (int)gridDim.z;
    int begin = tiles * (int)blockIdx.z / splits, end = tiles * ((int)blockIdx.z + 1) / splits;
    if (begin < end) {
        Pages first = find_pages(pages, begin, item.last);
        load_tile(k, page_stride, first, k_to);
        if (STAGES > 1) load_tile(v, page_stride, first, v_to);
    }
    commit_copies();
    find_rows(item, entry, table + positions_at, q_heads, H, n, rows);
    __syncthreads();
    load_queries(q, rows, scale * LOG2_E, q_rows);

    float m[TILES][2], total[TILES][2], sums[TILES][OCTETS][4], s[TILES][KEYS / 8][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        m[t][0] = m[t][1] = LOWEST, total[t][0] = total[t][1] = 0;
#pragma unroll
        for (int c = 0; c < OCTETS; c++)
            sums[t][c][0] = sums[t][c][1] = sums[t][c][2] = sums[t][c][3] = 0;
    }

    for (int tile = begin; tile < end; tile++) {
        int now = STAGES > 1 ? (tile - begin) % 2 * TILE : 0, next = STAGES > 1 ? TILE - now : 0;

        // The keys are there, and all warps have done with the tile before.
        wait_copies<0>();
        __syncthreads();
        if (STAGES == 1) {
            load_tile(v, page_stride, find_pages(pages, tile, item.last), v_to);
        } else if (tile + 1 < end) {
            Pages following = find_pages(pages, tile + 1, item.last);
            load_tile(k, page_stride, following, k_to + next);
            load_tile(v, page_stride, following, v_to + next);
        }
        commit_copies();
        score(q_rows, k_tiles + now, s);

        // With one stage the next keys take the place of these.
        if (STAGES == 1) {
            wait_copies<0>();
            __syncthreads();
            if (tile + 1 < end)
                load_tile(k, page_stride, find_pages(pages, tile + 1, item.last), k_to);
            commit_copies();
        }
        if (tile < item.whole_from || tile >= item.whole_to)
            hide(s, pages, tile, rows.positions, item.last, window);
        weigh(s, m, total, sums);
        add(s, v_tiles + now, sums);
    }
    finish(rows, m, total, sums, o, lse);
}

// The rule of `hpcinfer.ops.attention.merge` over the splits, which left o_parts (splits, rows, K)
// and lse_parts (splits, rows); a warp for a row. Blocks: (key/value heads, items, WARPS rows each).
extern "C" __global__ void merge_parts(const float* o_parts, const float* lse_parts,
                                       const int* table, float* o, float* lse, int entries_at,
                                       int positions_at, int H, int n, int splits) {
    __shared__ float weights[WARPS][MOST_SPLITS];
    __shared__ Rows rows;
    find_rows(reinterpret_cast<const Item*>(table)[blockIdx.y],
              table + entries_at + 2 * blockIdx.x, table + positions_at, H, H, n, rows);
    __syncthreads();
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    int row = (int)blockIdx.z * WARPS + warp, to = rows.to[row];
    if (to < 0) return;

    // Weigh the splits.
    long long from = part_row(0, row), distance = part_row(1, row) - from;
    float known = weigh_splits<MOST_SPLITS>(lse_parts + from, distance, splits, weights[warp]);
    if (lane == 0) lse[to] = known;
    __syncwarp();

    // Add them up.
    for (int column = 4 * lane; column < K; column += 128) {
        Run<4> sum = {0, 0, 0, 0}, x;
#pragma unroll 8
        for (int s = 0; s < splits; s++) {
            load(o_parts + (from + s * distance) * K + column, x);
#pragma unroll
            for (int i = 0; i < 4; i++) sum.x[i] += weights[warp][s] * x.x[i];
        }
        store(o + (long long)to * K + column, sum);
    }
}
