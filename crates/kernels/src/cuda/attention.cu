// Causal attention inside each sequence of a packed batch, forward and backward, with grouped key/value heads; the
// formulas are in ../attention.rs. Tiles of queries or keys go to tensor cores (attention.cuh). The backward pass
// walks everything twice, once for the gradients of keys and values and once for those of queries, so that nothing is
// added out of turn and every bit repeats.
//
// Head dims 64 and 128 only, f16 since sm_75 and bf16 since sm_80; attention_simple.cu does the rest.
#include "attention.cuh"

// As many rows of the other side as registers leave room for.
template <int D>
constexpr int OTHER = D == 64 ? 64 : 32;

// The softmax's gradient, `p ⊙ (dp − delta)`, in the place of `dp`.
template <int N>
__device__ inline void scores_backward(const float (&p)[N][4], float (&dp)[N][4], float upper, float lower) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            dp[n][i] = p[n][i] * (dp[n][i] - (i < 2 ? upper : lower));
        }
    }
}

// A block takes 64 keys of one key/value head, and walks the group's query heads in order. Its products are transposed:
// rows are keys, columns are queries.
template <typename T, int D>
__device__ void backward_keys(
    Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> dout, const float* lse, const float* delta, const Tile* tiles, int heads,
    int group, float scale, T* dk, T* dv, long long stride) {
    constexpr int QUERIES = OTHER<D>;
    DYNAMIC_SHARED(shared);
    T* const k_tile = reinterpret_cast<T*>(shared);
    T* const v_tile = k_tile + OWN * WIDTH<D>;
    T* const q_tile = v_tile + OWN * WIDTH<D>;
    T* const dout_tile = q_tile + QUERIES * WIDTH<D>;
    const Tile tile = own_tile(tiles, heads / group);
    const int kv_head = own_head(heads / group);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    k.at += kv_head * D;
    v.at += kv_head * D;
    copy_tile<T, D, OWN>(k_tile, k, tile.first, tile.end);
    copy_tile<T, D, OWN>(v_tile, v, tile.first, tile.end);

    float dk_sum[D / 8][4], dv_sum[D / 8][4];
    clear(dk_sum);
    clear(dv_sum);
    const float to_log2 = scale * LOG2_E;
    const int own = tile.first + warp * 16 + lane / 4;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const Rows<T> q_head = {q.at + head * D, q.stride}, dout_head = {dout.at + head * D, dout.stride};
        for (int query = tile.first; query < tile.end; query += QUERIES) {
            copy_tile<T, D, QUERIES>(q_tile, q_head, query, tile.end);
            copy_tile<T, D, QUERIES>(dout_tile, dout_head, query, tile.end);
            commit_copies();
            wait_for_copies<0>();
            __syncthreads();
            float p[QUERIES / 8][4], ds[QUERIES / 8][4];
            rows_by_rows<T, D, QUERIES>(p, k_tile, warp * 16, q_tile);
            rows_by_rows<T, D, QUERIES>(ds, v_tile, warp * 16, dout_tile);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = query + n * 8 + lane % 4 * 2 + i % 2;
                    const long long row = static_cast<long long>(min(at, tile.end - 1)) * heads + head;
                    const bool seen = at < tile.end && own + i / 2 * 8 <= at;
                    p[n][i] = seen ? exp2f(p[n][i] * to_log2 - lse[row] * LOG2_E) : 0.0f;
                    ds[n][i] = p[n][i] * (ds[n][i] - delta[row]);
                }
            }
            add_product<T, D, QUERIES>(dv_sum, p, dout_tile);
            add_product<T, D, QUERIES>(dk_sum, ds, q_tile);
            __syncthreads();
        }
    }
    store_rows<T, D>(dk_sum, scale, scale, dk + kv_head * D, stride, tile.first + warp * 16, tile.end);
    store_rows<T, D>(dv_sum, 1.0f, 1.0f, dv + kv_head * D, stride, tile.first + warp * 16, tile.end);
}

