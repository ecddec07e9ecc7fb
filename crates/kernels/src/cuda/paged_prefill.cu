// Causal attention of many new tokens of a sequence over its keys and values in pages, on tensor cores; the formulas are in
// ../paged_attention.rs. As attention.cu's forward pass, with keys and values found through the block table. The number of
// a block's tokens must be a power of 2. paged_attention.cu does the rest.
#include "attention.cuh"

// Up to 64 new tokens of a sequence: their first row in the batch, its place in the sequence, the number of the sequence's
// tokens, and where its block table begins.
struct Chunk {
    unsigned row, position, end, first_block;
};

// The tokens of a sequence, some columns of each.
template <typename T>
struct PagedRows {
    const T* at;
    const unsigned* table;
    int block_shift;
    long long stride;

    __device__ const T* row(int index) const {
        const long long block = table[index >> block_shift];
        return at + ((block << block_shift) + (index & ((1 << block_shift) - 1))) * stride;
    }
};

template <typename T, int D>
__device__ void prefill(
    const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables, const Chunk* chunks,
    int block_shift, int heads, int group, float scale, T* out, long long out_stride) {
    const Chunk chunk = chunks[blockIdx.x / heads];
    const long long width = heads / group * D;
    const unsigned* const table = tables + chunk.first_block;
    const Tile tile = {0, static_cast<int>(chunk.end), static_cast<int>(chunk.position)};
    // Queries and outputs are counted as their keys are.
    const long long before = static_cast<long long>(chunk.row) - chunk.position;
    attend<T, D>(
        Rows<T>{q + before * q_stride, q_stride}, PagedRows<T>{keys, table, block_shift, width},
        PagedRows<T>{values, table, block_shift, width}, tile, heads, group, scale, out + before * out_stride,
        out_stride, nullptr);
}

#define INSTANCE(suffix, T, D)                                                                                       \
    BOUNDED_KERNEL(paged_prefill_##suffix, THREADS, 1,                                                               \
                   (const T* q, long long q_stride, const T* keys, const T* values, const unsigned* tables,          \
                    const Chunk* chunks, int block_shift, int heads, int group, float scale, T* out,                 \
                    long long out_stride)) {                                                                         \
        prefill<T, D>(q, q_stride, keys, values, tables, chunks, block_shift, heads, group, scale, out, out_stride); \
    }
INSTANCE(f16_d64, f16, 64)
INSTANCE(f16_d128, f16, 128)
INSTANCE(bf16_d64, bf16, 64)
INSTANCE(bf16_d128, bf16, 128)
#undef INSTANCE
