// The warp's own instructions that attention is made of: tensor-core products, fragment loads, asynchronous copies.
//
// A product is m16n8k16: with g = lane / 4 and t = lane % 4, a lane holds of A the rows g and g + 8 and the columns 2t,
// 2t + 1, 2t + 8 and 2t + 9; of B the same columns (as its rows) of column g; of C the rows g and g + 8 and the columns
// 2t and 2t + 1. Each 32-bit register holds two numbers, the first in its lower half.
#pragma once

#include "common.cuh"

// `c += a·b`
template <typename T>
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

// Four 8x8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row);
// As above, each matrix transposed.
__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row);

// Starts to copy 16 bytes to shared memory, or to fill them with zeros.
__device__ inline void copy_async(void* to, const void* from, bool filled);
// Ends a group of copies.
__device__ inline void commit_copies();
// Waits until all of this thread's groups but the newest `PENDING` have landed.
template <int PENDING>
__device__ inline void wait_for_copies();

template <typename T>
__device__ inline unsigned pack(float low, float high);

#ifdef __CUDACC__

// Before sm_80 the host launches nothing that calls these, and the compiler knows none of the instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SINCE_SM_80(...) __trap()
#else
#define SINCE_SM_80(...) __VA_ARGS__
#endif

template <>
__device__ inline void mma<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    SINCE_SM_80(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

template <>
__device__ inline void mma<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    SINCE_SM_80(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

__device__ inline unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline void copy_async(void* to, const void* from, bool filled) {
    SINCE_SM_80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(filled ? 16 : 0)
                 : "memory"));
}

__device__ inline void commit_copies() { SINCE_SM_80(asm volatile("cp.async.commit_group;" ::: "memory")); }

template <int PENDING>
__device__ inline void wait_for_copies() {
    SINCE_SM_80(asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"));
}

template <>
__device__ inline unsigned pack<bf16>(float low, float high) {
    unsigned both = 0;
    SINCE_SM_80(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)));
    return both;
}

template <>
__device__ inline unsigned pack<f16>(float low, float high) {
    unsigned both = 0;
    SINCE_SM_80(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)));
    return both;
}

#else

template <typename T>
inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulator::Warp::Slot own{};
    std::memcpy(own.words, a, sizeof a);
    own.words[4] = b0;
    own.words[5] = b1;
    const auto* const lanes = emulator::exchange(own);
    const auto half = [](uint32_t word, int high) { return widen(T{static_cast<unsigned short>(word >> 16 * high)}); };
    const int group = emulator::thread->lane / 4, within = emulator::thread->lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, col = within * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const int lane = k % 8 / 2;
            const float x = half(lanes[row % 8 * 4 + lane].words[row / 8 + k / 8 * 2], k % 2);
            const float y = half(lanes[col * 4 + lane].words[4 + k / 8], k % 2);
            sum += x * y;
        }
        c[i] += sum;
    }
}

inline void load_matrices_as(unsigned (&to)[4], const void* row, bool transposed) {
    emulator::Warp::Slot own{};
    own.address = row;
    const auto* const lanes = emulator::exchange(own);
    const int group = emulator::thread->lane / 4, within = emulator::thread->lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const int r = transposed ? within * 2 + i : group, c = transposed ? group : within * 2 + i;
            std::memcpy(&pair[i], static_cast<const char*>(lanes[matrix * 8 + r].address) + c * 2, 2);
        }
        to[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
    __syncwarp();  // what was read may now be overwritten
}

inline void load_matrices(unsigned (&to)[4], const void* row) { load_matrices_as(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_matrices_as(to, row, true); }

inline void copy_async(void* to, const void* from, bool filled) {
    emulator::thread->copies.push_back({to, from, filled ? 16u : 0u, 16u});
}

inline void commit_copies() {
    emulator::thread->committed.push_back(std::move(emulator::thread->copies));
    emulator::thread->copies.clear();
}

template <int PENDING>
inline void wait_for_copies() {
    auto& groups = emulator::thread->committed;
    while (groups.size() > PENDING) {
        for (const auto& copy : groups.front()) {
            std::memset(copy.to, 0, copy.size);
            if (copy.filled > 0) {
                std::memcpy(copy.to, copy.from, copy.filled);
            }
        }
        groups.erase(groups.begin());
    }
}

template <typename T>
inline unsigned pack(float low, float high) {
    return narrow<T>(low).bits | static_cast<unsigned>(narrow<T>(high).bits) << 16;
}

#endif
