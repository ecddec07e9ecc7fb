// Runs CUDA kernels on the CPU, block by block: every thread of a block is a fiber, and barriers, shuffles, tensor-core
// products and asynchronous copies are where fibers wait for each other. It is made to find mistakes, not to be fast:
// shared memory starts as NaNs, copies land only when they are waited for, and a barrier that some threads never reach
// is an error instead of a hang. Threads take their turns in another order every time, and blocks too, so that what is
// right only in one order, for want of a barrier, comes out differently.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::block->dynamic_shared
#define threadIdx (emulator::thread->place)
#define blockIdx (emulator::block->place)
#define blockDim (emulator::block->threads)
#define gridDim (emulator::block->grid)

namespace emulator {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

// A kernel by name, with its arguments as the driver's launch call takes them: an array of pointers.
using Entry = void (*)(void** arguments);
inline std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> all;
    return all;
}

template <auto kernel>
struct Call;
template <typename... Parameters, void (*kernel)(Parameters...)>
struct Call<kernel> {
    template <size_t... I>
    static void unpack(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
    }
    static void call(void** arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
};
struct Register {
    Register(const char* name, Entry entry) { entries()[name] = entry; }
};

#define KERNEL(name, parameters)                                                                \
    static void name parameters;                                                                \
    static const emulator::Register register_##name(#name, &emulator::Call<&name>::call);       \
    static void name parameters
#define BOUNDED_KERNEL(name, max_threads, blocks, parameters) KERNEL(name, parameters)

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s\n", what);
    std::abort();
}

// Where a group of threads, a warp or a block, meets.
struct Barrier {
    unsigned members = 0, arrived = 0;
    uint64_t rounds = 0;
};

struct Copy {
    void* to;
    const void* from;
    unsigned filled, size;
};

struct Warp {
    Barrier barrier;
    // What lanes show each other: two slots in turn, so that one barrier for each exchange is enough.
    struct Slot {
        uint32_t words[8];
        const void* address;
    } slots[2][32];
};

struct Thread {
    ucontext_t begin;
    bool begun = false;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    Dim place;
    unsigned lane = 0;
    Warp* warp = nullptr;
    uint64_t exchanges = 0;
    bool done = false;
    const Barrier* waits_for = nullptr;
    uint64_t waits_until = 0;
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> copies;
};

struct Block {
    Dim place, threads, grid;
    Barrier barrier;
    unsigned char* dynamic_shared = nullptr;
    unsigned capability = 0;
    jmp_buf scheduler;
    Entry entry;
    void** arguments;
};

inline thread_local Thread* thread = nullptr;
inline thread_local Block* block = nullptr;

// From a fiber back to the scheduler, until it is resumed. Without the system calls of swapcontext, which took half of the
// time.
inline void pause() {
    if (_setjmp(thread->at) == 0) {
        _longjmp(block->scheduler, 1);
    }
}

// From the scheduler to a fiber, until it pauses.
inline void resume(Thread& one) {
    if (_setjmp(block->scheduler) != 0) {
        return;
    }
    thread = &one;
    if (!std::exchange(one.begun, true)) {
        setcontext(&one.begin);
    }
    _longjmp(one.at, 1);
}

inline void meet(Barrier& barrier) {
    Thread* const self = thread;
    const uint64_t round = barrier.rounds;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.rounds;
        return;
    }
    self->waits_for = &barrier;
    self->waits_until = round + 1;
    pause();
}

inline void leave(Barrier& barrier) {
    if (--barrier.members > 0 && barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.rounds;
    }
}

// One thread of every block, one after the other.
inline void run_thread() {
    for (;;) {
        block->entry(block->arguments);
        thread->done = true;
        if (!thread->copies.empty() || !thread->committed.empty()) {
            fail("a thread ended with copies that it never waited for");
        }
        leave(thread->warp->barrier);
        leave(block->barrier);
        pause();
    }
}

// Another order each time it is asked, the same in every run of a program.
inline void shuffle(std::vector<unsigned>& order) {
    static thread_local uint64_t state = 0x9e3779b97f4a7c15;
    for (size_t i = order.size(); i > 1; --i) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::swap(order[i - 1], order[(state >> 11) % i]);
    }
}

inline std::vector<unsigned> count_to(unsigned end) {
    std::vector<unsigned> order(end);
    for (unsigned i = 0; i < end; ++i) {
        order[i] = i;
    }
    return order;
}

