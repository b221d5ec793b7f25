// One source for two compilers. nvcc gets CUDA; g++ gets what kernels.cu uses of it, emulated on the CPU, so
// that the kernels themselves run in tests on a machine without a GPU.
//
// The emulation: the threads of a block are fibers of one thread, run in turn until each waits at a barrier.
// Warps have 32 lanes. A shuffle or __syncthreads that not every thread reaches ends the process with a
// message, where a GPU would hang or give rubbish. strop_shim_reverse(1) runs the fibers in the opposite
// order: a kernel without races gives the same bits. Blocks run one after the other.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define STROP_UNROLL _Pragma("unroll")

#define STROP_LAUNCH(kernel, grid, block, stream, ...) \
    kernel<<<dim3(grid), dim3(block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Loads the code of a kernel; what CUDA says if it cannot.
inline const char* problem_with(const void* kernel) {
    cudaFuncAttributes attributes;
    const cudaError_t found = cudaFuncGetAttributes(&attributes, kernel);
    cudaGetLastError();  // else the next launch would be blamed for it
    return found == cudaSuccess ? nullptr : cudaGetErrorString(found);
}

__device__ __forceinline__ float float_of_bf16(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }

__device__ __forceinline__ uint16_t bf16_of_float(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float float_of_half(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t half_of_float(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define STROP_UNROLL
#define __launch_bounds__(threads)
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace shim {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

struct Fiber {
    ucontext_t start;  // where it begins; later `place`, since swapcontext costs two system calls a switch
    jmp_buf place;
    bool started, done;
    dim3 index;
};

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<char> stacks;
    std::vector<uint64_t> shuffled;   // what each lane holds out to the others
    std::vector<Barrier> warps;
    Barrier all, end;
    std::function<void()> body;
    Fiber* current = nullptr;
    unsigned waiting = 0;             // yields since anything went on
    bool reverse = false;
    jmp_buf caller;
};

inline thread_local Block block;
inline thread_local dim3 grid_dim, block_dim, block_idx;

[[noreturn]] inline void die(const char* why) {
    fprintf(stderr, "kernels.cu on the CPU: %s (block %u, thread %u)\n", why, block_idx.x, block.current->index.x);
    abort();
}

// The next fiber that is not done; never returns here, except through its own `place`.
[[noreturn]] inline void go_on() {
    const unsigned count = block.fibers.size(), self = block.current->index.x;
    for (unsigned step = 1; step <= count; ++step) {
        Fiber& next = block.fibers[(self + (block.reverse ? count - step : step)) % count];
        if (next.done) continue;
        block.current = &next;
        if (next.started) _longjmp(next.place, 1);
        next.started = true;
        setcontext(&next.start);
    }
    _longjmp(block.caller, 1);
}

inline void arrive(Barrier& barrier, unsigned needed) {
    block.waiting = 0;
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == needed) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) {
        if (++block.waiting > block.fibers.size()) die("a barrier or shuffle is not reached by all threads");
        if (!_setjmp(block.current->place)) go_on();
    }
}

// One fiber's life: its thread of every block of the grid.
inline void run_thread() {
    while (block_idx.x < grid_dim.x) {
        block.body();
        if (block.end.arrived + 1 == block_dim.x) ++block_idx.x;
        arrive(block.end, block_dim.x);
    }
    block.current->done = true;
    go_on();
}

inline void prepare(dim3 grid, dim3 threads) {
    grid_dim = grid, block_dim = threads, block_idx = dim3(0);
    block.fibers.resize(threads.x);
    block.stacks.resize(threads.x * STACK_BYTES);
    block.shuffled.assign(threads.x, 0);
    block.warps.assign(threads.x / WARP, Barrier());
    block.all = block.end = Barrier();
    block.waiting = 0;
    for (unsigned i = 0; i < threads.x; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.started = fiber.done = false;
        fiber.index = dim3(i, 0, 0);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = &block.stacks[i * STACK_BYTES];
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_thread, 0);
    }
    block.current = &block.fibers[0];
}

template <class Body>
void launch(dim3 grid, dim3 threads, Body body) {
    prepare(grid, threads);
    if (grid.x == 0 || threads.x == 0 || threads.x > 1024 || threads.x % WARP) die("bad launch configuration");
    block.body = body;
    if (!_setjmp(block.caller)) {
        block.fibers[0].started = true;
        setcontext(&block.fibers[0].start);
    }
}

}  // namespace shim

#define threadIdx (shim::block.current->index)
#define blockIdx shim::block_idx
#define blockDim shim::block_dim
#define gridDim shim::grid_dim
#define STROP_LAUNCH(kernel, grid, threads, stream, ...) \
    ((void)(stream), shim::launch(dim3(grid), dim3(threads), [=] { kernel(__VA_ARGS__); }))

inline const char* problem_with(const void*) { return nullptr; }

inline void __syncthreads() { shim::arrive(shim::block.all, shim::block_dim.x); }

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "one register pair at most");
    if (lanes != 0xffffffffu) shim::die("shuffles of part of a warp are not emulated");
    const unsigned self = threadIdx.x;
    shim::Barrier& warp = shim::block.warps[self / shim::WARP];
    memcpy(&shim::block.shuffled[self], &value, sizeof(T));
    shim::arrive(warp, shim::WARP);
    T other;
    memcpy(&other, &shim::block.shuffled[self ^ unsigned(lane_mask)], sizeof(T));
    shim::arrive(warp, shim::WARP);  // before anybody overwrites what another has yet to read
    return other;
}

inline float __expf(float x) { return expf(x); }

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline float float_of_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_of_float(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) return 0x7fff;
    return uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

inline float float_of_half(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent)
        value = ldexpf(float(1024 + fraction), exponent - 25);
    else
        value = ldexpf(float(fraction), -24);
    return bits & 0x8000 ? -value : value;
}

// To the nearest, ties to even (the processor's default): rintf of the value in units of its last place.
inline uint16_t half_of_float(float value) {
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const float size = fabsf(value);
    if (value != value) return 0x7fff;
    if (size == 0.0f) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    if (exponent < -13) exponent = -13;  // subnormal
    const int units = int(rintf(ldexpf(size, 11 - exponent)));  // below 2048, or 2048 after rounding up
    return sign | uint16_t(((exponent + 13) << 10) + units);
}

extern "C" void strop_shim_reverse(int reverse) { shim::block.reverse = reverse != 0; }

#endif