// A block takes 64 queries of one head.
template <typename T, int D>
__device__ void backward_queries(
    Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> dout, const float* lse, const float* delta, const Tile* tiles, int heads,
    int group, float scale, T* dq, long long stride) {
    constexpr int KEYS = OTHER<D>;
    DYNAMIC_SHARED(shared);
    T* const q_tile = reinterpret_cast<T*>(shared);
    T* const dout_tile = q_tile + OWN * WIDTH<D>;
    T* const k_tile = dout_tile + OWN * WIDTH<D>;
    T* const v_tile = k_tile + KEYS * WIDTH<D>;
    const Tile tile = own_tile(tiles, heads);
    const int head = own_head(heads), kv_head = head / group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    q.at += head * D;
    dout.at += head * D;
    k.at += kv_head * D;
    v.at += kv_head * D;
    copy_tile<T, D, OWN>(q_tile, q, tile.first, tile.end);
    copy_tile<T, D, OWN>(dout_tile, dout, tile.first, tile.end);

    float dq_sum[D / 8][4];
    clear(dq_sum);
    const float to_log2 = scale * LOG2_E;
    const int own = tile.first + warp * 16 + lane / 4;
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const long long row = static_cast<long long>(min(own + half * 8, tile.end - 1)) * heads + head;
        row_lse[half] = lse[row] * LOG2_E;
        row_delta[half] = delta[row];
    }
    const int last = min(tile.first + OWN, tile.end);
    for (int key = tile.start; key < last; key += KEYS) {
        copy_tile<T, D, KEYS>(k_tile, k, key, tile.end);
        copy_tile<T, D, KEYS>(v_tile, v, key, tile.end);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        float p[KEYS / 8][4], ds[KEYS / 8][4];
        rows_by_rows<T, D, KEYS>(p, q_tile, warp * 16, k_tile);
        rows_by_rows<T, D, KEYS>(ds, dout_tile, warp * 16, v_tile);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool seen = key + n * 8 + lane % 4 * 2 + i % 2 <= own + i / 2 * 8;
                p[n][i] = seen ? exp2f(p[n][i] * to_log2 - row_lse[i / 2]) : 0.0f;
            }
        }
        scores_backward<KEYS / 8>(p, ds, row_delta[0], row_delta[1]);
        add_product<T, D, KEYS>(dq_sum, ds, k_tile);
        __syncthreads();
    }
    store_rows<T, D>(dq_sum, scale, scale, dq + head * D, stride, tile.first + warp * 16, tile.end);
}

#define INSTANCE(suffix, T, D)                                                                                       \
    BOUNDED_KERNEL(attention_forward_##suffix, THREADS, 1,                                                           \
                   (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const Tile* tiles,  \
                    int heads, int group, float scale, T* out, long long out_stride, float* lse)) {                  \
        attend<T, D>(Rows<T>{q, q_stride}, Rows<T>{k, kv_stride}, Rows<T>{v, kv_stride}, own_tile(tiles, heads),     \
                     heads, group, scale, out, out_stride, lse);                                                     \
    }                                                                                                                \
    BOUNDED_KERNEL(attention_backward_keys_##suffix, THREADS, 1,                                                     \
                   (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const T* dout,      \
                    long long out_stride, const float* lse, const float* delta, const Tile* tiles, int heads,        \
                    int group, float scale, T* dk, T* dv, long long stride)) {                                       \
        backward_keys<T, D>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, {dout, out_stride}, lse, delta, tiles,    \
                            heads, group, scale, dk, dv, stride);                                                    \
    }                                                                                                                \
    BOUNDED_KERNEL(attention_backward_queries_##suffix, THREADS, 1,                                                  \
                   (const T* q, const T* k, const T* v, long long q_stride, long long kv_stride, const T* dout,      \
                    long long out_stride, const float* lse, const float* delta, const Tile* tiles, int heads,        \
                    int group, float scale, T* dq, long long stride)) {                                              \
        backward_queries<T, D>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, {dout, out_stride}, lse, delta, tiles, \
                               heads, group, scale, dq, stride);                                                     \
    }
INSTANCE(f16_d64, f16, 64)
INSTANCE(f16_d128, f16, 128)
INSTANCE(bf16_d64, bf16, 64)
INSTANCE(bf16_d128, bf16, 128)
#undef INSTANCE
