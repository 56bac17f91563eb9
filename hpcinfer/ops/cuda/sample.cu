// Choice of the next token of every row: what each step means stands in `ops/sample.py`.
//
//   scan     penalises, and finds the best column; for rows with candidates, a key that enough others
//            are above
//   settle   gathers those above it, sums weights, and draws where a rank has the whole vocabulary
//   draw     chooses among keys of all ranks, or among a row's own columns
//   largest  gathers any number of a row's largest
//
// In `scan` and `settle` a block has a slice of a row, and the last block of the row to end merges.
// A candidate is a 64-bit key, as `ops.candidates.pack` makes it; 0 is none.

typedef unsigned long long u64;

// How a row is chosen from, or reported; as `sample.py` lays it out.
struct Job {
    double temperature, log_min_p, top_p;
    long long top_k;
    u64 seed, stream;
    unsigned position;
    int row, noisy, wanted, copy, seen_at, n_seen, banned_at, n_banned;
    float repetition, frequency, presence;
};

// Best of a job's columns, the raw logit there, and a key that `wanted` columns are not below.
struct Found {
    double score;
    u64 least;
    long long token;
    int ticket;
    float raw;
};

// Keys gathered and weights summed for a job, and the token drawn; `wanted` keys are to be put out.
struct Settled {
    double top;
    u64 total;
    long long token;
    int job, wanted, weighs, draws, count, ticket, done;
    float raw;
};

// A draw: keys below `floor` may be missing, and `total` is the sum of the weights after min-p.
struct Draw {
    u64 floor, total;
    long long token;
    int job, done;
    float raw;
    int unused;
};

static_assert(sizeof(Job) == 96 && sizeof(Found) == 32, "as sample.py has them");
static_assert(sizeof(Settled) == 56 && sizeof(Draw) == 40, "as sample.py has them");

constexpr int MOST_THREADS = 512;

// ---- reductions over a block, the result on each of its threads ----

__device__ inline u64 larger(u64 a, u64 b) { return a > b ? a : b; }