// Runs a whole grid as a device of some capability would. Returns 0, or 1 for a name that is no kernel's.
inline int launch(
    unsigned capability, const char* name, const unsigned* grid, unsigned num_threads, unsigned shared,
    void** arguments) {
    const auto found = entries().find(name);
    if (found == entries().end()) {
        return 1;
    }
    constexpr size_t STACK = 256 << 10;
    std::vector<Thread> threads(num_threads);
    for (auto& one : threads) {
        one.stack.reset(new char[STACK]);
        getcontext(&one.begin);
        one.begin.uc_stack.ss_sp = one.stack.get();
        one.begin.uc_stack.ss_size = STACK;
        one.begin.uc_link = nullptr;
        makecontext(&one.begin, run_thread, 0);
    }
    std::vector<unsigned char> dynamic(shared + 16);
    Block here;
    here.capability = capability;
    here.grid = {grid[0], grid[1], grid[2]};
    here.threads = {num_threads, 1, 1};
    here.entry = found->second;
    here.arguments = arguments;
    here.dynamic_shared = dynamic.data() + (16 - reinterpret_cast<uintptr_t>(dynamic.data()) % 16) % 16;
    block = &here;
    std::vector<unsigned> blocks = count_to(grid[0] * grid[1] * grid[2]), turns = count_to(num_threads);
    shuffle(blocks);
    for (const unsigned index : blocks) {
        here.place = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        std::memset(dynamic.data(), 0xff, dynamic.size());
        std::vector<Warp> warps((num_threads + 31) / 32);
        here.barrier = Barrier{num_threads};
        for (unsigned t = 0; t < num_threads; ++t) {
            Thread& one = threads[t];
            one.place = {t, 0, 0};
            one.lane = t % 32;
            one.warp = &warps[t / 32];
            ++one.warp->barrier.members;
            one.exchanges = 0;
            one.done = false;
            one.waits_for = nullptr;
        }
        unsigned running = num_threads;
        while (running > 0) {
            bool moved = false;
            shuffle(turns);
            for (const unsigned turn : turns) {
                Thread& one = threads[turn];
                if (one.done || (one.waits_for && one.waits_for->rounds < one.waits_until)) {
                    continue;
                }
                one.waits_for = nullptr;
                resume(one);
                moved = true;
                running -= one.done;
            }
            if (!moved) {
                fail("threads wait at a barrier that the others never reach");
            }
        }
    }
    return 0;
}

// Shows the warp this lane's words and address, and hands out what all lanes have shown.
inline const Warp::Slot* exchange(const Warp::Slot& own) {
    Thread* const self = thread;
    auto* const slots = self->warp->slots[self->exchanges++ % 2];
    slots[self->lane] = own;
    meet(self->warp->barrier);
    return slots;
}

template <typename T>
T shuffle(T x, unsigned from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles of 32 or 64 bits");
    Warp::Slot own{};
    std::memcpy(own.words, &x, sizeof x);
    const auto* slots = exchange(own);
    std::memcpy(&x, slots[from].words, sizeof x);
    return x;
}

inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_f16(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return of_bits(sign | 0x7f800000u | fraction << 13);
    }
    const float value =
        exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction | 1024), int(exponent) - 25);
    return sign ? -value : value;
}

inline uint16_t to_f16(float x) {
    const uint16_t sign = bits_of(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (std::isnan(x)) {
        return sign | 0x7e00;
    }
    if (size >= 65520.0f) {
        return sign | 0x7c00;
    }
    if (size == 0.0f) {
        return sign;
    }
    int exponent = 0;
    std::frexp(size, &exponent);  // size = m · 2^exponent with m in [1/2, 1)
    const int unit = exponent < -13 ? -24 : exponent - 11;
    const auto units = uint32_t(std::nearbyint(std::ldexp(size, -unit)));  // ties to even, as the FPU is set
    if (exponent < -13) {
        return sign | uint16_t(units);  // a carry into the exponent is the smallest normal number
    }
    return sign | uint16_t((uint32_t(exponent + 14) << 10) + (units - 1024));
}

inline float of_bf16(uint16_t bits) { return of_bits(uint32_t(bits) << 16); }

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::block->barrier); }
inline void __syncwarp(unsigned = 0xffffffff) { emulator::meet(emulator::thread->warp->barrier); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulator::shuffle(x, emulator::thread->lane ^ unsigned(mask));
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulator::shuffle(x, unsigned(lane) % 32);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned distance) {
    const unsigned lane = emulator::thread->lane;
    return emulator::shuffle(x, lane >= distance ? lane - distance : lane);
}
// One fiber runs at a time.
inline unsigned atomicAdd(unsigned* to, unsigned x) { return std::exchange(*to, *to + x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __uint_as_float(unsigned bits) { return emulator::of_bits(bits); }
inline unsigned __float_as_uint(float x) { return emulator::bits_of(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
