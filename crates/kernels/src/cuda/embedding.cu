// Rows of a table by their ids, and back; see ../embedding.rs.
#include "common.cuh"

// A block column is a token. What is not `GATHER` scatters: the ids are places in `out`, each at most once.
template <typename T, int N, bool GATHER>
__device__ void embedding_move(
    const T* from, long long from_stride, const unsigned* ids, int cols, long long to_stride, T* to) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= cols) {
        return;
    }
    const long long token = blockIdx.x, row = ids[blockIdx.x];
    const auto moved = load<T, N>(from + (GATHER ? row : token) * from_stride + c);
    store<T, N>(to + (GATHER ? token : row) * to_stride + c, moved);
}

// `table[ids[t]] += dout[t]` in the order of the tokens: a thread owns a column, so nothing is added out of turn.
template <typename T>
__device__ void embedding_add(const T* dout, const unsigned* ids, int tokens, int cols, T* table) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    for (int t = 0; t < tokens; ++t) {
        T* const at = table + static_cast<long long>(ids[t]) * cols + c;
        *at = narrow<T>(widen(*at) + widen(dout[static_cast<long long>(t) * cols + c]));
    }
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(embedding_gather_##suffix, (const T* table, long long table_stride, const unsigned* ids, int cols,        \
                                       long long out_stride, T* out)) {                                              \
        embedding_move<T, N, true>(table, table_stride, ids, cols, out_stride, out);                                 \
    }                                                                                                                \
    KERNEL(embedding_scatter_##suffix, (const T* dout, long long dout_stride, const unsigned* ids, int cols,         \
                                        long long out_stride, T* out)) {                                             \
        embedding_move<T, N, false>(dout, dout_stride, ids, cols, out_stride, out);                                  \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(embedding_add_##suffix, (const T* dout, const unsigned* ids, int tokens, int cols, T* table)) {           \
        embedding_add<T>(dout, ids, tokens, cols, table);                                                            \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
