// The choice of experts: a warp has a token, and its lanes the scores of every 32nd expert.
//
// What is larger goes before, of equal ones the lowest number, and what is no number last.

constexpr int MOST_EXPERTS = 1024, PER_LANE = MOST_EXPERTS / 32;

// Something of a number, none if that is NONE.
constexpr int NONE = 0x7fffffff;

struct Candidate {
    float score;
    int number;
};

__device__ inline bool is_number(float x) { return x == x; }

__device__ inline bool goes_before(const Candidate& a, const Candidate& b) {
    if (a.number == NONE || b.number == NONE) return a.number < b.number;
    if (a.score > b.score || (is_number(a.score) && !is_number(b.score))) return true;
    bool after = b.score > a.score || (is_number(b.score) && !is_number(a.score));
    return !after && a.number < b.number;
}

// The first of the lanes' candidates, on each of them.
__device__ inline Candidate first_of_lanes(Candidate own) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Candidate other = {__shfl_xor_sync(ALL_LANES, own.score, step),
                           __shfl_xor_sync(ALL_LANES, own.number, step)};
        if (goes_before(other, own)) own = other;
    }
    return own;
}

// scores[e] of a token: of a softmax, or the sigmoid of each.
__device__ inline void find_scores(const float* logits, int E, int softmax, float* scores) {
    int lane = (int)threadIdx.x;
    float largest = minus_infinity(), total = 0;
    if (softmax)
        for (int e = lane; e < E; e += 32) largest = fmaxf(largest, logits[e]);
    largest = lanes_max(largest);
    for (int e = lane; e < E; e += 32) {
        float x = logits[e], power = expf(softmax ? x - largest : -fabsf(x));
        scores[e] = softmax ? power : (x >= 0 ? 1.0f : power) / (1.0f + power);
        total += power;
    }
    total = lanes_sum<32>(total);
    if (softmax)
        for (int e = lane; e < E; e += 32) scores[e] /= total;
    __syncwarp();
}

// The best groups of a token, a bit for each; a group counts by its largest score, or by the sum of
// its two largest.
__device__ inline unsigned find_groups(const float* choice, int E, int groups, int top_groups,
                                       int of_two) {
    int lane = (int)threadIdx.x, size = E / groups;
    Candidate own = {0, NONE};
    if (lane < groups) {
        float first = minus_infinity(), second = minus_infinity();
        for (int e = lane * size; e < (lane + 1) * size; e++) {
            second = fmaxf(second, fminf(first, choice[e]));
            first = fmaxf(first, choice[e]);
        }
        own.score = of_two && size > 1 ? first + second : first, own.number = lane;
    }
    unsigned chosen = 0;
    for (int i = 0; i < top_groups; i++) {
        int best = first_of_lanes(own).number;
        if (best == NONE) break;
        chosen |= 1u << best;
        if (best == lane) own.number = NONE;
    }
    return chosen;
}

// ids and weights (T, k) of logits (T, E).
extern "C" __global__ void __launch_bounds__(32)
    route(const float* logits, const float* bias, int* ids, float* weights, int E, int k,
          int softmax, int normalise, float scale, int groups, int top_groups, int of_two) {
    __shared__ float scores[MOST_EXPERTS], choice[MOST_EXPERTS];
    int lane = (int)threadIdx.x;
    ids += (long long)blockIdx.x * k, weights += (long long)blockIdx.x * k;
    find_scores(logits + (long long)blockIdx.x * E, E, softmax, scores);
    for (int e = lane; e < E; e += 32)
        choice[e] = bias == nullptr ? scores[e] : scores[e] + bias[e];
    __syncwarp();
    if (groups > 1) {
        unsigned chosen = find_groups(choice, E, groups, top_groups, of_two);
        __syncwarp();
        for (int e = lane; e < E; e += 32)
            if (!(chosen >> e / (E / groups) & 1)) choice[e] = minus_infinity();
    }

    // Take one after the other from those that are left.
    unsigned taken = 0;
    float total = 0;
    for (int j = 0; j < k; j++) {
        Candidate own = {0, NONE};
        for (int i = 0; i < PER_LANE && lane + 32 * i < E; i++) {
            Candidate other = {choice[lane + 32 * i], lane + 32 * i};
            if (!(taken >> i & 1) && goes_before(other, own)) own = other;
        }
        int best = first_of_lanes(own).number;
        if (best % 32 == lane) taken |= 1u << best / 32;
        total += scores[best];
        if (lane == 0) ids[j] = best;
    }
    __syncwarp();
    for (int j = lane; j < k; j += 32)
        weights[j] = scores[ids[j]] / (normalise ? total + 1e-20f : 1.0f) * scale;
}

// counts[e] += choices of expert e among n.
extern "C" __global__ void count_into(const int* ids, long long* counts, int n, int E) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n || ids[i] < 0 || ids[i] >= E) return;
    atomicAdd(reinterpret_cast<unsigned long long*>(counts) + ids[i], 1ull);
}
