// Attention of single queries to the keys in pages, without matrix units, in the manner of flash
// decoding: the pages of a query are split over blocks, and the block that ends last merges what they
// have found. HELD is the type of the cache, OUT that of the result, LANES the lanes that share a key,
// eight columns each.
//
// The table, in int32:
//   a row for every query      token, where its pages begin, how many, first and last position seen
//   an entry for every N heads key/value head, first query head, how many
//   places                     of every page in the pool
//   numbers                    which page of its sequence each one is

constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int THREADS = 128, STREAMS = THREADS / LANES, MOST_SPLITS = 64;

// The rule of `hpcinfer.ops.attention.merge` over the first `used` splits of n heads of a query:
// o_parts (n, splits, K), lse_parts (n, splits).
template <int N>
__device__ inline void merge_splits(const float* o_parts, const float* lse_parts, int n, int splits,
                                    int used, int K, OUT* o, float* lse) {
    __shared__ float weights[N][MOST_SPLITS];

    // Weigh the splits: a warp for a head.
    int warp = (int)threadIdx.x / 32;
    for (int i = warp; i < n; i += THREADS / 32) {
        float known = weigh_splits<MOST_SPLITS>(lse_parts + i * splits, 1, used, weights[i]);
        if (threadIdx.x % 32 == 0) lse[i] = known;
    }
    __syncthreads();

    // Add them up.
    for (int item = (int)threadIdx.x; item < n * K; item += THREADS) {
        int i = item / K, c = item % K;
        const float* from = o_parts + (long long)i * splits * K + c;
        float sum = 0;
#pragma unroll 4
        for (int s = 0; s < used; s++) sum += weights[i][s] * from[(long long)s * K];
        narrow(sum, o + (long long)i * K + c);
    }
}

// Groups of LANES lanes go over keys of their own, BATCH of them at a time, each with a softmax
// under way for all N heads. Scores are in units of log 2, for the sake of exp2.
template <int N>
__device__ void decode(const float* q, const HELD* k_pages, const HELD* v_pages, const int* table,
                       float* o_parts, float* lse_parts, int* arrived, OUT* o, float* lse,
                       int entries_at, int places_at, int numbers_at, int H, int G, int K,
                       int page_bits, int fewest_pages, long long q_stride, float scale) {
    constexpr int BATCH = sizeof(HELD) == 2 && N <= 4 ? 4 : 2;
    __shared__ float all_m[STREAMS][N], all_total[STREAMS][N], all_o[STREAMS][N][LANES * 8];
    const int *row = table + 5 * blockIdx.z, *entry = table + entries_at + 3 * blockIdx.y;
    int kv_head = entry[0], head = entry[1], n = entry[2], pages = row[2];
    int first = row[3], last = row[4], splits = (int)gridDim.x, split = (int)blockIdx.x;
    int stream = (int)threadIdx.x / LANES, column = (int)threadIdx.x % LANES * 8;
    const int *places = table + places_at + row[1], *numbers = table + numbers_at + row[1];

    // Share out the pages; blocks for which there are none have nothing to do, but the first.
    int pages_per_split = max(fewest_pages, (pages + splits - 1) / splits);
    int used = max(1, (pages + pages_per_split - 1) / pages_per_split);
    int begin = (split * pages_per_split) << page_bits;
    int end = min((split + 1) * pages_per_split, pages) << page_bits;
    wait_for_others();
    if (split >= used) return;

    // Take up the queries.
    float query[N][8], sums[N][8], m[N], total[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        bool mine = i < n && column < K;
        const float* from = q + row[0] * q_stride + (head + i) * K + column;
        unpack(mine ? load8(from) : zero8<float>(), query[i]);
        m[i] = LOWEST, total[i] = 0;
#pragma unroll
        for (int c = 0; c < 8; c++) query[i][c] *= scale * LOG2_E, sums[i][c] = 0;
    }

    // Every block has the same loop for all its threads, which sum over lanes in it.
    for (int base = begin; base < end; base += STREAMS * BATCH) {
        // Read all keys and values of the batch before any is used.
        Eight<HELD> k[BATCH], v[BATCH];
        bool seen[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int key = base + b * STREAMS + stream;
            k[b] = v[b] = zero8<HELD>();
            seen[b] = false;
            if (key < end) {
                int page = key >> page_bits, offset = key & ((1 << page_bits) - 1);
                int position = (numbers[page] << page_bits) + offset;
                seen[b] = first <= position && position <= last;
                if (seen[b] && column < K) {
                    long long block = (long long)places[page] * G + kv_head;
                    long long from = ((block << page_bits) + offset) * K + column;
                    k[b] = load8(k_pages + from);
                    v[b] = load8(v_pages + from);
                }
            }
        }

        // Score.
        float scores[BATCH][N];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float key[8];
            unpack(k[b], key);
#pragma unroll
            for (int i = 0; i < N; i++) {
                float score = 0;
#pragma unroll
                for (int c = 0; c < 8; c++) score += query[i][c] * key[c];
                score = lanes_sum<LANES>(score);
                scores[b][i] = seen[b] ? score : minus_infinity();
            }
        }

        // Correct the sums so far to the new largest score.
#pragma unroll
        for (int i = 0; i < N; i++) {
            float largest = m[i];
#pragma unroll
            for (int b = 0; b < BATCH; b++) largest = fmaxf(largest, scores[b][i]);
            float correction = exp2f(m[i] - largest);
            m[i] = largest, total[i] *= correction;
#pragma unroll
            for (int c = 0; c < 8; c++) sums[i][c] *= correction;
        }

        // Add the batch's values.
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float value[8];
            unpack(v[b], value);
#pragma unroll
            for (int i = 0; i < N; i++) {
                float weight = exp2f(scores[b][i] - m[i]);
                total[i] += weight;
#pragma unroll
                for (int c = 0; c < 8; c++) sums[i][c] += weight * value[c];
            }
        }
    }

    // Merge the streams: of the whole query, or of a split, which is merged by the last to come.
    long long place = (long long)row[0] * H + head;
    long long part = (((long long)blockIdx.z * H + head) * splits + split);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (column == 0) all_m[stream][i] = m[i], all_total[stream][i] = total[i];
