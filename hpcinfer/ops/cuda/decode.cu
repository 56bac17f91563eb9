// Attention of few queries to the keys in pages by matrix units, in the manner of flash decoding: the
// pages of a sequence are split over blocks, those of a block over its warps, and the block that ends
// last merges what all have found. A row is a query head of a token; those of one key/value head lie
// side by side, so that they share its keys.
//
// HELD is the type of the cache, OUT that of the result, K the columns of a head; WARPS the warps of a
// block, SETS its sets of eight rows, KEYS the keys that a warp takes at a time; BLOCKS the blocks that
// a multiprocessor is to have room for.
//
// Either product may add up its terms in any order, and so each lane reads of keys and values just
// what it then gives to the matrix units, eight columns at a time, with no shared memory between. The
// lower half of the 16 rows that the units take has what rounding leaves of the queries in the upper.
//
// The table, in int32:
//   an item for every split            as in `Item`; those of the same rows follow one another
//   heads of every key/value head       the first that read it, and how many
//   range                              first and last position that every query sees
//   pages                              place and number in the sequence of each

constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int PAGE = 32, TILES_OF_PAGE = PAGE / KEYS, MOST_SPLITS = 128;
constexpr int THREADS = 32 * WARPS, ROWS = 8 * SETS;

// Columns of keys by four lanes, of values by eight, in runs of eight columns of each.
constexpr int OCTETS = K / 8, K_RUNS = (OCTETS + 3) / 4, V_RUNS = (OCTETS + 7) / 8;

struct alignas(16) Item {
    int token, row, rows;  // first query of its sequence, first row among the sequence's, rows
    int pages_at, pages;   // the pages of this split
    int last;              // last position that any of the rows sees
    int first, splits;     // first item of the same rows, and how many there are; 0 for none at all
};

struct alignas(8) Heads {
    int first, count;
};

struct alignas(8) Page {
    int place, number;
};

struct alignas(8) Range {
    int first, last;
};

// A row of the block. Of a token's rows a key/value head with fewer query heads leaves some.
struct Row {
    int token, head;
    bool there;
};

__device__ inline Row find_row(const Item& item, const Heads& heads, int row) {
    int token = item.token + (item.row + row) / HEADS, head = (item.row + row) % HEADS;
    bool there = row < item.rows && head < heads.count;
    return {there ? token : item.token, heads.first + head, there};
}

// Two values rounded to the cache's type, and what rounding leaves of them.
__device__ inline void split2(float x, float y, unsigned& upper, unsigned& lower) {
    float two[2];
    upper = pack2<HELD>(x, y);
    unpack2(upper, two, HELD());
    lower = pack2<HELD>(x - two[0], y - two[1]);
}

// Take up the queries, scaled, as the lanes of a warp hand them to the units: rounded to the cache's
// type, and what rounding leaves.
__device__ inline void load_queries(const float* q, const Item& item, const Heads& heads,
                                    int q_heads, float scale, uint4 (*to)[32]) {
    for (int i = (int)threadIdx.x; i < SETS * K_RUNS * 32; i += THREADS) {
        int lane = i % 32, run = i / 32 % K_RUNS, set = i / 32 / K_RUNS, octet = 4 * run + lane % 4;
        Row row = find_row(item, heads, 8 * set + lane / 4);
        const float* from = q + ((long long)row.token * q_heads + row.head) * K + 8 * octet;
        float x[8];
        unpack(row.there && octet < OCTETS ? load8(from) : zero8<float>(), x);
        unsigned upper[4], lower[4];
#pragma unroll
        for (int c = 0; c < 4; c++)
            split2(x[2 * c] * scale, x[2 * c + 1] * scale, upper[c], lower[c]);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            uint4* of_lane = to[i / 32 * 2 + c / 2] + c % 2 * 16 + lane / 4;
            reinterpret_cast<unsigned*>(of_lane)[lane % 4] = upper[c];
            reinterpret_cast<unsigned*>(of_lane + 8)[lane % 4] = lower[c];
        }
    }
}

// A tile of keys: where it is in the pools, the position of its first key, and the last key that is
// a number, which may be before the first: what lies behind it is not read. A tile is found where
// there are no more, too, so that nothing waits for the question.
struct Tile {
    long long at;
    int position, last;
};

