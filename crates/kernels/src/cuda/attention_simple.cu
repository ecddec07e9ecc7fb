// Causal attention for every number type and head dim up to 256, without tensor cores: f32, small models, and
// bf16 before sm_80. A warp takes a row, 32 rows of the other side at a time: first each lane scores one of them, then
// all lanes add them up, each its share of the columns. Blocks are tiles times heads, these going round first. Also what
// attention.cu's backward pass begins with.
#include "common.cuh"

struct Tile {
    int start, end, first;
};

constexpr int WARPS = 4;
constexpr int OWN = 64;
constexpr int MAX_HEAD_DIM = 256;
constexpr int SHARE = MAX_HEAD_DIM / 32;

template <typename T>
struct Rows {
    const T* at;
    long long stride;
};

template <typename T>
__device__ inline void keep_row(const T* row, int head_dim, float* kept) {
    for (int d = threadIdx.x % 32; d < head_dim; d += 32) {
        kept[d] = widen(row[d]);
    }
}

template <typename T>
__device__ inline float dot(const float* kept, const T* row, int head_dim) {
    float sum = 0.0f;
    for (int d = 0; d < head_dim; ++d) {
        sum = fmaf(kept[d], widen(row[d]), sum);
    }
    return sum;
}

// `sum += Σ_j weight of lane j · row first + j`
template <typename T>
__device__ inline void add_rows(float (&sum)[SHARE], float weight, Rows<T> rows, int first, int count, int head_dim) {
    for (int j = 0; j < count; ++j) {
        const float w = __shfl_sync(WARP, weight, j);
        for (int i = 0; i < SHARE; ++i) {
            const int d = threadIdx.x % 32 + i * 32;
            if (d < head_dim) {
                sum[i] = fmaf(w, widen(rows.at[(first + j) * rows.stride + d]), sum[i]);
            }
        }
    }
}

template <typename T>
__device__ inline void write_row(const float (&sum)[SHARE], float factor, T* row, int head_dim) {
    for (int i = 0; i < SHARE; ++i) {
        const int d = threadIdx.x % 32 + i * 32;
        if (d < head_dim) {
            row[d] = narrow<T>(sum[i] * factor);
        }
    }
}

template <typename T>
__device__ void forward(
    Rows<T> q, Rows<T> k, Rows<T> v, const Tile* tiles, int heads, int group, int head_dim, float scale, T* out,
    long long out_stride, float* lse) {
    __shared__ float kept[WARPS][MAX_HEAD_DIM];
    const Tile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    k.at += head / group * head_dim;
    v.at += head / group * head_dim;
    for (int row = tile.first + warp; row < min(tile.first + OWN, tile.end); row += WARPS) {
        keep_row(q.at + row * q.stride + head * head_dim, head_dim, kept[warp]);
        __syncwarp();
        float sum[SHARE] = {}, top = -INFINITY, total = 0.0f;
        for (int key = tile.start; key <= row; key += 32) {
            const int count = min(32, row + 1 - key);
            const float s =
                lane < count ? scale * dot(kept[warp], k.at + (key + lane) * k.stride, head_dim) : -INFINITY;
            const float high = fmaxf(top, warp_max(s)), fade = expf(top - high), p = expf(s - high);
            top = high;
            total = total * fade + warp_sum(p);
            for (int i = 0; i < SHARE; ++i) {
                sum[i] *= fade;
            }
            add_rows(sum, p, v, key, count, head_dim);
        }
        write_row(sum, 1.0f / total, out + row * out_stride + head * head_dim, head_dim);
        if (lane == 0) {
            lse[static_cast<long long>(row) * heads + head] = top + logf(total);
        }
        __syncwarp();
    }
}

// `delta = Σ_d dout ⊙ out`; a warp takes a row of one head.
template <typename T>
__device__ void delta(Rows<T> out, Rows<T> dout, int rows, int heads, int head_dim, float* delta) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (row >= rows) {
        return;
    }
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < head_dim; d += 32) {
        const int at = head * head_dim + d;
        sum += widen(out.at[row * out.stride + at]) * widen(dout.at[row * dout.stride + at]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        delta[static_cast<long long>(row) * heads + head] = sum;
    }
}

