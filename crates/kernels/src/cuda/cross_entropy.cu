// The loss of a chunk of logits and, in their place, its gradient; the head's products around it are cuBLAS's. A block
// takes a row: once for the largest logit and the sum of exponentials, once for the gradient.
#include "common.cuh"

struct Softmax {
    float max, sum;
};

__device__ inline Softmax merge(Softmax a, Softmax b) {
    const float top = fmaxf(a.max, b.max);
    if (top == -INFINITY) {
        return {top, 0.0f};
    }
    return {top, a.sum * expf(a.max - top) + b.sum * expf(b.max - top)};
}

// With `BACKWARD`, `softmax(logits) − onehot(label)` takes the place of the logits.
template <typename T, int N, bool BACKWARD>
__device__ void cross_entropy(T* logits, const unsigned* labels, int vocab, float* losses) {
    __shared__ Softmax scratch[32];
    T* const row = logits + static_cast<long long>(blockIdx.x) * vocab;
    const int label = static_cast<int>(labels[blockIdx.x]);
    Softmax own = {-INFINITY, 0.0f};
    for (int c = threadIdx.x * N; c < vocab; c += blockDim.x * N) {
        const auto v = load<T, N>(row + c);
        float top = own.max;
        for (int i = 0; i < N; ++i) {
            top = fmaxf(top, widen(v.at[i]));
        }
        if (top > own.max) {
            own = {top, own.sum * expf(own.max - top)};
        }
        for (int i = 0; i < N; ++i) {
            own.sum += expf(widen(v.at[i]) - own.max);
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        own = merge(own, {__shfl_xor_sync(WARP, own.max, distance), __shfl_xor_sync(WARP, own.sum, distance)});
    }
    const Softmax all = across_warps(own, Softmax{-INFINITY, 0.0f}, scratch, merge);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = label < vocab ? logf(all.sum) + all.max - widen(row[label]) : NAN;
    }
    if (!BACKWARD) {
        return;
    }
    __syncthreads();  // the label's logit has been read
    const float share = 1.0f / all.sum;
    for (int c = threadIdx.x * N; c < vocab; c += blockDim.x * N) {
        auto v = load<T, N>(row + c);
        for (int i = 0; i < N; ++i) {
            const float p = expf(widen(v.at[i]) - all.max) * share;
            v.at[i] = narrow<T>(c + i == label ? p - 1.0f : p);
        }
        store<T, N>(row + c, v);
    }
}

#define INSTANCE(suffix, T, N)                                                                                       \
    KERNEL(cross_entropy_forward_##suffix, (T * logits, const unsigned* labels, int vocab, float* losses)) {         \
        cross_entropy<T, N, false>(logits, labels, vocab, losses);                                                   \
    }                                                                                                                \
    KERNEL(cross_entropy_backward_##suffix, (T * logits, const unsigned* labels, int vocab, float* losses)) {        \
        cross_entropy<T, N, true>(logits, labels, vocab, losses);                                                    \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
