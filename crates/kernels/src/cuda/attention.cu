// Causal attention inside each sequence of a packed batch, forward and backward, with grouped key/value heads; the
// formulas are in ../attention.rs. Tiles of queries or keys go to tensor cores as in FlashAttention-2
// (<https://arxiv.org/abs/2307.08691>). The backward pass walks everything twice, once for the gradients of keys and
// values and once for those of queries, so that nothing is added out of turn and every bit repeats.
//
// Head dims 64 and 128 only, f16 since sm_75 and bf16 since sm_80; attention_simple.cu does the rest.
#include "mma.cuh"

// A tile's sequence and its first row, as rows of the batch.
struct Tile {
    int start, end, first;
};

// Rows of the batch, some columns of each.
template <typename T>
struct Rows {
    const T* at;
    long long stride;
};

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
// Rows of the tile that a block owns: sixteen for each warp.
constexpr int OWN = WARPS * 16;
constexpr float LOG2_E = 1.4426950408889634f;

// A row of a tile in shared memory is wider by 16 bytes, so that eight rows lie in different banks.
template <int D>
constexpr int WIDTH = D + 8;

// Starts to copy rows `first..first + ROWS`, zeros from `end` on.
template <typename T, int D, int ROWS>
__device__ inline void copy_tile(T* tile, Rows<T> rows, int first, int end) {
    constexpr int PIECES = D / 8;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, col = i % PIECES * 8;
        const bool filled = first + row < end;
        const T* const from = rows.at + (filled ? first + row : end - 1) * rows.stride + col;
        copy_async(tile + row * WIDTH<D> + col, from, filled);
    }
}

// The fragment of A that is rows `row..row + 16` and columns `col..col + 16` of a tile.
template <typename T, int D>
__device__ inline void load_a(unsigned (&a)[4], const T* tile, int row, int col) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + (row + lane % 16) * WIDTH<D> + col + lane / 16 * 8);
}

// Two fragments of B: a tile's rows are B's columns `row..row + 16`, its columns B's rows `col..col + 16`.
template <typename T, int D>
__device__ inline void load_b(unsigned (&b)[4], const T* tile, int row, int col) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, tile + (row + lane % 8 + lane / 16 * 8) * WIDTH<D> + col + lane / 8 % 2 * 8);
}

// Two fragments of B: a tile's rows are B's rows `row..row + 16`, its columns B's columns `col..col + 16`.
template <typename T, int D>
__device__ inline void load_b_transposed(unsigned (&b)[4], const T* tile, int row, int col) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(b, tile + (row + lane % 16) * WIDTH<D> + col + lane / 16 * 8);
}

// `c = a·bᵀ`: sixteen rows of one tile against all `N` rows of another.
template <typename T, int D, int N>
__device__ inline void rows_by_rows(float (&c)[N / 8][4], const T* a_tile, int a_row, const T* b_tile) {
    for (int n = 0; n < N / 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            c[n][i] = 0.0f;
        }
    }
#pragma unroll
    for (int col = 0; col < D; col += 16) {
        unsigned a[4];
        load_a<T, D>(a, a_tile, a_row, col);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            unsigned b[4];
            load_b<T, D>(b, b_tile, n, col);
            mma<T>(c[n / 8], a, b[0], b[1]);
            mma<T>(c[n / 8 + 1], a, b[2], b[3]);
        }
    }
}

// `c += p·b`: sixteen rows of `N` numbers in registers against a tile of `N` rows.
template <typename T, int D, int N>
__device__ inline void add_product(float (&c)[D / 8][4], const float (&p)[N / 8][4], const T* b_tile) {
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const auto& low = p[k / 8];
        const auto& high = p[k / 8 + 1];
        const unsigned a[4] = {
            pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
        for (int col = 0; col < D; col += 16) {
            unsigned b[4];
            load_b_transposed<T, D>(b, b_tile, k, col);
            mma<T>(c[col / 8], a, b[0], b[1]);
            mma<T>(c[col / 8 + 1], a, b[2], b[3]);
        }
    }
}

template <int N>
__device__ inline void clear(float (&c)[N][4]) {
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) {
            c[n][i] = 0.0f;
        }
    }
}

// Sixteen rows of a warp to memory, times a factor for the upper and one for the lower rows; those from `end` on are
// not written.
template <typename T, int D>
__device__ inline void store_rows(
    const float (&c)[D / 8][4], float upper, float lower, T* to, long long stride, int first, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + lane / 4 + half * 8;
        if (row >= end) {
            continue;
        }
        const float factor = half ? lower : upper;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<unsigned*>(to + row * stride + n * 8 + lane % 4 * 2) =
                pack<T>(c[n][half * 2] * factor, c[n][half * 2 + 1] * factor);
        }
    }
}

