// The norm of all gradients, clipping and AdamW, over any number of tensors in three launches; the formulas are in
// ../adamw.rs and ../clip.rs. The tensors lie one after the other in flat buffers, which the host cuts into chunks of some
// thousand numbers of one tensor; a block takes one.
#include "common.cuh"

constexpr int MAX_GROUPS = 4;

struct Chunk {
    unsigned long long start;
    unsigned len;
    unsigned group;
};
// `finite` is 1 or 0: a step whose gradients overflowed must change nothing.
struct Clip {
    double norm;
    float coefficient;
    unsigned finite;
};
// What all tensors share.
struct Factors {
    float toward_grad, beta2, toward_square, root_correction, eps;
};
// What those of a group share: their weight decay and learning rate.
struct Groups {
    float decay[MAX_GROUPS], step_size[MAX_GROUPS];
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

KERNEL(adamw_sum_of_squares, (const float* grad, const Chunk* chunks, double* partial)) {
    const Chunk chunk = chunks[blockIdx.x];
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < chunk.len; i += blockDim.x) {
        const double g = grad[chunk.start + i];
        sum += g * g;
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

KERNEL(adamw_step, (const Chunk* chunks, const Clip* clip, Factors f, Groups groups, const float* grad, float* param,
                    float* exp_avg, float* exp_avg_sq)) {
    if (!clip->finite) {
        return;
    }
    const float coefficient = clip->coefficient;
    const Chunk chunk = chunks[blockIdx.x];
    const float decay = groups.decay[chunk.group], step_size = groups.step_size[chunk.group];
    for (unsigned i = threadIdx.x; i < chunk.len; i += blockDim.x) {
        const unsigned long long at = chunk.start + i;
        const float g = grad[at] * coefficient;
        const float m = fmaf(g - exp_avg[at], f.toward_grad, exp_avg[at]);
        const float v = fmaf(f.toward_square * g, g, f.beta2 * exp_avg_sq[at]);
        exp_avg[at] = m;
        exp_avg_sq[at] = v;
        param[at] = param[at] * decay - step_size * (m / (sqrtf(v) / f.root_correction + f.eps));
    }
}
