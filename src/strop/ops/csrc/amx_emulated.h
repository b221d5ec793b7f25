// AMX's tiles in memory, for tests on CPUs without them (-DSTROP_EMULATE_AMX): what Intel's manual says of the
// instructions that cpu_amx.h uses. Where the CPU would raise a fault, this ends the process and says why.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles {

struct State {
    int rows[8], row_bytes[8];
    alignas(64) uint32_t data[8][16][16];
    bool configured;
};
inline State& state() {
    static thread_local State of_thread = {};
    return of_thread;
}

inline void need(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

inline void configure(const void* config) {
    const uint8_t* bytes = (const uint8_t*)config;
    need(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0 on");
    State& s = state();
    need(!s.configured, "configured twice");  // allowed by the CPU, but a work item ends with a release
    s = {};
    for (int t = 0; t < 16; t++) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
        const uint8_t rows = bytes[48 + t];
        need(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "a tile's shape");
        need(t < 8 || rows == 0, "eight tiles");
        if (t < 8) s.rows[t] = rows, s.row_bytes[t] = row_bytes;
    }
    for (int i = 2; i < 16; i++) need(bytes[i] == 0, "reserved bytes are 0");
    s.configured = true;
}
inline void release() {
    need(state().configured, "released, but not configured");
    state() = {};
}

inline State& shaped(int t) {
    State& s = state();
    need(s.configured, "not configured in this thread");
    need(s.rows[t] > 0, "a tile without a shape");
    return s;
}
template <int T>
void zero() {
    std::memset(shaped(T).data[T], 0, sizeof(State::data[T]));
}
template <int T>
void load(const void* from, int64_t stride) {
    State& s = shaped(T);
    std::memset(s.data[T], 0, sizeof(s.data[T]));
    for (int i = 0; i < s.rows[T]; i++) std::memcpy(s.data[T][i], (const char*)from + i * stride, s.row_bytes[T]);
}
template <int T>
void store(void* to, int64_t stride) {
    State& s = shaped(T);
    for (int i = 0; i < s.rows[T]; i++) std::memcpy((char*)to + i * stride, s.data[T][i], s.row_bytes[T]);
}

inline float low(uint32_t pair) {
    float out;
    return std::memcpy(&out, &(pair <<= 16), 4), out;
}
inline float high(uint32_t pair) {
    float out;
    return std::memcpy(&out, &(pair &= 0xffff0000u), 4), out;
}

// TDPBF16PS: the even and the odd products of a row are summed apart by FMA, then added up, then to the sum.
__attribute__((noinline, target("avx512f,fma"))) inline void multiply_flushed(State& s, int c, int a, int b) {
    for (int m = 0; m < s.rows[c]; m++) {
        float even[16] = {}, odd[16] = {}, sum[16];
        for (int k = 0; k < s.row_bytes[a] / 4; k++) {
            const float one = low(s.data[a][m][k]), two = high(s.data[a][m][k]);
            for (int n = 0; n < 16; n++) {
                even[n] = __builtin_fmaf(one, low(s.data[b][k][n]), even[n]);
                odd[n] = __builtin_fmaf(two, high(s.data[b][k][n]), odd[n]);
            }
        }
        std::memcpy(sum, s.data[c][m], s.row_bytes[c]);
        for (int n = 0; n < 16; n++) sum[n] += even[n] + odd[n];
        std::memcpy(s.data[c][m], sum, s.row_bytes[c]);
    }
}
template <int C, int A, int B>
void multiply() {
    State& s = (shaped(A), shaped(B), shaped(C));
    need(s.rows[C] == s.rows[A] && s.row_bytes[C] == s.row_bytes[B] && s.row_bytes[A] == 4 * s.rows[B],
         "the shapes of a product's tiles");
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // denormals are 0, as operands and as results
    multiply_flushed(s, C, A, B);
    _mm_setcsr(before);
}

inline bool start() { return true; }

}  // namespace tiles
