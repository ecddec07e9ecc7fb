// New keys and values into pages, and causal attention of single tokens over pages; see ../paged_attention.rs.
// paged_prefill.cu takes many tokens of a sequence at once.
//
// All that a decoding step does is to read keys and values once. So a block takes one token's key/value head with up to
// eight of the query heads that share it, and one part of the context, or a long one would keep most of the GPU waiting.
// Neighbouring lanes read neighbouring pieces of a key, of 16 bytes where everything is aligned; a warp reads as many keys
// at once as it has lanes for. The sums over a part are put together in the same order every time: of lanes, of warps, and
// by a second kernel, if there is more than one, of parts.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int MAX_HEAD_DIM = 256;
// Numbers of a key that a lane has at most.
constexpr int SHARE = MAX_HEAD_DIM / 32;
constexpr float LOG2_E = 1.4426950408889634f;

// A block column is a token; `N` numbers a thread.
template <typename T, int N>
__device__ void kv_scatter(const T* rows, const unsigned* slots, int width, long long stride, T* pages) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c < width) {
        store<T, N>(pages + static_cast<long long>(slots[blockIdx.x]) * width + c,
                    load<T, N>(rows + blockIdx.x * stride + c));
    }
}

// A token of the batch: where the block table of its sequence begins, how many tokens it sees, itself included, and its
// row of the queries.
struct Token {
    unsigned first_block, num_seen, row;
};

// The softmax of some scores, which are to the base of 2: the largest, and the sum of 2 to the others' distance from it.
// With it goes the sum of values weighed so, `head_dim` numbers that lie elsewhere.
struct Part {
    float top, total;
};

__device__ inline float factor(float top, float high) { return top == -INFINITY ? 0.0f : exp2f(top - high); }

// A lane's numbers of a key or value: pieces of `N`, as far apart as `lanes` lanes reach, zeros beyond the head.
template <typename T, int N>
struct Share {
    Vec<T, N> pieces[SHARE / N];

    __device__ void fetch(const T* head, int lanes, int head_dim) {
#pragma unroll
        for (int i = 0; i < SHARE / N; ++i) {
            const int column = (i * lanes + threadIdx.x % lanes) * N;
            pieces[i] = column < head_dim ? load<T, N>(head + column) : Vec<T, N>{};
        }
    }
    __device__ float at(int i) const { return widen(pieces[i / N].at[i % N]); }
};

// Along x the tokens, along y the key/value heads and tiles of `HEADS` of their query heads, along z the parts.
template <typename T, int N, int HEADS>
__device__ void decode(
    const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables, const Token* tokens,
    int block_size, int heads, int group, int head_dim, int lanes, int part_tokens, float scale, Part* parts, float* sums,
    T* out, long long out_stride) {
    __shared__ float warp_sums[WARPS][HEADS][MAX_HEAD_DIM];
    __shared__ Part warp_parts[WARPS][HEADS];
    const Token token = tokens[blockIdx.x];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = (group + HEADS - 1) / HEADS, kv_head = blockIdx.y / tiles, skipped = blockIdx.y % tiles * HEADS;
    const int first = kv_head * group + skipped, count = min(HEADS, group - skipped);
    const int width = heads / group * head_dim;
    const int begin = blockIdx.z * part_tokens;
    const int end = min(begin + part_tokens, static_cast<int>(token.num_seen));

    float query[HEADS][SHARE], sum[HEADS][SHARE], top[HEADS], total[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        top[h] = -INFINITY;
        total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int column = (i / N * lanes + lane % lanes) * N + i % N;
            const bool is_there = h < count && column < head_dim;
            const long long at = token.row * q_stride + (first + h) * head_dim + column;
            query[h][i] = is_there ? widen(q[at]) * scale * LOG2_E : 0.0f;
            sum[h][i] = 0.0f;
        }
    }

    const int at_once = 32 / lanes;
    for (int chunk = begin + warp * 32; chunk < end; chunk += WARPS * 32) {
        // Each lane finds one of 32 keys for all.
        const unsigned key = min(chunk + lane, end - 1);
        const unsigned slot = tables[token.first_block + key / block_size] * block_size + key % block_size;
        const int steps = (min(32, end - chunk) + at_once - 1) / at_once;
        Share<T, N> next_key, next_value;
        const auto fetch = [&](int step) {
            const long long from = __shfl_sync(WARP, slot, step * at_once + lane / lanes);
            const long long head = from * width + kv_head * head_dim;
            next_key.fetch(keys + head, lanes, head_dim);
            next_value.fetch(values + head, lanes, head_dim);
        };
        fetch(0);
        for (int step = 0; step < steps; ++step) {
            const auto own_key = next_key, own_value = next_value;
            if (step + 1 < steps) {
                fetch(step + 1);
            }
            float score[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                score[h] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                const float x = own_key.at(i);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    score[h] = fmaf(query[h][i], x, score[h]);
                }
            }
            for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    score[h] += __shfl_xor_sync(WARP, score[h], distance);
                }
            }
            if (chunk + step * at_once + lane / lanes >= end) {
                continue;
            }
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                if (score[h] > top[h]) {
                    const float fade = factor(top[h], score[h]);
                    top[h] = score[h];
                    total[h] *= fade;
#pragma unroll
                    for (int i = 0; i < SHARE; ++i) {
                        sum[h][i] *= fade;
                    }
                }
                const float p = exp2f(score[h] - top[h]);
                total[h] += p;
