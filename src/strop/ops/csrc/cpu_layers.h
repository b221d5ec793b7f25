// What stands between a model's matmuls, each in one pass over its data: RMS norm, rotary embedding, SiLU times
// gate. In torch each is three to nine operations, which write as many intermediate tensors. 16 lanes of AVX-512,
// rows by threads. In bf16 the normalised row, and silu(gate), are rounded before they are multiplied, as Llama's
// code in transformers has it; everything else stays in fp32 up to the result.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu_avx512.h"
#include "strop_cpu.h"

namespace layers {

using head::exp16;
using head::exp2_16;

constexpr int64_t ROWS = STROP_NORM_ROWS;  // rows of a norm whose weight gradients are summed by one thread

// Lanes of the last, incomplete 16: loads give 0 there, stores leave memory alone.
inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }
struct Whole {};  // in a mask's place: all lanes

// function(i, lanes) for 16 lanes at a time, without a mask but for the last ones: masked loads and stores are slower.
template <class Function>
AVX512 INLINE void each_16(int64_t size, Function function) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) function(i, Whole());
    if (i < size) function(i, lanes(size - i));
}

// The same in turns of 4, which add to sums of their own: a single one would wait for itself.
template <class Function>
AVX512 INLINE float sum_16(int64_t size, Function function) {
    __m512 sums[4];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 64 <= size; i += 64)
        for (int k = 0; k < 4; k++) sums[k] = function(i + 16 * k, Whole(), sums[k]);
    for (; i < size; i += 16) sums[0] = function(i, lanes(size - i), sums[0]);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// What a loop over memory reads or writes a little later. Tensors of a step lie in no cache, and a core's own
// prefetching halves its speed where several of them are walked at once.
constexpr int64_t AHEAD = 2048;  // bytes
INLINE void fetch(const void* at) { __builtin_prefetch((const char*)at + AHEAD); }
INLINE void fetch_for_write(const void* at) { __builtin_prefetch((const char*)at + AHEAD, 1); }

struct Bf16 {
    using Element = uint16_t;
    AVX512 static INLINE __m512 load(const uint16_t* at, Whole) { return head::Bf16::load(at, 0); }
    AVX512 static INLINE void store(uint16_t* at, Whole, __m512 x) { head::Bf16::store(at, 0, x); }
    AVX512 static INLINE __m512 load(const uint16_t* at, __mmask16 m) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at)), 16));
    }
    AVX512 static INLINE void store(uint16_t* at, __mmask16 m, __m512 x) {
        _mm256_mask_storeu_epi16(at, m, (__m256i)_mm512_cvtneps_pbh(x));
    }
    AVX512 static INLINE __m512 round(__m512 x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
    }
    AVX512 static INLINE __m512 exp(__m512 x) { return exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(head::LOG2_E))); }
};

struct F32 {
    using Element = float;
    AVX512 static INLINE __m512 load(const float* at, Whole) { return _mm512_loadu_ps(at); }
    AVX512 static INLINE void store(float* at, Whole, __m512 x) { _mm512_storeu_ps(at, x); }
    AVX512 static INLINE __m512 load(const float* at, __mmask16 m) { return _mm512_maskz_loadu_ps(m, at); }
    AVX512 static INLINE void store(float* at, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(at, m, x); }
    AVX512 static INLINE __m512 round(__m512 x) { return x; }
    AVX512 static INLINE __m512 exp(__m512 x) { return exp16(x); }
};

// ---- y = weight * x / sqrt(mean(x²) + eps)

template <class T>
AVX512 void norm_row(const typename T::Element* x, const typename T::Element* weight, int64_t size, float eps,
                     typename T::Element* y, float* inverse) {
    const float sum = sum_16(size, [&](int64_t i, auto m, __m512 sum) AVX512 {
        fetch(x + i), fetch_for_write(y + i);
        const __m512 v = T::load(x + i, m);
        return _mm512_fmadd_ps(v, v, sum);
    });
    *inverse = 1.0f / std::sqrt(sum / (float)size + eps);
    const __m512 inv = _mm512_set1_ps(*inverse);
    each_16(size, [&](int64_t i, auto m) AVX512 {
        const __m512 n = T::round(_mm512_mul_ps(T::load(x + i, m), inv));
        T::store(y + i, m, _mm512_mul_ps(n, T::load(weight + i, m)));
    });
}

