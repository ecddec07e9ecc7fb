// Changes single logits and chooses a token of each row; the rules are in sampling.rs. A block takes a row, of which it
// makes a few passes: the likeliest token; for top-k and top-p each the least likely token that is kept; the draw.
//
// Weights are fixed-point numbers, so their sums are exact in whatever order they are added, and all bits repeat.
// Tokens are ordered by one number, which no two of them share (`place`). The last one of those that are kept is found
// by histograms: of the distances from the likeliest, then, should too many tokens share a bin, of the digits of their
// places; as soon as few enough are left to tell, they are compared with each other.
#include "common.cuh"

using Wide = unsigned long long;

struct Choice {
    float inverse_temperature;  // below 0: the likeliest token
    unsigned top_k;
    float top_p, min_p, uniform;
};
struct Edit {
    unsigned row, id;
    float bias, repetition, penalty;
};

constexpr int THREADS = 1024;
constexpr unsigned NONE = 0xffffffff;
// What the likeliest token weighs. Of less than 2^22 tokens, the sum is less than 2^63.
constexpr float UNIT = 2199023255552.0f;  // 2^41
constexpr int BINS = 2048;
// Bins for a factor of e: 2^-41 is 28.4 such factors, 1819 bins.
constexpr float BINS_PER_NAT = 64.0f;
// Tokens that are compared each with each.
constexpr unsigned FEW = 1024;

__device__ inline unsigned lesser(unsigned a, unsigned b) { return a < b ? a : b; }

__device__ inline Wide warp_sum_to(Wide x) {
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const Wide below = __shfl_up_sync(WARP, x, distance);
        x += threadIdx.x % 32 >= distance ? below : 0;
    }
    return x;
}

// What the threads before this one have, and what all have.
__device__ inline Wide sum_before(Wide x, Wide& all) {
    __shared__ Wide warps[32];
    const unsigned warp = threadIdx.x / 32;
    const Wide sum = warp_sum_to(x);
    __syncthreads();  // the last sums may still be read
    if (threadIdx.x % 32 == 31) {
        warps[warp] = sum;
    }
    __syncthreads();
    Wide before = sum - x;
    all = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) {
        before += w < warp ? warps[w] : 0;
        all += warps[w];
    }
    return before;
}

// Amounts that threads add to, in halves because shared memory adds no more than 32 bits at once.
struct Amounts {
    unsigned low[BINS], high[BINS];

    __device__ Wide at(int i) const { return static_cast<Wide>(high[i]) << 32 | low[i]; }
    __device__ void set(int i, Wide x) {
        low[i] = static_cast<unsigned>(x);
        high[i] = static_cast<unsigned>(x >> 32);
    }
    __device__ void add(int i, Wide x) {
        const unsigned before = atomicAdd(&low[i], static_cast<unsigned>(x));
        const bool carries = before + static_cast<unsigned>(x) < before;
        const unsigned upper = static_cast<unsigned>(x >> 32) + carries;
        if (upper > 0) {
            atomicAdd(&high[i], upper);
        }
    }
    // Between two barriers.
    __device__ void clear() {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
            set(i, 0);
        }
        __syncthreads();
    }
    __device__ Wide total() const {
        Wide own = 0, all;
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
            own += at(i);
        }
        sum_before(own, all);
        return all;
    }
};

struct Found {
    int index;
    Wide before;
};

// The first amount with which the sum reaches `goal`, which is not over all of it, and the sum before.
__device__ inline Found find(const Amounts& amounts, Wide goal) {
    __shared__ Found found;
    const int num_threads = blockDim.x, each = (BINS + num_threads - 1) / num_threads;
    const int begin = min(static_cast<int>(threadIdx.x) * each, BINS), end = min(begin + each, BINS);
    Wide own = 0, all;
    for (int i = begin; i < end; ++i) {
        own += amounts.at(i);
    }
    Wide before = sum_before(own, all);
    if (before < goal && goal <= before + own) {
        int i = begin;
        while (before + amounts.at(i) < goal) {
            before += amounts.at(i++);
        }
        found = {i, before};
    }
    __syncthreads();
    return found;
}

