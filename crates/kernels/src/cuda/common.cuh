// What every kernel needs: number types, vectors of them, and sums over a warp or a block.
//
// The sources include nothing of CUDA's own headers, so that the same text compiles with nvcc for a GPU and with a C++
// compiler for the emulator (emulator.hpp), which runs blocks on the CPU to check them where there is no GPU.
#pragma once

#ifdef __CUDACC__
// KERNEL(name, (parameters)) { body }: an entry point that the host finds by its name.
#define KERNEL(name, parameters) extern "C" __global__ void name parameters
// The same, compiled for blocks of at most `threads` threads, `blocks` of which share a multiprocessor.
#define BOUNDED_KERNEL(name, threads, blocks, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulator.hpp"
#endif

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// Several numbers that one instruction loads or stores.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
    T at[N];
};

template <typename T, int N>
__device__ inline Vec<T, N> load(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <typename T, int N>
__device__ inline void store(T* to, const Vec<T, N>& vec) {
    *reinterpret_cast<Vec<T, N>*>(to) = vec;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widen(f16 x) {
#ifdef __CUDACC__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return emulator::of_f16(x.bits);
#endif
}

// The nearest number of a type, ties to even.
template <typename T>
__device__ T narrow(float x);

template <>
__device__ inline float narrow<float>(float x) {
    return x;
}

template <>
__device__ inline f16 narrow<f16>(float x) {
#ifdef __CUDACC__
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return {emulator::to_f16(x)};
#endif
}

template <>
__device__ inline bf16 narrow<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return {static_cast<unsigned short>(bits >> 16 | 0x40)};  // a NaN stays one
    }
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

constexpr unsigned WARP = 0xffffffff;

// Sums in a fixed order: the same bits every time, and in every lane.
__device__ inline float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(WARP, x, distance);
    }
    return x;
}

__device__ inline float warp_max(float x) {
    for (int distance = 16; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(WARP, x, distance));
    }
    return x;
}

// Hands every thread of a block what `combine` makes of all warps' values; blocks are whole warps, 32 at most.
template <typename T, typename Combine>
__device__ inline T across_warps(T x, T neutral, T* scratch, Combine combine) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // the scratch may still be read
    if (lane == 0) {
        scratch[warp] = x;
    }
    __syncthreads();
    x = neutral;
    for (int w = 0; w < warps; ++w) {
        x = combine(x, scratch[w]);
    }
    return x;
}

__device__ inline float block_sum(float x) {
    __shared__ float scratch[32];
    return across_warps(warp_sum(x), 0.0f, scratch, [](float a, float b) { return a + b; });
}

// One entry point for each number type, alone and as many at once as 16 bytes hold.
#define FOR_EACH_TYPE(INSTANCE) \
    INSTANCE(f32_x1, float, 1)  \
    INSTANCE(f32_x4, float, 4)  \
    INSTANCE(f16_x1, f16, 1)    \
    INSTANCE(f16_x8, f16, 8)    \
    INSTANCE(bf16_x1, bf16, 1)  \
    INSTANCE(bf16_x8, bf16, 8)
