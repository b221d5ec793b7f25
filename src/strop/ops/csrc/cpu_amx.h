// The head's products in bf16 by AMX, several times as fast as AVX-512 (see strop_cpu.h): all else is
// cpu_avx512.h's and cpu_head_grad.h's.
//
// A packed tile of 32 tokens is AMX's second operand as it is: 16 steps by 16 tokens are 16 rows of 64 bytes, and
// two of them lie side by side. Rows of the weight are the first operand, where they are. Two panels of 12 words by
// 32 tokens are 4 accumulators: 4 loads for 4 products.
// A token is a column of tiles, words are rows: neither knows its neighbours.
#pragma once
#include "cpu_avx512.h"

#ifdef STROP_EMULATE_AMX
#include "amx_emulated.h"
#define STROP_AMX 1
#elif defined(__linux__) && __has_include(<amxbf16intrin.h>)  // then the assembler knows the instructions too
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define STROP_AMX 1

// gcc's own intrinsics do not say that they read memory, so what was stored just before might not be there.
namespace tiles {

template <int T>
INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void multiply() {  // C += A times B
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
INLINE void configure(const void* config) { asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory"); }
INLINE void release() { asm volatile("tilerelease"); }

// Whether the CPU has AMX with bf16, the system saves its registers, and gives this process the permission.
inline bool start() {
    constexpr unsigned osxsave = 1u << 27, bf16 = 1u << 22, tile = 1u << 24, saved = 3u << 17;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16) || !(d & tile)) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & saved) == saved && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace tiles
#endif

namespace head {

#ifdef STROP_AMX

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // 0 .. 3: sums, of panel and half; 4, 5: panels;
    uint8_t rows[16] = {PANEL, PANEL, PANEL, PANEL, PANEL, PANEL, 16, 16};  // 6, 7: halves of the packed tile
};
static_assert(sizeof(TileConfig) == 64, "as ldtilecfg reads it");

struct Amx : Bf16 {
    static constexpr int64_t panels = 2;
    static constexpr int64_t words = 480;   // half of L1; an odd number of its lines apart, rows spread over all of it
    static constexpr int64_t columns = 16;
    // Around a work item's products. Nobody else's tiles are lost: the ABI keeps none over a call, and what uses AMX
    // in the same threads (oneDNN, under torch) sets them in each of its kernels, or reads from the CPU whether they
    // are as it wants them. And tiles that are not released would be saved at every switch of the thread.
    struct Tiles {
        Tiles() {
            alignas(64) const TileConfig config;
            tiles::configure(&config);
        }
        ~Tiles() { tiles::release(); }
        Tiles(const Tiles&) = delete;
        Tiles& operator=(const Tiles&) = delete;
    };
};

constexpr int64_t STEPS = 16;  // of a block: pairs of elements

// The sums of one panel, or of two, plus a block of their rows times a block of the packed tile.
INLINE void multiply_block(const char* tile, const char* rows, int64_t stride, bool two) {
    tiles::load<6>(tile, 128), tiles::load<7>(tile + 64, 128);
    tiles::load<4>(rows, stride);
    tiles::multiply<0, 4, 6>(), tiles::multiply<1, 4, 7>();
    if (!two) return;
    tiles::load<5>(rows + PANEL * stride, stride);
    tiles::multiply<2, 5, 6>(), tiles::multiply<3, 5, 7>();
}

// sum[count][32 tokens] fp32, rows `sum_stride` bytes apart, of `count` rows (at most 24; of a panel that is begun
// all 12 are written) times the packed tile; added: to what is there.
__attribute__((noinline)) inline void amx_product(const char* tile, const char* rows, int64_t stride, int64_t count,
                                                  int64_t steps, float* sum, int64_t sum_stride, bool added) {
    const bool two = count > PANEL;
    char* const first = (char*)sum;
    char* const second = first + PANEL * sum_stride;
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    if (added) {
        tiles::load<0>(first, sum_stride), tiles::load<1>(first + 64, sum_stride);
        if (two) tiles::load<2>(second, sum_stride), tiles::load<3>(second + 64, sum_stride);
    }
    int64_t k = 0;
    if (count % PANEL == 0)
        for (; k + STEPS <= steps; k += STEPS) multiply_block(tile + k * 128, rows + k * 4, stride, two);
    for (; k < steps; k += STEPS) {  // what does not fill a block, beside zeros
        const int64_t here = std::min(STEPS, steps - k);
        alignas(64) char some[2 * PANEL * 64] = {}, some_tile[STEPS * 128] = {};
        for (int64_t i = 0; i < count; i++) std::memcpy(some + i * 64, rows + i * stride + k * 4, here * 4);
        std::memcpy(some_tile, tile + k * 128, here * 128);
        multiply_block(some_tile, some, 64, two);
    }
    tiles::store<0>(first, sum_stride), tiles::store<1>(first + 64, sum_stride);
    if (two) tiles::store<2>(second, sum_stride), tiles::store<3>(second + 64, sum_stride);
}

template <>
AVX512 INLINE void tile_logits<Amx>(const Head& h, int64_t tile, const Rows& from, int64_t words,
                                    __m512 (&z)[Amx::panels][PANEL][2]) {
    amx_product((const char*)h.packed + tile * TILE * h.hidden_size * Amx::bytes, from.first, from.stride, words,
                h.hidden_size / Amx::depth, (float*)z, 128, false);
}

#else
using Amx = Bf16;
#endif

}  // namespace head