template <class T>
AVX512 void norm_row_grad(const typename T::Element* x, const typename T::Element* weight,
                          const typename T::Element* dy, int64_t size, float inverse, typename T::Element* dx,
                          float* d_weight) {
    const __m512 inv = _mm512_set1_ps(inverse);
    const float sum = sum_16(size, [&](int64_t i, auto m, __m512 sum) AVX512 {
        fetch(x + i), fetch(dy + i), fetch_for_write(dx + i);
        const __m512 n = _mm512_mul_ps(T::load(x + i, m), inv), g = T::load(dy + i, m);
        if (d_weight) F32::store(d_weight + i, m, _mm512_fmadd_ps(g, T::round(n), F32::load(d_weight + i, m)));
        return _mm512_fmadd_ps(_mm512_mul_ps(g, T::load(weight + i, m)), n, sum);
    });
    const __m512 mean = _mm512_set1_ps(sum / (float)size);
    each_16(size, [&](int64_t i, auto m) AVX512 {
        const __m512 n = _mm512_mul_ps(T::load(x + i, m), inv);
        const __m512 g = _mm512_mul_ps(T::load(dy + i, m), T::load(weight + i, m));
        T::store(dx + i, m, _mm512_mul_ps(inv, _mm512_fnmadd_ps(n, mean, g)));
    });
}

template <class T>
void norm(const void* x, const void* weight, int64_t num_rows, int64_t size, float eps, void* y, float* inverse) {
    using E = typename T::Element;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < num_rows; r++)
        norm_row<T>((const E*)x + r * size, (const E*)weight, size, eps, (E*)y + r * size, inverse + r);
}

AVX512 inline void narrow_all(const float* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i += 16)
        Bf16::store(to + i, lanes(n - i), _mm512_maskz_loadu_ps(lanes(n - i), from + i));
}

// partial: fp32 [blocks of ROWS rows, size], added up in their order; NULL where no weight gradient is wanted.
template <class T>
void norm_grad(const void* x, const void* weight, const void* dy, const float* inverse, int64_t num_rows,
               int64_t size, void* dx, float* partial, void* d_weight) {
    using E = typename T::Element;
    const int64_t blocks = (num_rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float* own = partial ? partial + b * size : nullptr;
        if (own) std::fill(own, own + size, 0.0f);
        for (int64_t r = b * ROWS; r < std::min(num_rows, (b + 1) * ROWS); r++)
            norm_row_grad<T>((const E*)x + r * size, (const E*)weight, (const E*)dy + r * size, size, inverse[r],
                             (E*)dx + r * size, own);
    }
    if (!partial) return;
    for (int64_t b = 1; b < blocks; b++)
        for (int64_t i = 0; i < size; i++) partial[i] += partial[b * size + i];
    if (sizeof(E) == 4)
        std::memcpy(d_weight, partial, size * 4);
    else
        narrow_all(partial, size, (uint16_t*)d_weight);
}

// ---- silu(gate) * up, silu(x) = x / (1 + exp(-x))

template <class T>
AVX512 INLINE __m512 sigmoid16(__m512 x) {
    // exp of what is not positive only: no overflow on either side. 1 / (1 + e) or e / (1 + e); chosen before dividing,
    // so that no result waits for longer than it must.
    const __m512 one = _mm512_set1_ps(1.0f), e = T::exp(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_div_ps(_mm512_mask_mov_ps(e, positive, one), _mm512_add_ps(one, e));
}

template <class T, class Mask>
AVX512 INLINE void gate_lanes(const typename T::Element* gate, const typename T::Element* up, Mask m,
                              typename T::Element* out) {
    const __m512 g = T::load(gate, m);
    T::store(out, m, _mm512_mul_ps(T::round(_mm512_mul_ps(g, sigmoid16<T>(g))), T::load(up, m)));
}

template <class T>
AVX512 void gate_block(const typename T::Element* gate, const typename T::Element* up, int64_t n,
                       typename T::Element* out) {
    each_16(n, [&](int64_t i, auto m) AVX512 {
        fetch(gate + i), fetch(up + i), fetch_for_write(out + i);
        gate_lanes<T>(gate + i, up + i, m, out + i);
    });
}

template <class T, class Mask>
AVX512 INLINE void gate_lanes_grad(const typename T::Element* gate, const typename T::Element* up,
                                   const typename T::Element* dy, Mask m, typename T::Element* d_gate,
                                   typename T::Element* d_up, typename T::Element* product) {
    const __m512 g = T::load(gate, m), u = T::load(up, m), y = T::load(dy, m), s = sigmoid16<T>(g);
    const __m512 silu = _mm512_mul_ps(g, s), one = _mm512_set1_ps(1.0f);
    // silu' = s (1 + g (1 - s)) = s + silu (1 - s)
    const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, s), s);
    T::store(d_gate, m, _mm512_mul_ps(_mm512_mul_ps(y, u), slope));
    T::store(d_up, m, _mm512_mul_ps(y, silu));
    if (product != nullptr) T::store(product, m, _mm512_mul_ps(T::round(silu), u));
}

