// SwiGLU; the formulas are in ../swiglu.rs. Gate and up lie side by side in a row; a block column is a row. Rows of both
// matrices may lie apart.
#include "common.cuh"

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T, int N>
__device__ void swiglu_forward(const T* gate_up, long long stride, int inner, long long h_stride, T* h) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= inner) {
        return;
    }
    const T* const gate_at = gate_up + blockIdx.x * stride + c;
    const auto gate = load<T, N>(gate_at), up = load<T, N>(gate_at + inner);
    Vec<T, N> out;
    for (int i = 0; i < N; ++i) {
        const float g = widen(gate.at[i]);
        out.at[i] = narrow<T>(g * sigmoid(g) * widen(up.at[i]));
    }
    store<T, N>(h + blockIdx.x * h_stride + c, out);
}

// In place: gate and up become their gradients, dh becomes the forward output once more.
template <typename T, int N>
__device__ void swiglu_backward(T* gate_up, long long stride, int inner, long long dh_stride, T* dh) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= inner) {
        return;
    }
    T* const gate_at = gate_up + blockIdx.x * stride + c;
    T* const dh_at = dh + blockIdx.x * dh_stride + c;
    auto gate = load<T, N>(gate_at), up = load<T, N>(gate_at + inner), d = load<T, N>(dh_at);
    for (int i = 0; i < N; ++i) {
        const float g = widen(gate.at[i]), u = widen(up.at[i]), grad = widen(d.at[i]);
        const float s = sigmoid(g);
        gate.at[i] = narrow<T>(grad * u * s * (1.0f + g * (1.0f - s)));
        up.at[i] = narrow<T>(grad * g * s);
        d.at[i] = narrow<T>(g * s * u);
    }
    store<T, N>(gate_at, gate);
    store<T, N>(gate_at + inner, up);
    store<T, N>(dh_at, d);
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(swiglu_forward_##suffix, (const T* gate_up, long long stride, int inner, long long h_stride, T* h)) {     \
        swiglu_forward<T, N>(gate_up, stride, inner, h_stride, h);                                                   \
    }                                                                                                                \
    KERNEL(swiglu_backward_##suffix, (T * gate_up, long long stride, int inner, long long dh_stride, T* dh)) {       \
        swiglu_backward<T, N>(gate_up, stride, inner, dh_stride, dh);                                                \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
