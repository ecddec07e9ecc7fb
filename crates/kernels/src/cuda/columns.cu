// Sums over columns in a fixed order, in two steps: a share of the rows each, then the shares.
#include "common.cuh"

// `partial[share, c] = Σ x[row, c]` over the share's rows.
template <typename T>
__device__ void columns_sum(const T* x, int rows, int cols, long long stride, int share, float* partial) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    float sum = 0.0f;
    for (int row = blockIdx.y * share; row < min(rows, (blockIdx.y + 1) * share); ++row) {
        sum += widen(x[row * stride + c]);
    }
    partial[static_cast<long long>(blockIdx.y) * cols + c] = sum;
}

// `out[c] += Σ partial[share, c]`
template <typename T>
__device__ void columns_finish(const float* partial, int shares, int cols, T* out) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    float sum = 0.0f;
    for (int share = 0; share < shares; ++share) {
        sum += partial[static_cast<long long>(share) * cols + c];
    }
    out[c] = narrow<T>(widen(out[c]) + sum);
}

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(columns_sum_##suffix,                                                                                     \
           (const T* x, int rows, int cols, long long stride, int share, float* partial)) {                          \
        columns_sum<T>(x, rows, cols, stride, share, partial);                                                       \
    }                                                                                                                \
    KERNEL(columns_finish_##suffix, (const float* partial, int shares, int cols, T* out)) {                          \
        columns_finish<T>(partial, shares, cols, out);                                                               \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
