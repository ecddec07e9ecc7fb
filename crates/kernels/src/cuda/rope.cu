// Rotary position embedding; the formula is in ../rope.rs. A thread turns the pairs of N columns of one head; a block
// column is a token. Also with what comes before and after it between products.
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

// Where the keys and values of new tokens go.
template <typename T>
struct Pages {
    const unsigned* slots;
    T* keys;
    T* values;
};

// What follows the product that makes queries, keys and values side by side: the bias, the turn of queries and keys, and,
// where there are pages, keys and values into them. A thread takes two times N columns of one head.
template <typename T, int N, bool PAGED>
__device__ void finish_qkv(
    const T* bias, const float* cos, const float* sin, const unsigned* positions, int half, int heads, int kv_heads,
    long long stride, T* qkv, Pages<T> pages) {
    const int per_head = half / N;
    const int unit = blockIdx.y * blockDim.x + threadIdx.x;
    if (unit >= (heads + 2 * kv_heads) * per_head) {
        return;
    }
    const int head = unit / per_head, i = unit % per_head * N, column = head * 2 * half + i;
    const long long token = blockIdx.x;
    T* const at = qkv + token * stride + column;
    auto a = load<T, N>(at), b = load<T, N>(at + half);
    if (bias) {
        const auto a_bias = load<T, N>(bias + column), b_bias = load<T, N>(bias + column + half);
        for (int j = 0; j < N; ++j) {
            a.at[j] = narrow<T>(widen(a.at[j]) + widen(a_bias.at[j]));
            b.at[j] = narrow<T>(widen(b.at[j]) + widen(b_bias.at[j]));
        }
    }
    const bool is_value = head >= heads + kv_heads;
    if (!is_value) {
        const long long angle = static_cast<long long>(positions[token]) * half + i;
        for (int j = 0; j < N; ++j) {
            const float c = cos[angle + j], s = sin[angle + j];
            const float first = widen(a.at[j]), second = widen(b.at[j]);
            a.at[j] = narrow<T>(first * c - second * s);
            b.at[j] = narrow<T>(second * c + first * s);
        }
    }
    T* to = at;
    if (PAGED && head >= heads) {
        const long long slot = pages.slots[token];
        const int own = column - (is_value ? heads + kv_heads : heads) * 2 * half;
        to = (is_value ? pages.values : pages.keys) + slot * kv_heads * 2 * half + own;
    }
    store<T, N>(to, a);
    store<T, N>(to + half, b);
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(finish_qkv_##suffix,                                                                                      \
           (const T* bias, const float* cos, const float* sin, const unsigned* positions, int half, int heads,       \
            int kv_heads, long long stride, T* qkv)) {                                                               \
        finish_qkv<T, N, false>(bias, cos, sin, positions, half, heads, kv_heads, stride, qkv, {});                  \
    }                                                                                                                \
    KERNEL(finish_qkv_paged_##suffix,                                                                                \
           (const T* bias, const float* cos, const float* sin, const unsigned* positions, int half, int heads,       \
            int kv_heads, long long stride, T* qkv, const unsigned* slots, T* keys, T* values)) {                    \
        finish_qkv<T, N, true>(bias, cos, sin, positions, half, heads, kv_heads, stride, qkv,                        \
                               {slots, keys, values});                                                               \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(rope_##suffix, (const float* cos, const float* sin, float sign, const unsigned* positions, int half,      \
                           int heads, long long stride, T* x)) {                                                     \
        rope<T, N>(cos, sin, sign, positions, half, heads, stride, x);                                               \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