// The four lanes that share a row.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(WARP, x, 1);
    return x + __shfl_xor_sync(WARP, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(WARP, x, 2));
}

// A block takes 64 queries of one head. The key and value tiles each have one place in shared memory; while one is
// used, the other is on its way.
template <typename T, int D>
__device__ void forward(
    Rows<T> q, Rows<T> k, Rows<T> v, const Tile* tiles, int heads, int group, float scale, T* out, long long out_stride,
    float* lse) {
    constexpr int KEYS = 64;
    __shared__ __align__(16) T k_tile[KEYS * WIDTH<D>];
    __shared__ __align__(16) T v_tile[KEYS * WIDTH<D>];
    const Tile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    q.at += head * D;
    k.at += kv_head * D;
    v.at += kv_head * D;

    copy_tile<T, D, OWN>(k_tile, q, tile.first, tile.end);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    unsigned queries[D / 16][4];
#pragma unroll
    for (int col = 0; col < D; col += 16) {
        load_a<T, D>(queries[col / 16], k_tile, warp * 16, col);
    }
    __syncthreads();

    float sum[D / 8][4];
    clear(sum);
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    const float to_log2 = scale * LOG2_E;
    const int last = min(tile.first + OWN, tile.end);  // no query of the tile sees a key from here on
    const int own = tile.first + warp * 16 + lane / 4;
    copy_tile<T, D, KEYS>(k_tile, k, tile.start, tile.end);
    commit_copies();
    copy_tile<T, D, KEYS>(v_tile, v, tile.start, tile.end);
    commit_copies();
    for (int key = tile.start; key < last; key += KEYS) {
        wait_for_copies<1>();
        __syncthreads();
        float s[KEYS / 8][4];
        clear(s);
#pragma unroll
        for (int col = 0; col < D; col += 16) {
#pragma unroll
            for (int n = 0; n < KEYS; n += 16) {
                unsigned b[4];
                load_b<T, D>(b, k_tile, n, col);
                mma<T>(s[n / 8], queries[col / 16], b[0], b[1]);
                mma<T>(s[n / 8 + 1], queries[col / 16], b[2], b[3]);
            }
        }
        __syncthreads();
        if (key + KEYS < last) {
            copy_tile<T, D, KEYS>(k_tile, k, key + KEYS, tile.end);
        }
        commit_copies();

        if (key + KEYS > tile.first) {  // the diagonal runs through, or the sequence ends here
            for (int n = 0; n < KEYS / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    if (key + n * 8 + lane % 4 * 2 + i % 2 > own + i / 2 * 8) {
                        s[n][i] = -INFINITY;
                    }
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float high = top[half];
            for (int n = 0; n < KEYS / 8; ++n) {
                high = fmaxf(high, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
            }
            high = row_max(high);  // finite: every row sees its sequence's first key
            const float fade = exp2f((top[half] - high) * to_log2);
            top[half] = high;
            float more = 0.0f;
            for (int n = 0; n < KEYS / 8; ++n) {
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    s[n][i] = exp2f((s[n][i] - high) * to_log2);
                    more += s[n][i];
                }
            }
            total[half] = total[half] * fade + more;
            for (int n = 0; n < D / 8; ++n) {
                sum[n][half * 2] *= fade;
                sum[n][half * 2 + 1] *= fade;
            }
        }

        wait_for_copies<1>();
        __syncthreads();
        add_product<T, D, KEYS>(sum, s, v_tile);
        __syncthreads();
        if (key + KEYS < last) {
            copy_tile<T, D, KEYS>(v_tile, v, key + KEYS, tile.end);
        }
        commit_copies();
    }
    wait_for_copies<0>();

    const float all[2] = {row_sum(total[0]), row_sum(total[1])};
    store_rows<T, D>(
        sum, 1.0f / all[0], 1.0f / all[1], out + head * D, out_stride, tile.first + warp * 16, tile.end);
    for (int half = 0; half < 2; ++half) {
        if (lane % 4 == 0 && own + half * 8 < tile.end) {
            lse[static_cast<long long>(own + half * 8) * heads + head] = top[half] * scale + logf(all[half]);
        }
    }
}

// As many rows of the other side as registers leave room for.
template <int D>
constexpr int OTHER = D == 64 ? 64 : 32;

// The softmax's gradient, `p ⊙ (dp − delta)`, in the place of `dp`.
template <int N>
__device__ inline void scores_backward(const float (&p)[N][4], float (&dp)[N][4], float upper, float lower) {
    for (int n = 0; n < N; ++n) {
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
    const Tile tile = tiles[blockIdx.x];
    const int kv_head = blockIdx.y;
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
    const Tile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / group;
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
        forward<T, D>({q, q_stride}, {k, kv_stride}, {v, kv_stride}, tiles, heads, group, scale, out, out_stride,    \
                      lse);                                                                                          \
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