__device__ inline Tile find_tile(const Page* pages, int tile, int tiles, int last) {
    tile = max(0, min(tile, tiles - 1));
    Page page = pages[tile / TILES_OF_PAGE];
    int within = tile % TILES_OF_PAGE * KEYS, position = page.number * PAGE;
    long long block = (long long)page.place * gridDim.x + blockIdx.x;
    last = max(0, min(PAGE - 1, last - position)) - within;
    return {(block * PAGE + within) * K, position + within, last};
}

__device__ inline void read_tile_ahead(const HELD* k, const HELD* v, const Tile& tile) {
    for (int i = (int)threadIdx.x % 32; i < KEYS * K / 64; i += 32) {
        read_ahead(k + tile.at + 64 * i);
        read_ahead(v + tile.at + 64 * i);
    }
}

__device__ inline void load_words(const HELD* from, bool there, unsigned* words) {
    uint4 x = (there ? load8(from) : zero8<HELD>()).words[0];
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
}

// Lane 4 i + j reads the columns j of four, of the keys i of eight.
__device__ inline void load_keys(const HELD* held, const Tile& tile,
                                 unsigned (&k)[KEYS / 8][K_RUNS][4]) {
    int lane = (int)threadIdx.x % 32, octet = lane % 4;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        const HELD* from = held + tile.at + min(8 * n + lane / 4, tile.last) * K + 8 * octet;
#pragma unroll
        for (int run = 0; run < K_RUNS; run++)
            load_words(from + 32 * run, 4 * run + 3 < OCTETS || 4 * run + octet < OCTETS, k[n][run]);
    }
}

// Lane 4 i + j reads the columns i of eight, of the keys 2 j, 2 j + 1, 2 j + 8, 2 j + 9 of 16.
__device__ inline void load_values(const HELD* held, const Tile& tile,
                                   unsigned (&v)[KEYS / 4][V_RUNS][4]) {
    int lane = (int)threadIdx.x % 32, octet = lane / 4;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        int key = i / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2 + i % 2;
        const HELD* from = held + tile.at + min(key, tile.last) * K + 8 * octet;
#pragma unroll
        for (int run = 0; run < V_RUNS; run++)
            load_words(from + 64 * run, 8 * run + 7 < OCTETS || 8 * run + octet < OCTETS, v[i][run]);
    }
}

// Scores of the rows with a tile of keys: a lane has of row lane / 4 the keys 2 (lane % 4) of eight
// and one more.
__device__ inline void score(const uint4 (*q)[32], const unsigned (&k)[KEYS / 8][K_RUNS][4],
                             float (&s)[SETS][KEYS / 8][2]) {
    float d[SETS][KEYS / 8][4];
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            d[set][n][0] = d[set][n][1] = d[set][n][2] = d[set][n][3] = 0;
#pragma unroll
    for (int i = 0; i < 2 * K_RUNS; i++)
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            unsigned a[4];
            load_matrices(a, q[set * 2 * K_RUNS + i] + threadIdx.x % 32);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                matrix_product(d[set][n], a, k[n][i / 2] + i % 2 * 2, HELD());
        }
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) s[set][n][i] = d[set][n][i] + d[set][n][2 + i];
}

// Hide the keys that a row does not see.
__device__ inline void hide(float (&s)[SETS][KEYS / 8][2], int position,
                            const Range (&ranges)[SETS]) {
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int key = position + 8 * n + (int)threadIdx.x % 4 * 2 + i;
                bool seen = ranges[set].first <= key && key <= ranges[set].last;
                if (!seen) s[set][n][i] = minus_infinity();
            }
}

// Take scores to weights, 2^(score - m), and correct the sums so far to the new largest score.
__device__ inline void weigh(float (&s)[SETS][KEYS / 8][2], float (&m)[SETS], float (&total)[SETS],
                             float (&o)[SETS][4 * V_RUNS][4]) {
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        float largest = m[set];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            largest = fmaxf(largest, fmaxf(s[set][n][0], s[set][n][1]));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        float correction = fast_exp2(m[set] - largest);
        m[set] = largest, total[set] *= correction;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                total[set] += s[set][n][i] = fast_exp2(s[set][n][i] - largest);

        // The sums of a lane are those of two other rows.
        int lane = (int)threadIdx.x % 4 * 8;
        float of_rows[2] = {__shfl_sync(ALL_LANES, correction, lane),
                            __shfl_sync(ALL_LANES, correction, lane + 4)};
#pragma unroll
        for (int c = 0; c < 4 * V_RUNS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[set][c][i] *= of_rows[i % 2];
    }
}