// Orders tokens by their logits, equal ones by their ids: the likelier, the larger. 0 for what is no number.
__device__ inline Wide place(float logit, unsigned id) {
    const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 is 0
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return 0;
    }
    const unsigned image = bits >> 31 ? ~bits : bits | 0x80000000;
    return static_cast<Wide>(image) << 32 | static_cast<unsigned>(~id);
}

// Shows every token of a row to one thread of the block, sixteen bytes at once.
template <typename Visit>
__device__ inline void for_each(const float* row, unsigned len, Visit visit) {
    const unsigned past = static_cast<unsigned>(reinterpret_cast<Wide>(row) / 4 % 4);
    const unsigned head = lesser((4 - past) % 4, len), pieces = (len - head) / 4;
    if (threadIdx.x < head) {
        visit(threadIdx.x, row[threadIdx.x]);
    }
    for (unsigned i = threadIdx.x; i < pieces; i += blockDim.x) {
        const auto piece = load<float, 4>(row + head + i * 4);
        for (int j = 0; j < 4; ++j) {
            visit(head + i * 4 + j, piece.at[j]);
        }
    }
    const unsigned last = head + pieces * 4 + threadIdx.x;
    if (last < len) {
        visit(last, row[last]);
    }
}

// A row as the choice sees it: tokens from place `cut` on are kept.
struct Row {
    const float* logits;
    unsigned len;
    float top, inverse_temperature, min_p;
    Wide cut;

    __device__ Wide weight(float logit) const {
        const float share = expf((logit - top) * inverse_temperature);
        return share >= min_p ? static_cast<Wide>(share * UNIT) : 0;  // a NaN is not
    }
    __device__ int distance(float logit) const {
        return static_cast<int>(fminf((top - logit) * inverse_temperature * BINS_PER_NAT, BINS - 1));
    }
};

// The place of the token with which the likeliest are `count`, or if that is 0 weigh `share` of all: the next `row.cut`.
__device__ inline Wide find_cut(const Row& row, Amounts& bins, unsigned count, float share) {
    __shared__ Wide places[FEW];
    __shared__ Wide amounts[FEW];
    __shared__ unsigned num_left;
    __shared__ Wide cut;
    // The last token is among those at one distance whose places have these digits.
    int distance = 0;
    Wide digits = 0, known = 0, goal = 0;
    const auto amount_left = [&](Wide own, float logit) -> Wide {
        const Wide weight = own >= row.cut && (own & known) == digits ? row.weight(logit) : 0;
        return count > 0 ? weight > 0 : weight;
    };
    for (int level = 0;; ++level) {
        // Of the ids, the upper ten bits are the same.
        const int shift = level == 1 ? 53 : level == 2 ? 42 : level == 3 ? 31 : level == 4 ? 11 : 0;
        bins.clear();
        for_each(row.logits, row.len, [&](unsigned id, float logit) {
            const Wide own = place(logit, id), more = amount_left(own, logit);
            if (more > 0 && level == 0) {
                bins.add(row.distance(logit), more);
            } else if (more > 0 && row.distance(logit) == distance) {
                bins.add(BINS - 1 - static_cast<int>(own >> shift & (BINS - 1)), more);
            }
        });
        __syncthreads();
        if (level == 0) {
            const Wide all = bins.total();
            const double part = ceil(static_cast<double>(all) * static_cast<double>(share));
            goal = count > 0 ? count : part < 1.0 ? 1 : static_cast<Wide>(part);
            if (goal > all) {
                return row.cut;
            }
        }
        const Found found = find(bins, goal);
        goal -= found.before;
        if (level == 0) {
            distance = found.index;
        } else {
            digits |= static_cast<Wide>(BINS - 1 - found.index) << shift;
            known |= static_cast<Wide>(BINS - 1) << shift;
        }

        if (threadIdx.x == 0) {
            num_left = 0;
        }
        __syncthreads();
        for_each(row.logits, row.len, [&](unsigned id, float logit) {
            const Wide own = place(logit, id), more = amount_left(own, logit);
            if (more > 0 && row.distance(logit) == distance) {
                const unsigned at = atomicAdd(&num_left, 1);
                if (at < FEW) {
                    places[at] = own;
                    amounts[at] = more;
                }
            }
        });
        __syncthreads();
        const unsigned left = num_left;
        if (left > FEW) {
            continue;  // never after the last digits, which one token has
        }
        for (unsigned i = threadIdx.x; i < left; i += blockDim.x) {
            Wide before = 0;
            for (unsigned j = 0; j < left; ++j) {
                before += places[j] > places[i] ? amounts[j] : 0;
            }
            if (before < goal && goal <= before + amounts[i]) {
                cut = places[i];
            }
        }
        __syncthreads();
        return cut;
    }
}

