// Numbers from one type to another, and sums of rows that lie apart.
#include "common.cuh"

// `to[i] = from[i]` for `len` numbers.
template <typename From, typename To>
__device__ void cast(const From* from, long long len, To* to) {
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += step) {
        to[i] = narrow<To>(widen(from[i]));
    }
}

// `to = alpha · from + beta · to`, row by row; what `beta` 0 meets is overwritten, whatever it was.
template <typename T>
__device__ void axpby(float alpha, const T* from, long long from_stride, float beta, int cols, long long stride, T* to) {
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= cols) {
        return;
    }
    T* const at = to + blockIdx.x * stride + c;
    const float x = alpha * widen(from[blockIdx.x * from_stride + c]);
    *at = narrow<T>(beta == 0.0f ? x : x + beta * widen(*at));
}

// `x[t, c] += bias[c]`
template <typename T>
__device__ void add_bias(const T* bias, int cols, long long stride, T* x) {
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c < cols) {
        T* const at = x + blockIdx.x * stride + c;
        *at = narrow<T>(widen(*at) + widen(bias[c]));
    }
}

#define INSTANCE(suffix, From, To) \
    KERNEL(cast_##suffix, (const From* from, long long len, To* to)) { cast<From, To>(from, len, to); }
INSTANCE(f32_to_f16, float, f16)
INSTANCE(f32_to_bf16, float, bf16)
INSTANCE(f16_to_f32, f16, float)
INSTANCE(bf16_to_f32, bf16, float)
#undef INSTANCE

#define INSTANCE(suffix, T)                                                                                          \
    KERNEL(axpby_##suffix, (float alpha, const T* from, long long from_stride, float beta, int cols,                 \
                            long long stride, T* to)) {                                                              \
        axpby<T>(alpha, from, from_stride, beta, cols, stride, to);                                                  \
    }                                                                                                                \
    KERNEL(add_bias_##suffix, (const T* bias, int cols, long long stride, T* x)) {                                   \
        add_bias<T>(bias, cols, stride, x);                                                                          \
    }
INSTANCE(f32, float)
INSTANCE(f16, f16)
INSTANCE(bf16, bf16)
#undef INSTANCE