// Add a tile's values, by the weights: columns by rows. A lane has of the rows 2 (lane % 4) and one
// more all columns that it reads, a word's two columns in o[..][0], [1] and [2], [3].
__device__ inline void add(const float (&s)[SETS][KEYS / 8][2],
                           const unsigned (&v)[KEYS / 4][V_RUNS][4],
                           float (&o)[SETS][4 * V_RUNS][4]) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        unsigned b[SETS][2], rest[SETS][2];
#pragma unroll
        for (int set = 0; set < SETS; set++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                split2(s[set][2 * i + j][0], s[set][2 * i + j][1], b[set][j], rest[set][j]);
#pragma unroll
        for (int c = 0; c < 4 * V_RUNS; c++) {
            unsigned a[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                unsigned x = v[4 * i + 2 * j][c / 4][c % 4], y = v[4 * i + 2 * j + 1][c / 4][c % 4];
                a[2 * j] = (x & 0xffffu) | y << 16, a[2 * j + 1] = x >> 16 | (y & 0xffff0000u);
            }
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                matrix_product(o[set][c], a, b[set], HELD());
                matrix_product(o[set][c], a, rest[set], HELD());
            }
        }
    }
}

// What the warps have found for eight rows.
struct Found {
    float m[WARPS][8], total[WARPS][8], o[WARPS][8][K + 4];
};

// Let the block see what the warp has found for a set of rows.
__device__ inline void show(float m, float total, const float (&o)[4 * V_RUNS][4], Found& found) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    total = lanes_sum<4>(total);
    if (lane % 4 == 0) found.m[warp][lane / 4] = m, found.total[warp][lane / 4] = total;
#pragma unroll
    for (int run = 0; run < V_RUNS; run++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int octet = 8 * run + lane / 4, c = 4 * run + i % 2 * 2;
            float* to = found.o[warp][lane % 4 * 2 + i / 2] + 8 * octet + i % 2 * 4;
            Run<4> y = {o[c][i / 2], o[c][2 + i / 2], o[c + 1][i / 2], o[c + 1][2 + i / 2]};
            if (octet < OCTETS) store(to, y);
        }
}

// Four columns of a row over all warps, and its log-sum-exp.
__device__ inline Run<4> sum_of_warps(const Found& found, int row, int column, float* lse) {
    float largest = LOWEST, total = 0;
    Run<4> sum = {0, 0, 0, 0}, x;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, found.m[w][row]);
    for (int w = 0; w < WARPS; w++) {
        float correction = exp2f(found.m[w][row] - largest);
        total += correction * found.total[w][row];
        load(found.o[w][row] + column, x);
#pragma unroll
        for (int i = 0; i < 4; i++) sum.x[i] += correction * x.x[i];
    }
    float factor = total > 0 ? 1 / total : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum.x[i] *= factor;
    *lse = total > 0 ? (largest + log2f(total)) * LN_2 : minus_infinity();
    return sum;
}

// Row of the parts that belongs to a row of an item.
__device__ inline long long part_row(int item, int row) {
    return ((long long)item * gridDim.x + blockIdx.x) * ROWS + row;
}

// Merge the splits of an item's rows, which lie in o_parts (rows of parts, K) and lse_parts.
__device__ inline void merge_items(const Item& item, const Heads& heads, int H,
                                   const float* o_parts, const float* lse_parts, OUT* o,
                                   float* lse) {
    __shared__ float weights[8][MOST_SPLITS];
    long long distance = (long long)gridDim.x * ROWS;
    for (int set = 0; set < SETS; set++) {
        __syncthreads();
        for (int i = (int)threadIdx.x / 32; i < 8; i += WARPS) {
            Row row = find_row(item, heads, 8 * set + i);
            if (!row.there) continue;
            const float* from = lse_parts + part_row(item.first, 8 * set + i);
            float known = weigh_splits<MOST_SPLITS>(from, distance, item.splits, weights[i]);
            if (threadIdx.x % 32 == 0) lse[(long long)row.token * H + row.head] = known;
        }
        __syncthreads();
        for (int i = (int)threadIdx.x; i < 8 * (K / 4); i += THREADS) {
            int of_set = i / (K / 4), column = i % (K / 4) * 4;
            Row row = find_row(item, heads, 8 * set + of_set);
            if (!row.there) continue;
            const float* from = o_parts + part_row(item.first, 8 * set + of_set) * K + column;
            Run<4> sum = {0, 0, 0, 0}, x;
#pragma unroll 8
            for (int s = 0; s < item.splits; s++) {
                load(from + s * distance * K, x);
#pragma unroll
                for (int c = 0; c < 4; c++) sum.x[c] += weights[of_set][s] * x.x[c];
            }
            store(o + ((long long)row.token * H + row.head) * K + column, sum);
        }
    }
}