#pragma unroll
        for (int c = 0; c < 8; c++) all_o[stream][i][column + c] = sums[i][c];
    }
    __syncthreads();
    for (int item = (int)threadIdx.x; item < n * K; item += THREADS) {
        int i = item / K, c = item % K;
        float largest = LOWEST, weight = 0, sum = 0;
        for (int s = 0; s < STREAMS; s++) largest = fmaxf(largest, all_m[s][i]);
        for (int s = 0; s < STREAMS; s++) {
            float correction = exp2f(all_m[s][i] - largest);
            weight += correction * all_total[s][i];
            sum += correction * all_o[s][i][c];
        }
        float result = weight > 0 ? sum / weight : 0.0f;
        float known = weight > 0 ? (largest + log2f(weight)) * LN_2 : minus_infinity();
        if (used == 1)
            narrow(result, o + (place + i) * K + c);
        else
            o_parts[(part + (long long)i * splits) * K + c] = result;
        if (c == 0 && used == 1) lse[place + i] = known;
        if (c == 0 && used > 1) lse_parts[part + (long long)i * splits] = known;
    }
    if (used > 1 && is_last(arrived + blockIdx.z * gridDim.y + blockIdx.y, used))
        merge_splits<N>(o_parts + (part - split) * K, lse_parts + part - split, n, splits, used, K,
                        o + place * K, lse + place);
}

#define DECODE(N)                                                                               \
    extern "C" __global__ void __launch_bounds__(128) decode_##N(                               \
        const float* q, const HELD* k_pages, const HELD* v_pages, const int* table,             \
        float* o_parts, float* lse_parts, int* arrived, OUT* o, float* lse, int entries_at,     \
        int places_at, int numbers_at, int H, int G, int K, int page_bits, int fewest_pages,    \
        long long q_stride, float scale) {                                                      \
        decode<N>(q, k_pages, v_pages, table, o_parts, lse_parts, arrived, o, lse, entries_at,  \
                  places_at, numbers_at, H, G, K, page_bits, fewest_pages, q_stride, scale);    \
    }

DECODE(1)
DECODE(2)
DECODE(4)
DECODE(8)