template <typename T>
__device__ void backward_queries(
    Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> dout, const float* lse, const float* delta, const Tile* tiles, int heads,
    int group, int head_dim, float scale, T* dq, long long stride) {
    __shared__ float kept[WARPS][2][MAX_HEAD_DIM];
    const Tile tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    k.at += head / group * head_dim;
    v.at += head / group * head_dim;
    for (int row = tile.first + warp; row < min(tile.first + OWN, tile.end); row += WARPS) {
        keep_row(q.at + row * q.stride + head * head_dim, head_dim, kept[warp][0]);
        keep_row(dout.at + row * dout.stride + head * head_dim, head_dim, kept[warp][1]);
        __syncwarp();
        const long long saved = static_cast<long long>(row) * heads + head;
        float sum[SHARE] = {};
        for (int key = tile.start; key <= row; key += 32) {
            const int count = min(32, row + 1 - key);
            float ds = 0.0f;
            if (lane < count) {
                const float s = scale * dot(kept[warp][0], k.at + (key + lane) * k.stride, head_dim);
                const float dp = dot(kept[warp][1], v.at + (key + lane) * v.stride, head_dim);
                ds = expf(s - lse[saved]) * (dp - delta[saved]);
            }
            add_rows(sum, ds, k, key, count, head_dim);
        }
        write_row(sum, scale, dq + row * stride + head * head_dim, head_dim);
        __syncwarp();
    }
}

template <typename T>
__device__ void backward_keys(
    Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> dout, const float* lse, const float* delta, const Tile* tiles, int heads,
    int group, int head_dim, float scale, T* dk, T* dv, long long stride) {
    __shared__ float kept[WARPS][2][MAX_HEAD_DIM];
    const int kv_heads = heads / group;
    const Tile tile = tiles[blockIdx.x / kv_heads];
    const int kv_head = blockIdx.x % kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = tile.first + warp; row < min(tile.first + OWN, tile.end); row += WARPS) {
        keep_row(k.at + row * k.stride + kv_head * head_dim, head_dim, kept[warp][0]);
        keep_row(v.at + row * v.stride + kv_head * head_dim, head_dim, kept[warp][1]);
        __syncwarp();
        float dk_sum[SHARE] = {}, dv_sum[SHARE] = {};
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const Rows<T> q_head = {q.at + head * head_dim, q.stride};
            const Rows<T> dout_head = {dout.at + head * head_dim, dout.stride};
            for (int query = row; query < tile.end; query += 32) {
                const int count = min(32, tile.end - query);
                float p = 0.0f, ds = 0.0f;
                if (lane < count) {
                    const long long saved = static_cast<long long>(query + lane) * heads + head;
                    const float s = scale * dot(kept[warp][0], q_head.at + (query + lane) * q.stride, head_dim);
                    const float dp = dot(kept[warp][1], dout_head.at + (query + lane) * dout.stride, head_dim);
                    p = expf(s - lse[saved]);
                    ds = p * (dp - delta[saved]);
                }
                add_rows(dv_sum, p, dout_head, query, count, head_dim);
                add_rows(dk_sum, ds, q_head, query, count, head_dim);
            }
        }
        write_row(dk_sum, scale, dk + row * stride + kv_head * head_dim, head_dim);
        write_row(dv_sum, 1.0f, dv + row * stride + kv_head * head_dim, head_dim);
        __syncwarp();
    }
}

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(attention_simple_forward_##suffix,                                                                        \
           (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const Tile* tiles,          \
            int heads, int group, int head_dim, float scale, T* out, long long out_stride, float* lse)) {            \
        forward<T>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, tiles, heads, group, head_dim, scale, out,         \
                   out_stride, lse);                                                                                 \
    }                                                                                                                \
    KERNEL(attention_delta_##suffix,                                                                                 \
           (const T* out, long long out_stride, const T* dout, long long dout_stride, int rows, int heads,           \
            int head_dim, float* to)) {                                                                              \
        delta<T>({out, out_stride}, {dout, dout_stride}, rows, heads, head_dim, to);                                 \
    }                                                                                                                \
    KERNEL(attention_simple_backward_queries_##suffix,                                                               \
           (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const T* dout,              \
            long long out_stride, const float* lse, const float* delta, const Tile* tiles, int heads, int group,     \
            int head_dim, float scale, T* dq, long long stride)) {                                                   \
        backward_queries<T>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, {dout, out_stride}, lse, delta, tiles,    \
                            heads, group, head_dim, scale, dq, stride);                                              \
    }                                                                                                                \
    KERNEL(attention_simple_backward_keys_##suffix,                                                                  \
           (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const T* dout,              \
            long long out_stride, const float* lse, const float* delta, const Tile* tiles, int heads, int group,     \
            int head_dim, float scale, T* dk, T* dv, long long stride)) {                                            \
        backward_keys<T>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, {dout, out_stride}, lse, delta, tiles,       \
                         heads, group, head_dim, scale, dk, dv, stride);                                             \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
