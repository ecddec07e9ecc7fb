// Dropout as a function of where a number lies: the same keys drop the same numbers as on the CPU; see ../noise.rs.
#include "common.cuh"

__device__ inline unsigned mix(unsigned x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// A key for one of many uses of another.
__device__ inline unsigned long long derive(unsigned long long key, unsigned long long use) {
    unsigned long long z = key + (use + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// 32 random bits for a column under a row's key.
__device__ inline unsigned random_bits(unsigned long long key, unsigned column) {
    return mix(mix(column ^ static_cast<unsigned>(key)) ^ static_cast<unsigned>(key >> 32));
}

// `out = x · keep · scale`, added to `out` if `ADD`; a block column is a row.
template <typename T, bool ADD>
__device__ void dropout(
    unsigned threshold, float scale, const unsigned long long* keys, unsigned long long use, const T* x, int cols,
    long long x_stride, long long out_stride, T* out) {
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    const long long row = blockIdx.x;
    const bool dropped = random_bits(derive(keys[row], use), static_cast<unsigned>(c)) < threshold;
    const float kept = dropped ? 0.0f : widen(x[row * x_stride + c]) * scale;
    T* const at = out + row * out_stride + c;
    *at = narrow<T>(ADD ? widen(*at) + kept : kept);
}

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(dropout_##suffix, (unsigned threshold, float scale, const unsigned long long* keys,                       \
                              unsigned long long use, const T* x, int cols, long long x_stride,                      \
                              long long out_stride, T* out)) {                                                       \
        dropout<T, false>(threshold, scale, keys, use, x, cols, x_stride, out_stride, out);                          \
    }                                                                                                                \
    KERNEL(dropout_add_##suffix, (unsigned threshold, float scale, const unsigned long long* keys,                   \
                                  unsigned long long use, const T* x, int cols, long long x_stride,                  \
                                  long long out_stride, T* out)) {                                                   \
        dropout<T, true>(threshold, scale, keys, use, x, cols, x_stride, out_stride, out);                           \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
