// Root mean square normalization; the formulas are in ../rms_norm.rs. A block takes a row, and reads it twice: the
// second time from its cache.
#include "common.cuh"

template <typename T, int N, bool ADD>
__device__ void rms_norm(
    const T* x, T* residual, const T* weight, float eps, int cols, long long x_stride, long long y_stride, T* y,
    float* inv_rms) {
    x += blockIdx.x * x_stride;
    residual += ADD ? static_cast<long long>(blockIdx.x) * cols : 0;
    y += blockIdx.x * y_stride;
    float squares = 0.0f;
    for (int c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
        auto v = load<T, N>(x + c);
        if (ADD) {
            const auto r = load<T, N>(residual + c);
            for (int i = 0; i < N; ++i) {
                v.at[i] = narrow<T>(widen(v.at[i]) + widen(r.at[i]));
            }
            store<T, N>(residual + c, v);
        }
        for (int i = 0; i < N; ++i) {
            squares += widen(v.at[i]) * widen(v.at[i]);
        }
    }
    const float inv = rsqrtf(block_sum(squares) / cols + eps);
    if (threadIdx.x == 0) {
        inv_rms[blockIdx.x] = inv;
    }
    for (int c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
        auto v = ADD ? load<T, N>(residual + c) : load<T, N>(x + c);
        const auto w = load<T, N>(weight + c);
        for (int i = 0; i < N; ++i) {
            v.at[i] = narrow<T>(widen(v.at[i]) * inv * widen(w.at[i]));
        }
        store<T, N>(y + c, v);
    }
}

// `dx` is added to.
template <typename T, int N>
__device__ void rms_norm_backward(
    const T* x, const T* weight, const float* inv_rms, const T* dy, int cols, long long x_stride, long long dx_stride,
    T* dx) {
    const long long row = blockIdx.x;
    x += row * x_stride;
    dy += row * cols;
    dx += row * dx_stride;
    float dot = 0.0f;
    for (int c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
        const auto v = load<T, N>(x + c), g = load<T, N>(dy + c), w = load<T, N>(weight + c);
        for (int i = 0; i < N; ++i) {
            dot += widen(g.at[i]) * widen(w.at[i]) * widen(v.at[i]);
        }
    }
    const float inv = inv_rms[row];
    const float along = block_sum(dot) / cols * inv * inv;
    for (int c = threadIdx.x * N; c < cols; c += blockDim.x * N) {
        const auto v = load<T, N>(x + c), g = load<T, N>(dy + c), w = load<T, N>(weight + c);
        auto d = load<T, N>(dx + c);
        for (int i = 0; i < N; ++i) {
            d.at[i] = narrow<T>(widen(d.at[i]) + inv * (widen(g.at[i]) * widen(w.at[i]) - widen(v.at[i]) * along));
        }
        store<T, N>(dx + c, d);
    }
}

// A thread sums a column over a share of the rows, in their order; columns.cu adds the shares.
template <typename T>
__device__ void rms_norm_backward_weight(
    const T* x, const float* inv_rms, const T* dy, int rows, int cols, int share, float* partial) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    float sum = 0.0f;
    for (int row = blockIdx.y * share; row < min(rows, (blockIdx.y + 1) * share); ++row) {
        const long long at = static_cast<long long>(row) * cols + c;
        sum += widen(dy[at]) * widen(x[at]) * inv_rms[row];
    }
    partial[static_cast<long long>(blockIdx.y) * cols + c] = sum;
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(rms_norm_forward_##suffix,                                                                                \
           (const T* x, const T* weight, float eps, int cols, long long x_stride, long long y_stride, T* y,          \
            float* inv_rms)) {                                                                                       \
        rms_norm<T, N, false>(x, nullptr, weight, eps, cols, x_stride, y_stride, y, inv_rms);                        \
    }                                                                                                                \
    KERNEL(rms_norm_add_forward_##suffix,                                                                            \
           (const T* x, T* residual, const T* weight, float eps, int cols, long long y_stride, T* y,                 \
            float* inv_rms)) {                                                                                       \
        rms_norm<T, N, true>(x, residual, weight, eps, cols, cols, y_stride, y, inv_rms);                            \
    }                                                                                                                \
    KERNEL(rms_norm_backward_##suffix, (const T* x, const T* weight, const float* inv_rms, const T* dy, int cols,    \
                                        long long x_stride, long long dx_stride, T* dx)) {                           \
        rms_norm_backward<T, N>(x, weight, inv_rms, dy, cols, x_stride, dx_stride, dx);                              \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(rms_norm_backward_weight_##suffix,                                                                        \
           (const T* x, const float* inv_rms, const T* dy, int rows, int cols, int share, float* partial)) {         \
        rms_norm_backward_weight<T>(x, inv_rms, dy, rows, cols, share, partial);                                     \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