template <class T>
AVX512 void gate_block_grad(const typename T::Element* gate, const typename T::Element* up,
                            const typename T::Element* dy, int64_t n, typename T::Element* d_gate,
                            typename T::Element* d_up, typename T::Element* product) {
    each_16(n, [&](int64_t i, auto m) AVX512 {
        fetch(gate + i), fetch(up + i), fetch(dy + i), fetch_for_write(d_gate + i), fetch_for_write(d_up + i);
        if (product) fetch_for_write(product + i);
        gate_lanes_grad<T>(gate + i, up + i, dy + i, m, d_gate + i, d_up + i, product ? product + i : nullptr);
    });
}

constexpr int64_t CHUNK = 4096;  // elements of a thread's turn

template <class T>
void gate(const void* g, const void* up, int64_t n, void* out) {
    using E = typename T::Element;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += CHUNK)
        gate_block<T>((const E*)g + i, (const E*)up + i, std::min(CHUNK, n - i), (E*)out + i);
}

template <class T>
void gate_grad(const void* g, const void* up, const void* dy, int64_t n, void* d_gate, void* d_up, void* product) {
    using E = typename T::Element;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += CHUNK)
        gate_block_grad<T>((const E*)g + i, (const E*)up + i, (const E*)dy + i, std::min(CHUNK, n - i),
                           (E*)d_gate + i, (E*)d_up + i, product == nullptr ? nullptr : (E*)product + i);
}

// ---- Rotary embedding: y = x cos + (-x2, x1) sin over the halves of a head; the inverse turns back.

template <class T>
AVX512 void turn_head(const typename T::Element* x, const typename T::Element* cosine,
                      const typename T::Element* sine, int64_t size, bool inverse, typename T::Element* y) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 m = lanes(half - i);
        fetch(x + i), fetch(x + half + i), fetch_for_write(y + i), fetch_for_write(y + half + i);
        const __m512 a = T::load(x + i, m), b = T::load(x + half + i, m);
        const __m512 c1 = T::load(cosine + i, m), c2 = T::load(cosine + half + i, m);
        __m512 s1 = T::load(sine + i, m), s2 = T::load(sine + half + i, m);
        __m512 y1, y2;
        if (inverse) {
            y1 = _mm512_fmadd_ps(a, c1, _mm512_mul_ps(b, s2));
            y2 = _mm512_fmsub_ps(b, c2, _mm512_mul_ps(a, s1));
        } else {
            y1 = _mm512_fmsub_ps(a, c1, _mm512_mul_ps(b, s1));
            y2 = _mm512_fmadd_ps(b, c2, _mm512_mul_ps(a, s2));
        }
        T::store(y + i, m, y1);
        T::store(y + half + i, m, y2);
    }
}

// x: (token, head) at token * token_stride + head * head_stride; cosine, sine [T, D]; y [T, heads, D].
template <class T>
void turn(const void* x, int64_t token_stride, int64_t head_stride, const void* cosine, const void* sine,
          int64_t num_tokens, int64_t num_heads, int64_t size, bool inverse, void* y) {
    using E = typename T::Element;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t h = 0; h < num_heads; h++)
            turn_head<T>((const E*)x + t * token_stride + h * head_stride, (const E*)cosine + t * size,
                         (const E*)sine + t * size, size, inverse, (E*)y + (t * num_heads + h) * size);
}

}  // namespace layers