#pragma unroll
                for (int i = 0; i < SHARE; ++i) {
                    sum[h][i] = fmaf(p, own_value.at(i), sum[h][i]);
                }
            }
        }
    }

    // Lanes of the same columns, then warps.
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        for (int distance = lanes; distance < 32; distance *= 2) {
            const float high = fmaxf(top[h], __shfl_xor_sync(WARP, top[h], distance));
            const float fade = factor(top[h], high);
            top[h] = high;
            total[h] *= fade;
            total[h] += __shfl_xor_sync(WARP, total[h], distance);
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                sum[h][i] *= fade;
                sum[h][i] += __shfl_xor_sync(WARP, sum[h][i], distance);
            }
        }
        if (lane == 0) {
            warp_parts[warp][h] = {top[h], total[h]};
        }
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int column = (i / N * lanes + lane) * N + i % N;
            if (lane < lanes && column < head_dim) {
                warp_sums[warp][h][column] = sum[h][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * head_dim; i += THREADS) {
        const int h = i / head_dim, column = i % head_dim;
        float high = -INFINITY, all = 0.0f, x = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            high = fmaxf(high, warp_parts[w][h].top);
        }
        for (int w = 0; w < WARPS; ++w) {
            const float fade = factor(warp_parts[w][h].top, high);
            all += warp_parts[w][h].total * fade;
            x += warp_sums[w][h][column] * fade;
        }
        if (gridDim.z == 1) {
            out[token.row * out_stride + (first + h) * head_dim + column] = narrow<T>(x / all);
            continue;
        }
        const long long to = (static_cast<long long>(blockIdx.x) * heads + first + h) * gridDim.z + blockIdx.z;
        sums[to * head_dim + column] = x;
        if (column == 0) {
            parts[to] = {high, all};
        }
    }
}

// A block takes a token's head. Parts that lie behind the token's context are empty.
template <typename T>
__device__ void combine(
    const Token* tokens, const Part* parts, const float* sums, int num_parts, int heads, int head_dim, T* out,
    long long out_stride) {
    const int head = blockIdx.y;
    const long long from = (static_cast<long long>(blockIdx.x) * heads + head) * num_parts;
    float high = -INFINITY, total = 0.0f;
    for (int part = 0; part < num_parts; ++part) {
        high = fmaxf(high, parts[from + part].top);
    }
    for (int part = 0; part < num_parts; ++part) {
        total += parts[from + part].total * factor(parts[from + part].top, high);
    }
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float x = 0.0f;
        for (int part = 0; part < num_parts; ++part) {
            x += sums[(from + part) * head_dim + d] * factor(parts[from + part].top, high);
        }
        out[tokens[blockIdx.x].row * out_stride + head * head_dim + d] = narrow<T>(x / total);
    }
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(kv_scatter_##suffix, (const T* rows, const unsigned* slots, int width, long long stride, T* pages)) {     \
        kv_scatter<T, N>(rows, slots, width, stride, pages);                                                         \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(suffix, T, N, HEADS)                                                                                \
    BOUNDED_KERNEL(paged_attention_decode_##suffix, THREADS, 1,                                                      \
                   (const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables,          \
                    const Token* tokens, int block_size, int heads, int group, int head_dim, int lanes,              \
                    int part_tokens, float scale, Part* parts, float* sums, T* out, long long out_stride)) {         \
        decode<T, N, HEADS>(q, q_stride, keys, values, tables, tokens, block_size, heads, group, head_dim, lanes,    \
                            part_tokens, scale, parts, sums, out, out_stride);                                       \
    }
INSTANCE(h1_f32_x1, float, 1, 1)
INSTANCE(h1_f32_x4, float, 4, 1)
INSTANCE(h4_f32_x4, float, 4, 4)
INSTANCE(h8_f32_x4, float, 4, 8)
INSTANCE(h1_f16_x1, f16, 1, 1)
INSTANCE(h1_f16_x8, f16, 8, 1)
INSTANCE(h4_f16_x8, f16, 8, 4)
INSTANCE(h8_f16_x8, f16, 8, 8)
INSTANCE(h1_bf16_x1, bf16, 1, 1)
INSTANCE(h1_bf16_x8, bf16, 8, 1)
INSTANCE(h4_bf16_x8, bf16, 8, 4)
INSTANCE(h8_bf16_x8, bf16, 8, 8)
#undef INSTANCE

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(paged_attention_combine_##suffix,                                                                         \
           (const Token* tokens, const Part* parts, const float* sums, int num_parts, int heads, int head_dim,       \
            T* out, long long out_stride)) {                                                                         \
        combine<T>(tokens, parts, sums, num_parts, heads, head_dim, out, out_stride);                                \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
