// The warp's own instructions that attention is made of: tensor-core products, fragment loads, asynchronous copies.
//
// A product is m16n8k16: with g = lane / 4 and t = lane % 4, a lane holds of A the rows g and g + 8 and the columns 2t,
// 2t + 1, 2t + 8 and 2t + 9; of B the same columns (as its rows) of column g; of C the rows g and g + 8 and the columns
// 2t and 2t + 1. Each 32-bit register holds two numbers, the first in its lower half.
#pragma once

#include "common.cuh"

// Whether this is for sm_80 or later: known when it is compiled, while the emulator is told. Earlier ones have the
// products of f16 in halves, no products of bf16 (the host launches nothing that needs them), and no asynchronous copies.
#if !defined(__CUDACC__)
inline bool since_sm_80() { return emulator::block->capability >= 80; }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__device__ constexpr bool since_sm_80() { return false; }
#else
__device__ constexpr bool since_sm_80() { return true; }
#endif

// Four 8x8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row);
// As above, each matrix transposed.
__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row);

// `c += a·b` over sixteen numbers, since sm_80.
template <typename T>
__device__ inline void mma_k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
// The same over the eight numbers of f16 that are in the first half of A's registers and in one of B's, or in the others.
__device__ inline void mma_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b);

#ifdef __CUDACC__

// What earlier ones have no instruction for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SINCE_SM_80(...) __trap()
#else
#define SINCE_SM_80(...) __VA_ARGS__
#endif

template <>
__device__ inline void mma_k16<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    SINCE_SM_80(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

template <>
__device__ inline void mma_k16<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    SINCE_SM_80(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

__device__ inline void mma_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
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

__device__ inline void start_copy(void* to, const void* from, bool filled) {
    SINCE_SM_80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(filled ? 16 : 0)
                 : "memory"));
}

__device__ inline void end_group() { SINCE_SM_80(asm volatile("cp.async.commit_group;" ::: "memory")); }

template <int PENDING>
__device__ inline void wait_for_groups() {
    SINCE_SM_80(asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"));
}

template <typename T>
__device__ inline unsigned convert_both(float low, float high);

template <>
__device__ inline unsigned convert_both<bf16>(float low, float high) {
    unsigned both = 0;
    SINCE_SM_80(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)));
    return both;
}

template <>
__device__ inline unsigned convert_both<f16>(float low, float high) {
    unsigned both = 0;
    SINCE_SM_80(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)));
    return both;
}

#else

// A product over `depth` numbers, 8 or 16: the lanes' registers of A lie in the words before those of B.
template <typename T>
inline void mma_of(float (&c)[4], const emulator::Warp::Slot& own, int depth) {
    const auto* const lanes = emulator::exchange(own);
    const auto half = [](uint32_t word, int high) { return widen(T{static_cast<unsigned short>(word >> 16 * high)}); };
    const int group = emulator::thread->lane / 4, within = emulator::thread->lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, col = within * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < depth; ++k) {
            const int lane = k % 8 / 2;
            const float x = half(lanes[row % 8 * 4 + lane].words[row / 8 + k / 8 * 2], k % 2);
            const float y = half(lanes[col * 4 + lane].words[depth / 4 + k / 8], k % 2);
            sum += x * y;
        }
        c[i] += sum;
    }
}

template <typename T>
inline void mma_k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if (!since_sm_80()) {
        emulator::fail("a product of m16n8k16 before sm_80");
    }
    mma_of<T>(c, {{a[0], a[1], a[2], a[3], b0, b1}, nullptr}, 16);
}

inline void mma_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    mma_of<f16>(c, {{a0, a1, b}, nullptr}, 8);
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

inline void start_copy(void* to, const void* from, bool filled) {
    emulator::thread->copies.push_back({to, from, filled ? 16u : 0u, 16u});
}

inline void end_group() {
    emulator::thread->committed.push_back(std::move(emulator::thread->copies));
    emulator::thread->copies.clear();
}

template <int PENDING>
inline void wait_for_groups() {
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
inline unsigned convert_both(float low, float high) {
    return narrow<T>(low).bits | static_cast<unsigned>(narrow<T>(high).bits) << 16;
}

#endif

// `c += a·b`
template <typename T>
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void mma<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_k16<bf16>(c, a, b0, b1);
}

template <>
__device__ inline void mma<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if (since_sm_80()) {
        mma_k16<f16>(c, a, b0, b1);
    } else {
        mma_k8(c, a[0], a[1], b0);
        mma_k8(c, a[2], a[3], b1);
    }
}

// Starts to copy 16 bytes to shared memory, or to fill them with zeros.
__device__ inline void copy_async(void* to, const void* from, bool filled) {
    if (since_sm_80()) {
        start_copy(to, from, filled);
        return;
    }
    const auto bytes = filled ? load<unsigned, 4>(static_cast<const unsigned*>(from)) : Vec<unsigned, 4>{};
    store(static_cast<unsigned*>(to), bytes);
}

// Ends a group of copies.
__device__ inline void commit_copies() {
    if (since_sm_80()) {
        end_group();
    }
}

// Waits until all of this thread's groups but the newest `PENDING` have landed.
template <int PENDING>
__device__ inline void wait_for_copies() {
    if (since_sm_80()) {
        wait_for_groups<PENDING>();
    }
}

// Two numbers in one register.
template <typename T>
__device__ inline unsigned pack(float low, float high) {
    if (since_sm_80()) {
        return convert_both<T>(low, high);
    }
    return narrow<T>(low).bits | static_cast<unsigned>(narrow<T>(high).bits) << 16;
}
