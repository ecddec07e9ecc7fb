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

// Queries in shared memory with what is known of them; the log-sum-exps are those of base 2.
template <typename T, int D>
struct Queries {
    T q[OTHER<D> * WIDTH<D>], dout[OTHER<D> * WIDTH<D>];
    float lse[OTHER<D>], delta[OTHER<D>];
};

template <typename T, int D>
struct Keys {
    T k[OTHER<D> * WIDTH<D>], v[OTHER<D> * WIDTH<D>];
};

// What a block has in shared memory: its own rows of two matrices, and of the other side what it works with and, where
// copies are asynchronous, what comes next. As `Path::shared` counts.
template <typename T, int D, typename Other>
struct Stages {
    T own[2][OWN * WIDTH<D>];
    Other other[2];
};

// A block takes 64 keys of one key/value head, and walks the group's query heads in order. Its products are transposed:
// rows are keys, columns are queries.
template <typename T, int D>
__device__ void backward_keys(
    Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> dout, const float* lse, const float* delta, const Tile* tiles, int heads,
    int group, float scale, T* dk, T* dv, long long stride) {
    constexpr int QUERIES = OTHER<D>;
    DYNAMIC_SHARED(shared);
    auto& stages = *reinterpret_cast<Stages<T, D, Queries<T, D>>*>(shared);
    const Tile tile = own_tile(tiles, heads / group);
    const int kv_head = own_head(heads / group);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    k.at += kv_head * D;
    v.at += kv_head * D;
    const auto start_copies = [&](Queries<T, D>& to, int head, int query) {
        copy_tile<T, D, QUERIES>(to.q, Rows<T>{q.at + head * D, q.stride}, query, tile.end);
        copy_tile<T, D, QUERIES>(to.dout, Rows<T>{dout.at + head * D, dout.stride}, query, tile.end);
        commit_copies();
    };
    // A thread's share of log-sum-exps and deltas. Behind the sequence's end p is to be 2^−∞.
    const bool first_half = threadIdx.x < QUERIES, second_half = !first_half && threadIdx.x < 2 * QUERIES;
    const int at = threadIdx.x % QUERIES;
    const auto read_saved = [&](int head, int query) {
        const bool filled = query + at < tile.end;
        const long long row = static_cast<long long>(query + at) * heads + head;
        if (first_half) {
            return filled ? lse[row] * LOG2_E : INFINITY;
        }
        return second_half && filled ? delta[row] : 0.0f;
    };
    const auto keep_saved = [&](Queries<T, D>& in, float saved) {
        if (first_half) {
            in.lse[at] = saved;
        } else if (second_half) {
            in.delta[at] = saved;
        }
    };
    copy_tile<T, D, OWN>(stages.own[0], k, tile.first, tile.end);
    copy_tile<T, D, OWN>(stages.own[1], v, tile.first, tile.end);

    float dk_sum[D / 8][4], dv_sum[D / 8][4];
    clear(dk_sum);
    clear(dv_sum);
    const float to_log2 = scale * LOG2_E;
    const int own = tile.first + warp * 16 + lane / 4;
    const int last_head = (kv_head + 1) * group;
    int head = kv_head * group, query = tile.first, stage = 0;
    start_copies(stages.other[0], head, query);
    keep_saved(stages.other[0], read_saved(head, query));
    while (head < last_head) {
        wait_for_copies<0>();
        __syncthreads();  // what is here has landed, and nobody needs the other stage any more
        const Queries<T, D>& here = stages.other[stage];
        const int this_query = query;
        query += QUERIES;
        if (query >= tile.end) {
            query = tile.first;
            ++head;
        }
        const bool more = head < last_head;
        float saved = 0.0f;
        if (more) {
            saved = read_saved(head, query);
            if (since_sm_80()) {
                start_copies(stages.other[stage ^ 1], head, query);
            }
        }
        float p[QUERIES / 8][4], ds[QUERIES / 8][4];
        rows_by_rows<T, D, QUERIES>(p, stages.own[0], warp * 16, here.q);
        rows_by_rows<T, D, QUERIES>(ds, stages.own[1], warp * 16, here.dout);
        const bool diagonal = this_query < tile.first + OWN;
#pragma unroll
        for (int n = 0; n < QUERIES / 8; ++n) {
            const int col = n * 8 + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool seen = !diagonal || own + i / 2 * 8 <= this_query + col + i % 2;
                p[n][i] = seen ? power_of_2(fmaf(p[n][i], to_log2, -here.lse[col + i % 2])) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - here.delta[col + i % 2]);
            }
        }
        add_product<T, D, QUERIES>(dv_sum, p, here.dout);
        add_product<T, D, QUERIES>(dk_sum, ds, here.q);
        if (since_sm_80()) {
            stage ^= 1;
        } else {
            __syncthreads();
            if (more) {
                start_copies(stages.other[0], head, query);
            }
        }
        if (more) {
            keep_saved(stages.other[stage], saved);
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
    auto& stages = *reinterpret_cast<Stages<T, D, Keys<T, D>>*>(shared);
    const Tile tile = own_tile(tiles, heads);
    const int head = own_head(heads), kv_head = head / group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    q.at += head * D;
    dout.at += head * D;
    k.at += kv_head * D;
    v.at += kv_head * D;
    const auto start_copies = [&](Keys<T, D>& to, int key) {
        copy_tile<T, D, KEYS>(to.k, k, key, tile.end);
        copy_tile<T, D, KEYS>(to.v, v, key, tile.end);
        commit_copies();
    };
    copy_tile<T, D, OWN>(stages.own[0], q, tile.first, tile.end);
    copy_tile<T, D, OWN>(stages.own[1], dout, tile.first, tile.end);

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
    int stage = 0;
    start_copies(stages.other[0], tile.start);
    for (int key = tile.start; key < last; key += KEYS) {
        wait_for_copies<0>();
        __syncthreads();  // what is here has landed, and nobody needs the other stage any more
        const Keys<T, D>& here = stages.other[stage];
        const bool more = key + KEYS < last;
        if (more && since_sm_80()) {
            start_copies(stages.other[stage ^ 1], key + KEYS);
        }
        float p[KEYS / 8][4], ds[KEYS / 8][4];
        rows_by_rows<T, D, KEYS>(p, stages.own[0], warp * 16, here.k);
        rows_by_rows<T, D, KEYS>(ds, stages.own[1], warp * 16, here.v);
        const bool diagonal = key + KEYS > tile.first;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool seen = !diagonal || key + n * 8 + lane % 4 * 2 + i % 2 <= own + i / 2 * 8;
                p[n][i] = seen ? power_of_2(fmaf(p[n][i], to_log2, -row_lse[i / 2])) : 0.0f;
            }
        }
        scores_backward<KEYS / 8>(p, ds, row_delta[0], row_delta[1]);
        add_product<T, D, KEYS>(dq_sum, ds, here.k);
        if (since_sm_80()) {
            stage ^= 1;
        } else {
            __syncthreads();
            if (more) {
                start_copies(stages.other[0], key + KEYS);
            }
        }
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
