// New keys and values into pages, and causal attention over pages, for prefill and decode alike; see
// ../paged_attention.rs. The context of a row is cut into parts that different blocks take, or a long one would keep
// most of the GPU waiting; a second kernel puts the parts together in their order.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int MAX_HEAD_DIM = 256;
constexpr int SHARE = MAX_HEAD_DIM / 32;

// A block column is a token; `N` numbers a thread.
template <typename T, int N>
__device__ void kv_scatter(const T* rows, const unsigned* slots, int width, long long stride, T* pages) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c < width) {
        store<T, N>(pages + static_cast<long long>(slots[blockIdx.x]) * width + c,
                    load<T, N>(rows + blockIdx.x * stride + c));
    }
}

// Where a row's context lies: the blocks of its sequence, and how many tokens it sees, itself included.
struct Context {
    unsigned first_block, num_tokens;
};

// The softmax of some scores, and their weighted sum of values, `head_dim` numbers that lie elsewhere.
struct Part {
    float top, total;
};

// A block takes part `blockIdx.z` of a row's context for one head; its warps take 32 keys in turn.
template <typename T>
__device__ void partial(
    const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables, const Context* contexts,
    int block_size, int heads, int group, int head_dim, int part_tokens, float scale, Part* parts, float* sums) {
    __shared__ float query[MAX_HEAD_DIM];
    __shared__ float warp_sums[WARPS][MAX_HEAD_DIM];
    __shared__ Part warp_parts[WARPS];
    const int row = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Context context = contexts[row];
    const int width = heads / group * head_dim, column = head / group * head_dim;
    const int begin = blockIdx.z * part_tokens;
    const int end = min(begin + part_tokens, static_cast<int>(context.num_tokens));
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        query[d] = widen(q[row * q_stride + head * head_dim + d]) * scale;
    }
    __syncthreads();
    float sum[SHARE] = {}, top = -INFINITY, total = 0.0f;
    for (int key = begin + warp * 32; key < end; key += WARPS * 32) {
        const int count = min(32, end - key);
        long long at = 0;
        float s = -INFINITY;
        if (lane < count) {
            const int token = key + lane;
            const unsigned page = tables[context.first_block + token / block_size];
            at = (static_cast<long long>(page) * block_size + token % block_size) * width + column;
            s = 0.0f;
            for (int d = 0; d < head_dim; ++d) {
                s = fmaf(query[d], widen(keys[at + d]), s);
            }
        }
        const float high = fmaxf(top, warp_max(s)), fade = expf(top - high), p = expf(s - high);
        top = high;
        total = total * fade + warp_sum(p);
        for (int i = 0; i < SHARE; ++i) {
            sum[i] *= fade;
        }
        for (int j = 0; j < count; ++j) {
            const float weight = __shfl_sync(WARP, p, j);
            const unsigned low = __shfl_sync(WARP, static_cast<unsigned>(at), j);
            const unsigned up = __shfl_sync(WARP, static_cast<unsigned>(at >> 32), j);
            const T* const value = values + (static_cast<long long>(up) << 32 | low);
            for (int i = 0; i < SHARE; ++i) {
                if (lane + i * 32 < head_dim) {
                    sum[i] = fmaf(weight, widen(value[lane + i * 32]), sum[i]);
                }
            }
        }
    }
    for (int i = 0; i < SHARE; ++i) {
        if (lane + i * 32 < head_dim) {
            warp_sums[warp][lane + i * 32] = sum[i];
        }
    }
    if (lane == 0) {
        warp_parts[warp] = {top, total};
    }
    __syncthreads();
    float high = -INFINITY;
    for (int w = 0; w < WARPS; ++w) {
        high = fmaxf(high, warp_parts[w].top);
    }
    float factors[WARPS], all = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        factors[w] = warp_parts[w].top == -INFINITY ? 0.0f : expf(warp_parts[w].top - high);
        all += warp_parts[w].total * factors[w];
    }
    const long long to = (static_cast<long long>(row) * heads + head) * gridDim.z + blockIdx.z;
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float x = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            x += warp_sums[w][d] * factors[w];
        }
        sums[to * head_dim + d] = x;
    }
    if (threadIdx.x == 0) {
        parts[to] = {high, all};
    }
}

// A block takes a row of one head.
template <typename T>
__device__ void combine(
    const Part* parts, const float* sums, int num_parts, int heads, int head_dim, T* out, long long out_stride) {
    const int row = blockIdx.x, head = blockIdx.y;
    const long long from = (static_cast<long long>(row) * heads + head) * num_parts;
    float high = -INFINITY, total = 0.0f;
    for (int part = 0; part < num_parts; ++part) {
        high = fmaxf(high, parts[from + part].top);
    }
    for (int part = 0; part < num_parts; ++part) {
        total += parts[from + part].total * expf(parts[from + part].top - high);
    }
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float x = 0.0f;
        for (int part = 0; part < num_parts; ++part) {
            x += sums[(from + part) * head_dim + d] * expf(parts[from + part].top - high);
        }
        out[row * out_stride + head * head_dim + d] = narrow<T>(x / total);
    }
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(kv_scatter_##suffix, (const T* rows, const unsigned* slots, int width, long long stride, T* pages)) {     \
        kv_scatter<T, N>(rows, slots, width, stride, pages);                                                         \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(paged_attention_partial_##suffix,                                                                         \
           (const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables,                  \
            const Context* contexts, int block_size, int heads, int group, int head_dim, int part_tokens,            \
            float scale, Part* parts, float* sums)) {                                                                \
        partial<T>(q, q_stride, keys, values, tables, contexts, block_size, heads, group, head_dim, part_tokens,     \
                   scale, parts, sums);                                                                              \
    }                                                                                                                \
    KERNEL(paged_attention_combine_##suffix, (const Part* parts, const float* sums, int num_parts, int heads,        \
                                              int head_dim, T* out, long long out_stride)) {                         \
        combine<T>(parts, sums, num_parts, heads, head_dim, out, out_stride);                                        \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
