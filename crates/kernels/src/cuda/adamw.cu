// The norm of all gradients, clipping and AdamW, over any number of tensors in three launches; the formulas are in
// ../adamw.rs and ../clip.rs. The host cuts the tensors into chunks of at most CHUNK numbers; a block takes one.
#include "common.cuh"

constexpr int CHUNK = 4096;

struct Tensor {
    float* param;
    float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    long long len;
};
struct Chunk {
    unsigned tensor;
    unsigned index;
};
// `finite` is 1 or 0: a step whose gradients overflowed must change nothing.
struct Clip {
    double norm;
    float coefficient;
    unsigned finite;
};
struct Factors {
    float decay, toward_grad, beta2, toward_square, step_size, root_correction, eps;
};

__device__ inline double block_sum_f64(double x) {
    __shared__ double lanes[1024];
    lanes[threadIdx.x] = x;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) {
            lanes[threadIdx.x] += lanes[threadIdx.x + half];
        }
        __syncthreads();
    }
    return lanes[0];
}

KERNEL(adamw_sum_of_squares, (const Tensor* tensors, const Chunk* chunks, double* partial)) {
    const Chunk chunk = chunks[blockIdx.x];
    const Tensor tensor = tensors[chunk.tensor];
    double sum = 0.0;
    for (int i = threadIdx.x; i < CHUNK; i += blockDim.x) {
        const long long at = static_cast<long long>(chunk.index) * CHUNK + i;
        if (at < tensor.len) {
            const double g = tensor.grad[at];
            sum += g * g;
        }
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// `unscale` takes loss scaling out of the gradients; it is a part of the coefficient.
KERNEL(adamw_clip, (const double* partial, int num_chunks, double unscale, double max_norm, Clip* clip)) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < num_chunks; i += blockDim.x) {
        sum += partial[i];
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) {
        const double norm = sqrt(sum) * unscale;
        double coefficient = unscale;
        if (max_norm > 0.0 && max_norm / (norm + 1e-6) < 1.0) {
            coefficient = unscale * (max_norm / (norm + 1e-6));
        }
        *clip = {norm, static_cast<float>(coefficient), norm - norm == 0.0};
    }
}

KERNEL(adamw_step, (const Tensor* tensors, const Chunk* chunks, const Clip* clip, Factors f)) {
    if (!clip->finite) {
        return;
    }
    const float coefficient = clip->coefficient;
    const Chunk chunk = chunks[blockIdx.x];
    const Tensor tensor = tensors[chunk.tensor];
    for (int i = threadIdx.x; i < CHUNK; i += blockDim.x) {
        const long long at = static_cast<long long>(chunk.index) * CHUNK + i;
        if (at >= tensor.len) {
            return;
        }
        const float g = tensor.grad[at] * coefficient;
        const float m = fmaf(g - tensor.exp_avg[at], f.toward_grad, tensor.exp_avg[at]);
        const float v = fmaf(f.toward_square * g, g, f.beta2 * tensor.exp_avg_sq[at]);
        tensor.exp_avg[at] = m;
        tensor.exp_avg_sq[at] = v;
        tensor.param[at] = tensor.param[at] * f.decay - f.step_size * (m / (sqrtf(v) / f.root_correction + f.eps));
    }
}