__device__ inline u64 lanes_largest(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

__device__ inline u64 lanes_total(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline u64 block_largest(u64 x) {
    __shared__ u64 partial[32];
    x = lanes_largest(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = partial[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) x = larger(x, partial[i]);
    return x;
}

// N sums at a time: the lanes of a warp in pairs, then all pairs, a warp for a sum.
template <int N>
__device__ void block_totals(u64 (&x)[N]) {
    __shared__ u64 pairs[N][MOST_THREADS / 2], totals[N];
    int t = (int)threadIdx.x, lane = t % 32, warp = t / 32, warps = (int)blockDim.x / 32;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        u64 pair = x[i] + __shfl_xor_sync(ALL_LANES, x[i], 16);
        if (lane < 16) pairs[i][warp * 16 + lane] = pair;
    }
    __syncthreads();
    for (int i = warp; i < N; i += warps) {
        u64 total = 0;
        for (int j = lane; j < warps * 16; j += 32) total += pairs[i][j];
        total = lanes_total(total);
        if (lane == 0) totals[i] = total;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = totals[i];
}

// A score and its vocabulary id: the larger score, of equals the lower id; NaN before all.
struct Best {
    double score;
    int id;
};

__device__ inline Best nothing() { return {minus_infinity(), 0x7fffffff}; }

__device__ inline void take(Best& best, double score, int id) {
    bool first_nan = score != score && best.score == best.score;
    if (score > best.score || (score == best.score && id < best.id) || first_nan)
        best.score = score, best.id = id;
}

__device__ inline Best block_best(Best best) {
    __shared__ Best partial[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        double score = __shfl_xor_sync(ALL_LANES, best.score, step);
        int id = __shfl_xor_sync(ALL_LANES, best.id, step);
        take(best, score, id);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    best = partial[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) take(best, partial[i].score, partial[i].id);
    return best;
}

// True in the last block of a row to come here, which then sees what the others have written.
__device__ inline bool is_last(int* ticket) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1) == (int)gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last != 0;
}

// ---- candidates ----

__device__ inline u64 key_of(float x, int id) {
    unsigned bits = x == 0 ? 0u : __float_as_uint(x);
    unsigned high = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (x != x) high = 0xffffffffu;
    return (u64)high << 32 | ~(unsigned)id;
}

__device__ inline float value_of(u64 key) {
    unsigned high = (unsigned)(key >> 32);
    return __uint_as_float(high >> 31 ? high ^ 0x80000000u : ~high);
}

__device__ inline int id_of(u64 key) { return (int)~(unsigned)key; }

// Keys of the columns of a row, and keys as they are.
struct Row {
    const float* x;
    int start;
    __device__ u64 operator()(int i) const { return key_of(x[i], start + i); }
};

struct Keys {
    const u64* keys;
    __device__ u64 operator()(int i) const { return keys[i]; }
};

struct One {
    __device__ u64 operator()(u64) const { return 1; }
};

// Key at which the sum of the items' amounts, the largest key first, reaches a target: no other key
// lies between it and the result, which may be lower. 0 if all together do not reach it.
template <class Items, class Amount>
__device__ u64 reaching(const Items& items, int n, const Amount& amount, double target) {
    constexpr int BITS = 3, WAYS = 1 << BITS;
    int begin = (int)threadIdx.x, step = (int)blockDim.x;

    // Begin at the digit with the first bit in which keys differ.
    u64 high = 0, low = 0, above = 0;
    for (int i = begin; i < n; i += step) {
        u64 key = items(i);
        high = larger(high, key), low = larger(low, ~key);
    }
    high = block_largest(high), low = ~block_largest(low);
    int first = (63 - __clzll((long long)((high ^ low) | 1))) / BITS * BITS;
    u64 prefix = high >> first >> BITS << BITS << first;

    for (int shift = first; shift >= 0; shift -= BITS) {
        // Sum what begins like the prefix, by the least next digit; and count it.
        u64 sums[WAYS + 1] = {};
        for (int i = begin; i < n; i += step) {
            u64 key = items(i);
            if ((key ^ prefix) >> shift >> BITS) continue;
            int digit = (int)(key >> shift) & (WAYS - 1);
            u64 x = amount(key);
#pragma unroll
            for (int d = 0; d < WAYS; d++) sums[d] += digit >= d ? x : 0;
            sums[WAYS]++;
        }
        block_totals(sums);
        if (shift == first && (double)sums[0] < target) return 0;
        if (sums[WAYS] == 1) break;

        // Take the largest digit at which the target is reached.
        u64 rest = 0;
        int digit = 0;
#pragma unroll
        for (int d = 1; d < WAYS; d++) {
            bool reached = (double)(above + sums[d]) >= target;
            if (reached) digit = d;
            if (!reached && rest == 0) rest = sums[d];
        }
        above += rest;
        prefix |= (u64)digit << shift;
    }
    return prefix;
}

// Write the `wanted` largest of n keys, in any order.
template <class Items>
__device__ void put_out(const Items& items, int n, int wanted, u64* keys) {
    __shared__ int slot;
    if (threadIdx.x == 0) slot = 0;
    u64 least = reaching(items, n, One(), (double)wanted);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        u64 key = items(i);
        if (key >= least) keys[atomicAdd(&slot, 1)] = key;
    }
}

// ---- steps of the choice ----

// Copy the logits of a slice, and apply the penalties and bans that fall into it.
__device__ void penalise(const Job& job, const int* seen, const int* counts, const int* banned,
                         const float* raw, float* x, int first, int last, int start) {
    int t = (int)threadIdx.x, threads = (int)blockDim.x;
    for (int i = first + t; i < last; i += threads) x[i] = raw[i];
    __syncthreads();
    for (int i = t; i < job.n_seen; i += threads) {
        int column = seen[job.seen_at + i] - start, count = counts[job.seen_at + i];
        if (column < first || column >= last) continue;
        float value = x[column];
        value = value > 0 ? value / job.repetition : value * job.repetition;
        value = __fsub_rn(value, __fmul_rn(job.frequency, (float)count));
        x[column] = count > 0 ? __fsub_rn(value, job.presence) : value;
    }
    __syncthreads();
    for (int i = t; i < job.n_banned; i += threads) {
        int column = banned[job.banned_at + i] - start;
        if (first <= column && column < last) x[column] = minus_infinity();
    }
    __syncthreads();
}

// The penalised logits of a job; `scan` has made the copies.
__device__ inline const float* row_of(const Job& job, const float* logits, const float* copies,
                                      long long stride, int n) {
    return job.copy < 0 ? logits + job.row * stride : copies + (long long)job.copy * n;
}

// Raw logit of a token, 0 for one that is not here.
__device__ inline float raw_of(long long token, const float* raw, int n, int start) {
    long long column = token - start;
    return column >= 0 && column < n ? raw[column] : 0;
}

// Four random words by Philox4x32-10, for the ids 4·block .. 4·block + 3.
__device__ inline void random_words(const Job& job, unsigned block, unsigned (&words)[4]) {
    unsigned c0 = block, c1 = job.position, c2 = (unsigned)job.stream;
    unsigned c3 = (unsigned)(job.stream >> 32);
    unsigned k0 = (unsigned)job.seed, k1 = (unsigned)(job.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 p0 = (u64)c0 * 0xd2511f53u, p1 = (u64)c2 * 0xcd9e8d57u;
        c0 = (unsigned)(p1 >> 32) ^ c1 ^ k0, c1 = (unsigned)p1;
        c2 = (unsigned)(p0 >> 32) ^ c3 ^ k1, c3 = (unsigned)p0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

__device__ inline double gumbel(unsigned word) {
    return -log(-log(((double)word + 0.5) * 2.3283064365386963e-10));
}

__device__ inline double gumbel_of(const Job& job, int id) {
    unsigned words[4];
    random_words(job, (unsigned)id >> 2, words);
    unsigned low = id & 1 ? words[1] : words[0], high = id & 1 ? words[3] : words[2];
    return gumbel(id & 2 ? high : low);
}

// Best noisy logit of a slice. Noise is below -log(1 - u), so that much of it need not be computed.
__device__ Best best_of_slice(const Job& job, const float* x, int first, int last, int start) {
    Best best = nothing();
    int quads = (start + last + 3) / 4;
    for (int quad = (start + first) / 4 + (int)threadIdx.x; quad < quads; quad += (int)blockDim.x) {
        unsigned words[4];
        random_words(job, (unsigned)quad, words);
#pragma unroll
        for (int lane = 0; lane < 4; lane++) {
            int column = 4 * quad + lane - start;
            if (column < first || column >= last) continue;
            double z = x[column] / job.temperature;
            if (z + 0.6932 * (__clz((int)~words[lane]) + 1) < best.score) continue;
            take(best, z + gumbel(words[lane]), start + column);
        }
    }
    return block_best(best);
}

// Softmax weights of a row, in integer units, of what min-p keeps.
struct Weight {
    double temperature, top, lowest, unit;

    __device__ double z(float x) const { return x / temperature; }

    __device__ u64 operator()(float x) const {
        double own = z(x);
        return own >= lowest ? (u64)rint(exp(own - top) * unit) : 0;
    }
};

__device__ inline Weight weight_of(const Job& job, double top, int bits) {
    double z = top / job.temperature;
    return {job.temperature, z, z + job.log_min_p, (double)(1ull << bits)};
}

// Key at which the sum of the weights reaches the nucleus' share: of `total`, or of the top-k's.
template <class Items, class Amount>
__device__ u64 nucleus_end(const Job& job, const Items& items, int n, const Amount& amount,
                           u64 total) {
    if (job.top_k > 0) {
        u64 sum[1] = {};
        for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum[0] += amount(items(i));
        block_totals(sum);
        total = sum[0];
    }
    double share = job.top_p * (double)total;
    return reaching(items, n, amount, share > 1 ? share : 1);
}

// Steps 4 to 7 on n keys in any order, those from `floor` upward the first of the whole vocabulary.
// The result is that of the vocabulary if `done`.
template <class Items>
__device__ void draw_from(const Job& job, const Items& items, int n, u64 floor, u64 total, int bits,
                          long long& token, int& done) {
    int first = (int)threadIdx.x, step = (int)blockDim.x;
    u64 largest = 0;
    for (int i = first; i < n; i += step) largest = larger(largest, items(i));
    Weight weight = weight_of(job, value_of(block_largest(largest)), bits);

    // Shorten the prefix by min-p, and by top-k.
    u64 least = job.top_k > 0 ? reaching(items, n, One(), (double)job.top_k) : 0;
    least = larger(least, floor);
    auto kept = [&](u64 key) { return key >= least && weight.z(value_of(key)) >= weight.lowest; };
    auto amount = [&](u64 key) { return key >= least ? weight(value_of(key)) : 0; };

    // Shorten it to the nucleus.
    if (job.top_p < 1) least = larger(least, nucleus_end(job, items, n, amount, total));

    // Draw from it.
    u64 counts[2] = {};
    Best best = nothing();
    for (int i = first; i < n; i += step) {
        u64 key = items(i);
        counts[0] += key >= floor;
        if (!kept(key)) continue;
        counts[1]++;
        take(best, weight.z(value_of(key)) + gumbel_of(job, id_of(key)), id_of(key));
    }
    block_totals(counts);
    token = block_best(best).id;
    bool within = job.top_k > 0 ? (u64)job.top_k <= counts[0] : counts[1] < counts[0];
    done = floor == 0 || within;
}

// ---- passes over the logits ----

// What a slice leaves to the last block of its row: the largest key of every warp's columns, or the
// best noisy logit and its id.
__device__ void leave_parts(const Job& job, const float* x, u64* parts, int first, int last,
                            int start) {
    int t = (int)threadIdx.x, threads = (int)blockDim.x, slice = (int)blockIdx.x;
    if (job.noisy) {
        Best best = best_of_slice(job, x, first, last, start);
        if (t == 0) parts[2 * slice] = __double_as_longlong(best.score);
        if (t == 0) parts[2 * slice + 1] = best.id;
        return;
    }
    u64 key = 0;
    for (int i = first + t; i < last; i += threads) key = larger(key, key_of(x[i], start + i));
    key = lanes_largest(key);
    if (t % 32 == 0) parts[slice * (threads / 32) + t / 32] = key;
}

// Best of all slices, and a key that `wanted` of the parts are not below, 0 if there are fewer.
__device__ Best merged(const Job& job, const u64* parts, u64& least) {
    int first = (int)threadIdx.x, step = (int)blockDim.x, slices = (int)gridDim.x;
    least = 0;
    if (job.noisy) {
        Best best = nothing();
        for (int i = first; i < slices; i += step)
            take(best, __longlong_as_double(parts[2 * i]), (int)parts[2 * i + 1]);
        return block_best(best);
    }
    int n = slices * (step / 32);
    u64 key = 0;
    for (int i = first; i < n; i += step) key = larger(key, parts[i]);
    key = block_largest(key);
    if (job.wanted > 0) least = reaching(Keys{parts}, n, One(), job.wanted);
    return {value_of(key), id_of(key)};
}

extern "C" __global__ void scan(const Job* jobs, const int* seen, const int* counts,
                                const int* banned, Found* all, const float* logits, float* copies,
                                u64* parts, long long stride, int n, int span, int start) {
    const Job& job = jobs[blockIdx.y];
    Found& found = all[blockIdx.y];
    int slices = (int)gridDim.x, warps = (int)blockDim.x / 32;
    int first = (int)blockIdx.x * span, last = min(first + span, n);
    const float* raw = logits + job.row * stride;
    if (job.copy >= 0)
        penalise(job, seen, counts, banned, raw, copies + (long long)job.copy * n, first, last,
                 start);
    parts += (long long)blockIdx.y * slices * (warps < 2 ? 2 : warps);
    leave_parts(job, row_of(job, logits, copies, stride, n), parts, first, last, start);
    if (!is_last(&found.ticket)) return;

    u64 least;
    Best best = merged(job, parts, least);
    if (threadIdx.x == 0) {
        found.score = best.score, found.token = best.id, found.least = least;
        found.raw = raw_of(best.id, raw, n, start);
    }
}

extern "C" __global__ void settle(const Job* jobs, const Found* all, Settled* records, u64* keys,
                                  const float* logits, const float* copies, u64* gathered,
                                  long long stride, int n, int span, int start, int bits, int room,
                                  int width, int alone) {
    Settled& record = records[blockIdx.y];
    const Job& job = jobs[record.job];
    const Found& found = all[record.job];
    int t = (int)threadIdx.x, threads = (int)blockDim.x;
    int first = (int)blockIdx.x * span, last = min(first + span, n);
    const float* x = row_of(job, logits, copies, stride, n);
    gathered += (long long)blockIdx.y * room;

    // Gather what is above the key that enough are above, as long as there is room, and weigh.
    bool gathers = record.wanted > 0 || record.draws;
    Weight weight = weight_of(job, alone ? found.score : record.top, bits);
    u64 sum[1] = {};
    for (int i = first + t; i < last; i += threads) {
        u64 key = key_of(x[i], start + i);
        if (gathers && key >= found.least) {
            int place = atomicAdd(&record.count, 1);
            if (place < room) gathered[place] = key;
        }
        if (record.weighs) sum[0] += weight(x[i]);
    }
    if (record.weighs) {
        block_totals(sum);
        if (t == 0) atomicAdd(&record.total, sum[0]);
    }
    if (!is_last(&record.ticket)) return;

    // Draw, or put out as many as are wanted.
    int count = record.count, done = count <= room;
    long long token = -1;
    if (record.draws && done)
        draw_from(job, Keys{gathered}, count, found.least, record.total, bits, token, done);
    else if (record.wanted > 0 && done)
        put_out(Keys{gathered}, count, record.wanted, keys + (long long)blockIdx.y * width);
    if (t == 0) {
        record.done = done, record.token = token;
        record.raw = raw_of(token, logits + job.row * stride, n, start);
    }
}

// Among M keys of every record, or, without keys, among all columns of its row.
extern "C" __global__ void draw(const Job* jobs, Draw* records, const u64* keys,
                                const float* logits, const float* copies, long long stride, int n,
                                int start, int bits, int M) {
    Draw& record = records[blockIdx.x];
    const Job& job = jobs[record.job];
    long long token;
    int done;
    if (keys != nullptr) {
        Keys items{keys + (long long)blockIdx.x * M};
        draw_from(job, items, M, record.floor, record.total, bits, token, done);
    } else {
        Row items{row_of(job, logits, copies, stride, n), start};
        draw_from(job, items, n, 0, record.total, bits, token, done);
    }
    if (threadIdx.x == 0) {
        record.token = token, record.done = done;
        record.raw = raw_of(token, logits + job.row * stride, n, start);
    }
}

extern "C" __global__ void largest(const Job* jobs, const int* chosen, u64* keys,
                                  const float* logits, const float* copies, long long stride, int n,
                                  int start, int width) {
    const Job& job = jobs[chosen[blockIdx.x]];
    Row items{row_of(job, logits, copies, stride, n), start};
    put_out(items, n, width, keys + (long long)blockIdx.x * width);
}
