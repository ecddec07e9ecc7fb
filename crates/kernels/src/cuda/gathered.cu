// Numbers gathered from workers, added up in the order of the workers: the same bits wherever it is done, and those of
// adding one worker's numbers after the other's on the host. A thread goes through some of the columns.
#include "common.cuh"

KERNEL(gathered_sum, (const float* gathered, int num_workers, long long len, float* out)) {
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += step) {
        float sum = gathered[i];
        for (int worker = 1; worker < num_workers; ++worker) {
            sum += gathered[worker * len + i];
        }
        out[i] = sum;
    }
}