// Blocks: (key/value heads, items).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode(const float* q, const HELD* k_pages, const HELD* v_pages, const int* table,
           float* o_parts, float* lse_parts, int* arrived, OUT* o, float* lse, int heads_at,
           int ranges_at, int pages_at, int q_heads, int H, float scale) {
    __shared__ uint4 queries[SETS * 2 * K_RUNS][32];
    __shared__ Found found;
    Item item = reinterpret_cast<const Item*>(table)[blockIdx.y];
    if (item.splits == 0) return;
    Heads heads = reinterpret_cast<const Heads*>(table + heads_at)[blockIdx.x];
    const Page* pages = reinterpret_cast<const Page*>(table + pages_at) + item.pages_at;
    int warp = (int)threadIdx.x / 32, tiles = item.pages * TILES_OF_PAGE;

    // Find the first two tiles, and what each row sees.
    Tile now = find_tile(pages, warp, tiles, item.last), next = find_tile(pages, warp + WARPS, tiles, item.last);
    Range ranges[SETS];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        Row row = find_row(item, heads, 8 * set + (int)threadIdx.x % 32 / 4);
        ranges[set] = reinterpret_cast<const Range*>(table + ranges_at)[row.token];
        if (!row.there) ranges[set] = {0, -1};
    }
    if (warp < tiles) read_tile_ahead(k_pages, v_pages, now);
    wait_for_others();

    // Keys are read again once they are scored, values once they are added.
    unsigned k[KEYS / 8][K_RUNS][4], v[KEYS / 4][V_RUNS][4];
    if (warp < tiles) {
        load_keys(k_pages, now, k);
        load_values(v_pages, now, v);
    }
    load_queries(q, item, heads, q_heads, scale * LOG2_E, queries);
    __syncthreads();

    float m[SETS], total[SETS], sums[SETS][4 * V_RUNS][4], s[SETS][KEYS / 8][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        m[set] = LOWEST, total[set] = 0;
#pragma unroll
        for (int c = 0; c < 4 * V_RUNS; c++)
            sums[set][c][0] = sums[set][c][1] = sums[set][c][2] = sums[set][c][3] = 0;
    }
    for (int tile = warp; tile < tiles; tile += WARPS) {
        bool more = tile + WARPS < tiles;
        score(queries, k, s);
        if (more) load_keys(k_pages, next, k);
        hide(s, now.position, ranges);
        weigh(s, m, total, sums);
        add(s, v, sums);
        if (more) load_values(v_pages, next, v);
        now = next;
        next = find_tile(pages, tile + 2 * WARPS, tiles, item.last);
    }

    // Merge the warps: of all keys, or of a split's, which are merged by the last to come.
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        if (set > 0) __syncthreads();
        show(m[set], total[set], sums[set], found);
        __syncthreads();
        for (int i = (int)threadIdx.x; i < 8 * (K / 4); i += THREADS) {
            int of_set = i / (K / 4), column = i % (K / 4) * 4;
            Row row = find_row(item, heads, 8 * set + of_set);
            if (!row.there) continue;
            float known;
            Run<4> sum = sum_of_warps(found, of_set, column, &known);
            long long to = (long long)row.token * H + row.head;
            long long part = part_row((int)blockIdx.y, 8 * set + of_set);
            if (item.splits == 1) store(o + to * K + column, sum);
            if (item.splits > 1) store(o_parts + part * K + column, sum);
            if (column == 0) *(item.splits == 1 ? lse + to : lse_parts + part) = known;
        }
    }
    int* of_rows = arrived + (long long)item.first * gridDim.x + blockIdx.x;
    if (item.splits > 1 && is_last(of_rows, item.splits))
        merge_items(item, heads, H, o_parts, lse_parts, o, lse);
}