// The token in whose share of all kept weights `uniform` falls, in the order of the ids.
__device__ inline unsigned draw(const Row& row, Amounts& segments, float uniform) {
    __shared__ unsigned chosen;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned length = (row.len + BINS * 32 - 1) / (BINS * 32) * 32;
    const auto kept = [&](unsigned id, unsigned end) -> Wide {
        return id < end && place(row.logits[id], id) >= row.cut ? row.weight(row.logits[id]) : 0;
    };
    segments.clear();
    for (unsigned s = warp; s * length < row.len; s += blockDim.x / 32) {
        const unsigned end = lesser((s + 1) * length, row.len);
        Wide sum = 0;
        for (unsigned id = s * length + lane; id < end; id += 32) {
            sum += kept(id, end);
        }
        sum = warp_sum_to(sum);
        if (lane == 31) {
            segments.set(s, sum);
        }
    }
    __syncthreads();
    const Wide all = segments.total();
    const Wide goal = static_cast<Wide>(static_cast<double>(all) * static_cast<double>(uniform)) + 1;
    const Found found = find(segments, goal);
    if (warp == 0) {
        const unsigned begin = found.index * length, end = lesser(begin + length, row.len);
        Wide before = found.before;
        for (unsigned first = begin; first < end; first += 32) {
            const Wide own = kept(first + lane, end), to = before + warp_sum_to(own);
            if (to - own < goal && goal <= to) {
                chosen = first + lane;
            }
            before = __shfl_sync(WARP, to, 31);
        }
    }
    __syncthreads();
    return chosen;
}

__device__ inline unsigned choose(const float* logits, unsigned len, Choice choice) {
    __shared__ Wide scratch[32];
    __shared__ Amounts bins;
    const auto likelier = [](Wide a, Wide b) { return a > b ? a : b; };
    Wide best = 0;
    for_each(logits, len, [&](unsigned id, float logit) { best = likelier(best, place(logit, id)); });
    for (int distance = 16; distance > 0; distance /= 2) {
        best = likelier(best, __shfl_xor_sync(WARP, best, distance));
    }
    best = across_warps(best, Wide(0), scratch, likelier);
    const unsigned image = static_cast<unsigned>(best >> 32);
    if (image < 0x00800000 || image >= 0xff800000) {
        return NONE;  // at most -∞, or ∞
    }
    if (choice.inverse_temperature < 0.0f) {
        return ~static_cast<unsigned>(best);
    }
    const float top = __uint_as_float(image >> 31 ? image & 0x7fffffff : ~image);
    Row row = {logits, len, top, choice.inverse_temperature, choice.min_p, 0};
    if (choice.top_k > 0) {
        row.cut = find_cut(row, bins, choice.top_k, 0.0f);
    }
    if (choice.top_p < 1.0f) {
        row.cut = find_cut(row, bins, 0, choice.top_p);
    }
    return draw(row, bins, choice.uniform);
}

// A thread takes an edit; no two are of the same logit.
BOUNDED_KERNEL(sampling_edit, 256, 1, (float* logits, long long stride, unsigned len, const Edit* edits, int num_edits)) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_edits || edits[i].id >= len) {
        return;
    }
    const Edit edit = edits[i];
    float* const logit = logits + edit.row * stride + edit.id;
    const float biased = *logit + edit.bias;
    // Rounded as the CPU rounds it, not fused with the subtraction.
    const float repeated = biased > 0.0f ? biased / edit.repetition : __fmul_rn(biased, edit.repetition);
    *logit = repeated - edit.penalty;
}

BOUNDED_KERNEL(sampling_choose, THREADS, 1,
               (const float* logits, long long stride, unsigned len, const Choice* choices, unsigned* chosen)) {
    const unsigned id = choose(logits + blockIdx.x * stride, len, choices[blockIdx.x]);
    if (threadIdx.x == 0) {
        chosen[blockIdx.x] = id;
    }
}
