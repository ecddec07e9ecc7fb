// Causal attention of a tile of queries on tensor cores, as in FlashAttention-2 (<https://arxiv.org/abs/2307.08691>), and
// what it is made of. Head dims 64 and 128 only, f16 since sm_75 and bf16 since sm_80.
#pragma once

#include "mma.cuh"

// A tile's sequence and its first row, as rows of the batch.
struct Tile {
    int start, end, first;
};

// A block's tile, and which of the heads: these go round first, so that the longest tiles of all heads start first.
__device__ inline Tile own_tile(const Tile* tiles, int heads) { return tiles[blockIdx.x / heads]; }
__device__ inline int own_head(int heads) { return blockIdx.x % heads; }

// Rows of the batch, some columns of each.
template <typename T>
struct Rows {
    const T* at;
    long long stride;

    __device__ const T* row(int index) const { return at + index * stride; }
};

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
// Rows of the tile that a block owns: sixteen for each warp.
constexpr int OWN = WARPS * 16;
constexpr float LOG2_E = 1.4426950408889634f;

// 2^x, and 0 where that is no normal number.
__device__ inline float power_of_2(float x) {
#ifdef __CUDACC__
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return exp2f(x);
#endif
}

// A row of a tile in shared memory is wider by 16 bytes, so that eight rows lie in different banks.
template <int D>
constexpr int WIDTH = D + 8;

// Starts to copy rows `first..first + ROWS`, zeros from `end` on.
template <typename T, int D, int ROWS, typename From>
__device__ inline void copy_tile(T* tile, From rows, int first, int end) {
    constexpr int PIECES = D / 8;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, col = i % PIECES * 8;
        const bool filled = first + row < end;
        const T* const from = rows.row(filled ? first + row : end - 1) + col;
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
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
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
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
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
// used, the other is on its way. The log-sum-exps are not written if there is no place for them.
template <typename T, int D, typename Keys>
__device__ inline void attend(
    Rows<T> q, Keys k, Keys v, Tile tile, int heads, int group, float scale, T* out, long long out_stride, float* lse) {
    constexpr int KEYS = 64;
    __shared__ __align__(16) T k_tile[KEYS * WIDTH<D>];
    __shared__ __align__(16) T v_tile[KEYS * WIDTH<D>];
    const int head = own_head(heads), kv_head = head / group;
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
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
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
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
                high = fmaxf(high, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
            }
            high = row_max(high);
            // Where every score so far is −∞, what is masked must be 0 still, and not ∞ − ∞.
            const float shift = high == -INFINITY ? 0.0f : -high * to_log2;
            const float fade = power_of_2(fmaf(top[half], to_log2, shift));
            top[half] = high;
            float more = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    s[n][i] = power_of_2(fmaf(s[n][i], to_log2, shift));
                    more += s[n][i];
                }
            }
            total[half] = total[half] * fade + more;
#pragma unroll
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (lse && lane % 4 == 0 && own + half * 8 < tile.end) {
            lse[static_cast<long long>(own + half * 8) * heads + head] = top[half] * scale + logf(all[half]);
        }
    }
}
