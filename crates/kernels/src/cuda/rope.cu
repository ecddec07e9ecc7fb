// Rotary position embedding; the formula is in ../rope.rs. A thread turns the pairs of N columns of one head; a block
// column is a token.
#include "common.cuh"

template <typename T, int N>
__device__ void rope(
    const float* cos, const float* sin, float sign, const unsigned* positions, int half, int heads, long long stride,
    T* x) {
    const int per_head = half / N;
    const int unit = blockIdx.y * blockDim.x + threadIdx.x;
    if (unit >= heads * per_head) {
        return;
    }
    const int i = unit % per_head * N;
    T* const at = x + blockIdx.x * stride + static_cast<long long>(unit / per_head) * 2 * half + i;
    const long long angle = static_cast<long long>(positions[blockIdx.x]) * half + i;
    auto a = load<T, N>(at), b = load<T, N>(at + half);
    for (int j = 0; j < N; ++j) {
        const float c = cos[angle + j], s = sign * sin[angle + j];
        const float first = widen(a.at[j]), second = widen(b.at[j]);
        a.at[j] = narrow<T>(first * c - second * s);
        b.at[j] = narrow<T>(second * c + first * s);
    }
    store<T, N>(at, a);
    store<T, N>(at + half, b);
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(rope_##suffix, (const float* cos, const float* sin, float sign, const unsigned* positions, int half,      \
                           int heads, long long stride, T* x)) {                                                     \
        rope<T, N>(cos, sin, sign, positions, half, heads, stride, x);                                               \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
