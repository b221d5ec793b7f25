// The fused head for AVX-512: matmul and softmax statistics of one tile in registers (see strop_cpu.h).
//
// A lane is a token, so a row's sums need no shuffles and do not know their neighbours. A tile is 32 tokens by
// a panel of 12 words: 24 accumulators, 2 registers of hidden, 1 broadcast of the weight. A panel's rows stay
// in L1 while it meets the tiles of a group of tokens, whose packed hidden states stay in L2. A work item is a
// segment of words by a group of tokens with partial sums of its own, merged in the order of the segments:
// the result does not depend on which thread did what. cpu_amx.h has the product of AMX, with all else from here.
#pragma once
// gcc 12's own headers initialise a register with itself (its bug 105593) and warn of it wherever it is inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "strop_cpu.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define INLINE inline __attribute__((always_inline))

namespace head {

constexpr int64_t TILE = STROP_TILE, PANEL = STROP_PANEL, SEGMENT = STROP_SEGMENT;
constexpr int64_t MAX_GROUP = 256, GROUP_BYTES = 768 * 1024;  // tokens of a group, and what L2 holds of them
constexpr int64_t CACHED_BYTES = 16 << 20;                    // more than that is read from memory when its turn comes
constexpr int64_t PANELS_PER_ITEM = 16;                       // of the backward

struct Head {
    const void* packed;
    const void* weight;
    int64_t num_rows, padded, hidden_size, stride;
    int64_t first, num_words;
    const int64_t* target;
    strop_head head;
    bool wide;  // the weight is fp32 and the hidden states are bf16
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t pad(int64_t num_rows) { return ceil_div(num_rows, TILE) * TILE; }

// Tokens that one work item takes: a multiple of the tile.
inline int64_t group_size(int64_t hidden_size, int64_t element) {
    int64_t fit = GROUP_BYTES / (hidden_size * element) / TILE * TILE;
    return std::max(TILE, std::min(MAX_GROUP, fit));
}

// exp(x) for x <= 0 or a little above, within 2 units of the last place; 0 below -87; NaN stays NaN.
AVX512 INLINE __m512 exp16(__m512 x) {
    const __m512 low = _mm512_set1_ps(-87.0f);
    __mmask16 alive = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);
    x = _mm512_max_ps(low, x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(alive, p, n);
}

constexpr float LOG2_E = 1.44269504f;

// 2^x within 2 units of the last place, for every x; NaN stays NaN. 2^x = 2^floor(x) * p(x - floor(x)), and half as
// many operations as exp16 for what is bf16 afterwards: scores times log2 e lose the product's last bits.
AVX512 INLINE __m512 exp2_16(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(0.00186713017f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00901702978f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0557999127f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240164444f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693151295f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

// tanh(x) = sign(x) (1 - q) / (1 + q), q = exp(-2|x|)
AVX512 INLINE __m512 tanh16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 q = exp16(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f)));
    __m512 t = _mm512_div_ps(_mm512_sub_ps(one, q), _mm512_add_ps(one, q));
    __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(t), sign));
}

struct Nothing {
    Nothing() {}
};

struct Bf16 {
    static constexpr int64_t bytes = 2, depth = 2;  // depth: elements of H in one 32-bit step
    static constexpr int64_t panels = 1;            // that one product computes
    static constexpr int64_t words = 1024;          // that hidden's gradient sums in registers: a panel fills half of L1
    static constexpr int64_t columns = PANEL;       // of the weight that are turned at a time
    using Tiles = Nothing;                          // what a work item needs around its products
    AVX512 static INLINE __m512 dot(__m512 acc, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
    }
    AVX512 static INLINE void store(void* out, int64_t at, __m512 v) {
        __m256bh half = _mm512_cvtneps_pbh(v);
        std::memcpy((uint16_t*)out + at, &half, 32);
    }
    AVX512 static INLINE __m512 load(const void* in, int64_t at) {
        __m256i half = _mm256_loadu_si256((const __m256i*)((const uint16_t*)in + at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
};

struct F32 {
    static constexpr int64_t bytes = 4, depth = 1, panels = 1;
    using Tiles = Nothing;
    AVX512 static INLINE __m512 dot(__m512 acc, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
    }
    AVX512 static INLINE void store(void* out, int64_t at, __m512 v) { _mm512_storeu_ps((float*)out + at, v); }
    AVX512 static INLINE __m512 load(const void* in, int64_t at) { return _mm512_loadu_ps((const float*)in + at); }
};

// hidden rows of one tile -> [H / depth][32 tokens] of 32 bits.
template <class T>
void pack_tile(const char* hidden, int64_t stride, int64_t num_rows, int64_t steps, char* out) {
    for (int64_t i = 0; i < TILE; i++) {
        for (int64_t k = 0; k < steps; k++) {
            char* to = out + (k * TILE + i) * 4;
            if (i < num_rows)
                std::memcpy(to, hidden + i * stride * T::bytes + k * 4, 4);
            else
                std::memset(to, 0, 4);
        }
    }
}

// z[i][half of the tile] = sum over `steps` of the packed tile times row i. A function of its own, since inlined
// into a larger one the compiler may spill the registers that this loop is made of.
template <class T>
AVX512 __attribute__((noinline)) void tile_product(const char* tile, const char* const (&rows)[PANEL], int64_t steps,
                                                   __m512 (&z)[PANEL][2]) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; k++) {
        __m512i a0 = _mm512_loadu_si512(tile + k * 128), a1 = _mm512_loadu_si512(tile + k * 128 + 64);
#pragma GCC unroll 12
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t pair;
            std::memcpy(&pair, rows[i] + k * 4, 4);
            __m512i b = _mm512_set1_epi32(pair);
            acc[i][0] = T::dot(acc[i][0], a0, b);
            acc[i][1] = T::dot(acc[i][1], a1, b);
        }
    }
    for (int64_t i = 0; i < PANEL; i++) z[i][0] = acc[i][0], z[i][1] = acc[i][1];
}

AVX512 INLINE __mmask32 columns_left(int64_t left) { return left >= TILE ? ~0u : (1u << left) - 1; }

// 32 columns of a row of a product, those that are `there`. past: all of them, and their lines go past the caches: they
// are not read again before they would have left.
AVX512 INLINE void store(uint16_t* out, __m512 low, __m512 high, __mmask32 there, bool past) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (past)
        _mm512_stream_si512((__m512i*)out, both);
    else
        _mm512_mask_storeu_epi16(out, there, both);
}
AVX512 INLINE void store(float* out, __m512 low, __m512 high, __mmask32 there, bool past) {
    if (past) {
        _mm512_stream_ps(out, low);
        _mm512_stream_ps(out + 16, high);
    } else {
        _mm512_mask_storeu_ps(out, (__mmask16)there, low);
        _mm512_mask_storeu_ps(out + 16, (__mmask16)(there >> 16), high);
    }
}

// Rows of the weight as a product reads them.
struct Rows {
    const char* first;
    int64_t stride;  // bytes
};

// Where the weight's rows are, or those of one product at a time, rounded to bf16. They meet all tokens of a work item,
// beside which that takes little time: with 256 of them 4 % of the walk's.
template <class T>
class Words {
   public:
    explicit Words(const Head& h)
        : weight((const char*)h.weight), size(h.hidden_size), stride(h.stride * (h.wide ? 4 : T::bytes)), wide(h.wide) {
        if (wide) rounded.resize(T::panels * PANEL * lines());
    }
    AVX512 INLINE Rows take(int64_t word, int64_t words) {
        const char* const first = weight + word * stride;
        if (!wide) return {first, stride};
        for (int64_t i = 0; i < words; i++) round((const float*)(first + i * stride), rounded.data() + i * lines());
        return {(const char*)rounded.data(), lines() * (int64_t)sizeof(Line)};
    }

   private:
    struct alignas(64) Line {
        uint16_t of[32];
    };
    const char* weight;
    int64_t size, stride;
    bool wide;
    std::vector<Line> rounded;

    // Of a row: an odd number, so that rows are spread over all of L1.
    int64_t lines() const { return ceil_div(size, 32) | 1; }

    AVX512 INLINE void round(const float* from, Line* to) const {
        int64_t k = 0;
        for (; k + 32 <= size; k += 32, to++) {
            const __m512 low = _mm512_loadu_ps(from + k), high = _mm512_loadu_ps(from + k + 16);
            _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        if (k == size) return;
        const uint32_t there = (1u << (size - k)) - 1;
        const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, from + k);
        __m512 high = _mm512_setzero_ps();
        if (there >> 16) high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), from + k + 16);
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
};

// The logits of T::panels panels (the last word repeats where there are fewer) for a tile.
template <class T>
AVX512 INLINE void tile_logits(const Head& h, int64_t tile, const Rows& from, int64_t words,
                               __m512 (&z)[T::panels][PANEL][2]) {
    const char* rows[PANEL];
    for (int64_t i = 0; i < PANEL; i++) rows[i] = from.first + std::min(i, words - 1) * from.stride;
    tile_product<T>((const char*)h.packed + tile * TILE * h.hidden_size * T::bytes, rows, h.hidden_size / T::depth,
                    z[0]);
}

inline bool is_plain(const strop_head& head) {
    return head.bias == nullptr && head.softcap == 0.0f && head.inv_temperature == 1.0f;
}

// z = softcap(x + bias) / temperature; returns dz/dx.
AVX512 INLINE __m512 apply_head(const strop_head& head, int64_t word, __m512& z) {
    __m512 slope = _mm512_set1_ps(head.inv_temperature);
    if (head.bias != nullptr) z = _mm512_add_ps(z, _mm512_set1_ps(head.bias[word]));
    if (head.softcap != 0.0f) {
        __m512 t = tanh16(_mm512_div_ps(z, _mm512_set1_ps(head.softcap)));
        z = _mm512_mul_ps(t, _mm512_set1_ps(head.softcap));
        slope = _mm512_mul_ps(slope, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
    }
    z = _mm512_mul_ps(z, _mm512_set1_ps(head.inv_temperature));
    return slope;
}

// Which of 16 tokens have their target among `words` words from `word`.
AVX512 INLINE __mmask16 targets_here(const int32_t* target, int64_t word, int64_t words) {
    __m512i t = _mm512_sub_epi32(_mm512_loadu_si512(target), _mm512_set1_epi32((int32_t)word));
    return _mm512_cmp_epu32_mask(t, _mm512_set1_epi32((int32_t)words), _MM_CMPINT_LT);
}

struct Partial {  // [segments][n] each
    float *top, *total, *weighted, *plain;
};

constexpr float LEAST_TOP = -0x1.fep127f;  // of bf16

// One panel of one half tile into the running sums at `at`; its exponentials go to exps [12][32], unless NULL.
template <class T>
AVX512 INLINE void walk_half(__m512 (&z)[PANEL][2], int half, int64_t words, const Partial& sums, int64_t at,
                             void* exps, void* panel_top) {
    __m512 old = _mm512_loadu_ps(sums.top + at), top = old;
    for (int64_t i = 0; i < words; i++) top = _mm512_max_ps(top, z[i][half]);  // NaN in z wins
    __m512 safe = _mm512_max_ps(_mm512_set1_ps(LEAST_TOP), top);
    __m512 shrink = exp16(_mm512_sub_ps(old, safe));
    // The panel is summed by itself first: 12 times fewer roundings of the large sums.
    __m512 total = _mm512_setzero_ps(), weighted = total, plain = total, shift = total;
    if (exps != nullptr) {
        T::store(panel_top, 0, safe);
        shift = exp16(_mm512_sub_ps(safe, T::load(panel_top, 0)));  // the top is kept rounded
    }
    for (int64_t i = 0; i < words; i++) {
        __m512 e = exp16(_mm512_sub_ps(z[i][half], safe));
        __mmask16 some = _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_NEQ_UQ);  // 0 * -inf is not NaN here
        total = _mm512_add_ps(total, e);
        weighted = _mm512_mask3_fmadd_ps(e, z[i][half], weighted, some);
        plain = _mm512_add_ps(plain, z[i][half]);
        if (exps != nullptr) T::store(exps, i * TILE + 16 * half, _mm512_mul_ps(e, shift));
    }
    _mm512_storeu_ps(sums.top + at, top);
    _mm512_storeu_ps(sums.total + at, _mm512_fmadd_ps(_mm512_loadu_ps(sums.total + at), shrink, total));
    _mm512_storeu_ps(sums.weighted + at, _mm512_fmadd_ps(_mm512_loadu_ps(sums.weighted + at), shrink, weighted));
    _mm512_storeu_ps(sums.plain + at, _mm512_add_ps(_mm512_loadu_ps(sums.plain + at), plain));
}

// The lines of a tile's exponentials, whole, to where they are kept: many are not read before they have left
// the caches (`stream`), and fetching what is overwritten would cost as much as writing it.
AVX512 INLINE void keep_tile(const char* lines, int64_t words, int64_t bytes, char* to, int64_t stride, bool stream) {
    for (int64_t i = 0; i < words; i++, to += stride) {
        for (int64_t at = 0; at < bytes; at += 64) {
            __m512i line = _mm512_load_si512(lines + i * bytes + at);
            if (stream)
                _mm512_stream_si512((__m512i*)(to + at), line);
            else
                _mm512_storeu_si512(to + at, line);
        }
    }
}

inline void load_targets(const Head& h, int64_t begin, int64_t end, int32_t* out) {
    for (int64_t n = begin; n < end; n++) out[n - begin] = n < h.num_rows ? (int32_t)h.target[n] : -1;
}

struct Item {  // of the walk: a segment by a group of tokens
    const Head& h;
    Partial sums;
    const int32_t* target;  // of the tokens from `begin`
    int64_t begin;
    bool plain_head, stream;
    float* at_target;
    void* exps;
    void* tops;
};

// The panel of words w .. w + words - 1 (of h.first on) and the tile of tokens from n.
template <class T>
AVX512 INLINE void walk_tile(const Item& item, __m512 (&z)[PANEL][2], int64_t w, int64_t words, int64_t n) {
    const Head& h = item.h;
    const int64_t word = h.first + w;
    alignas(64) char lines[PANEL * TILE * T::bytes];
    for (int half = 0; half < 2; half++) {
        const int64_t at = n + 16 * half;
        const int32_t* target = item.target + at - item.begin;
        if (!item.plain_head)
            for (int64_t i = 0; i < words; i++) apply_head(h.head, word + i, z[i][half]);
        __mmask16 hits = targets_here(target, word, words);
        for (int lane = 0; hits; lane++, hits >>= 1)
            if (hits & 1) item.at_target[at + lane] = ((float*)&z[target[lane] - word][half])[lane];
        void* panel_top = item.tops == nullptr ? nullptr : (char*)item.tops + (w / PANEL * h.padded + at) * T::bytes;
        walk_half<T>(z, half, words, item.sums, at, item.exps == nullptr ? nullptr : lines, panel_top);
    }
    if (item.exps != nullptr)
        keep_tile(lines, words, TILE * T::bytes, (char*)item.exps + (w * h.padded + n) * T::bytes,
                  h.padded * T::bytes, item.stream);
}

// The walk of one segment over the tokens begin .. end - 1 (multiples of the tile).
template <class T>
AVX512 void walk_item(const Head& h, Words<T>& weight, int64_t segment, int64_t begin, int64_t end,
                      const Partial& partial, float* at_target, void* exps, void* tops) {
    alignas(64) int32_t target[MAX_GROUP];
    load_targets(h, begin, end, target);
    const int64_t from = segment * SEGMENT, to = std::min(from + SEGMENT, h.num_words);
    const int64_t base = segment * h.padded;
    const Partial sums = {partial.top + base, partial.total + base, partial.weighted + base, partial.plain + base};
    for (int64_t n = begin; n < end; n++) {
        sums.top[n] = -INFINITY;
        sums.total[n] = sums.weighted[n] = sums.plain[n] = 0.0f;
    }
    const bool stream = h.num_words * h.padded * T::bytes > CACHED_BYTES && (uintptr_t)exps % 64 == 0;
    const Item item = {h, sums, target, begin, is_plain(h.head), stream, at_target, exps, tops};
    [[maybe_unused]] const typename T::Tiles tiles;
    for (int64_t w = from; w < to; w += T::panels * PANEL) {
        const int64_t words = std::min(T::panels * PANEL, to - w);
        const Rows rows = weight.take(h.first + w, words);
        for (int64_t n = begin; n < end; n += TILE) {
            __m512 z[T::panels][PANEL][2];
            tile_logits<T>(h, n / TILE, rows, words, z);
            for (int64_t p = 0; p * PANEL < words; p++)
                walk_tile<T>(item, z[p], w + p * PANEL, std::min(PANEL, words - p * PANEL), n);
        }
    }
    if (stream) _mm_sfence();  // other threads read what was streamed, which ordinary stores do not order
}

// Segment by segment into the walk, in their order.
inline void merge(const Partial& partial, int64_t row, int64_t segments, int64_t padded, const strop_walk& walk) {
    float top = walk.top[row], total = walk.total[row];
    float weighted = walk.weighted ? walk.weighted[row] : 0.0f, plain = walk.plain ? walk.plain[row] : 0.0f;
    for (int64_t at = row; at < segments * padded; at += padded) {
        const float more = partial.top[at], high = more > top ? more : top;
        const float safe = high == -INFINITY ? 0.0f : high;
        const float a = std::exp(top - safe), b = std::exp(more - safe);
        total = total * a + partial.total[at] * b;
        weighted = weighted * a + partial.weighted[at] * b;
        plain += partial.plain[at];
        top = high;
    }
    walk.top[row] = top;
    walk.total[row] = total;
    if (walk.weighted) walk.weighted[row] = weighted;
    if (walk.plain) walk.plain[row] = plain;
}

template <class T>
void walk(const Head& h, const strop_walk& walk, void* exps, void* tops, float* scratch) {
    const int64_t segments = ceil_div(h.num_words, SEGMENT), size = segments * h.padded;
    const Partial partial = {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size};
    const int64_t group = group_size(h.hidden_size, T::bytes), groups = ceil_div(h.padded, group);
#pragma omp parallel
    {
        Words<T> weight(h);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < segments * groups; item++) {
            const int64_t begin = item % groups * group, end = std::min(begin + group, h.padded);
            walk_item<T>(h, weight, item / groups, begin, end, partial, walk.at_target, exps, tops);
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < h.num_rows; n++) merge(partial, n, segments, h.padded, walk);
}

// lse and grad (times 1 / temperature) of the tokens begin .. end - 1, with a gradient of 0 in the padding.
inline void load_rows(const float* lse, const float* grad, float scale, int64_t num_rows, int64_t begin,
                      int64_t end, float* lse_out, float* grad_out) {
    for (int64_t n = begin; n < end; n++) {
        lse_out[n - begin] = n < num_rows ? lse[n] : 0.0f;
        grad_out[n - begin] = n < num_rows ? grad[n] * scale : 0.0f;
    }
}

// grad * (1[hit] - p) * slope, exactly 0 where grad is 0
AVX512 INLINE __m512 gradient(__m512 grad, __m512 p, __mmask16 hit, __m512 slope) {
    __m512 d = _mm512_sub_ps(_mm512_maskz_mov_ps(hit, _mm512_set1_ps(1.0f)), p);
    __mmask16 live = _mm512_cmp_ps_mask(grad, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return _mm512_maskz_mul_ps(live, _mm512_mul_ps(grad, d), slope);
}

AVX512 INLINE __mmask16 is_target(const int32_t* target, int64_t word) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(target), _mm512_set1_epi32((int32_t)word));
}

struct GradItem {  // of the tokens from `begin`
    const Head& h;
    const int32_t* target;
    const float *lse, *grad;
    int64_t begin;
    bool plain_head;
    void* out;
};

// The panel of words w .. w + words - 1 (of h.first on) and the tile of tokens from n.
template <class T>
AVX512 INLINE void grad_tile(const GradItem& item, __m512 (&z)[PANEL][2], int64_t w, int64_t words, int64_t n) {
    const Head& h = item.h;
    for (int half = 0; half < 2; half++) {
        const int64_t at = n + 16 * half - item.begin;
        __m512 l = _mm512_loadu_ps(item.lse + at), g = _mm512_loadu_ps(item.grad + at);
        for (int64_t i = 0; i < words; i++) {
            const int64_t word = h.first + w + i;
            __m512 slope = _mm512_set1_ps(1.0f);
            if (!item.plain_head) slope = apply_head(h.head, word, z[i][half]);
            __m512 p = exp16(_mm512_sub_ps(z[i][half], l));
            __m512 d = gradient(g, p, is_target(item.target + at, word), slope);
            T::store(item.out, (w + i) * h.padded + item.begin + at, d);
        }
    }
}

// Panels `from` to `to` words (of h.first on), tokens begin .. end - 1.
template <class T>
AVX512 void grad_item(const Head& h, Words<T>& weight, int64_t from, int64_t to, int64_t begin, int64_t end,
                      const float* lse, const float* grad, void* out) {
    alignas(64) int32_t target[MAX_GROUP];
    alignas(64) float lses[MAX_GROUP], grads[MAX_GROUP];
    load_targets(h, begin, end, target);
    load_rows(lse, grad, 1.0f, h.num_rows, begin, end, lses, grads);
    const GradItem item = {h, target, lses, grads, begin, is_plain(h.head), out};
    [[maybe_unused]] const typename T::Tiles tiles;
    for (int64_t w = from; w < to; w += T::panels * PANEL) {
        const int64_t words = std::min(T::panels * PANEL, to - w);
        const Rows rows = weight.take(h.first + w, words);
        for (int64_t n = begin; n < end; n += TILE) {
            __m512 z[T::panels][PANEL][2];
            tile_logits<T>(h, n / TILE, rows, words, z);
            for (int64_t p = 0; p * PANEL < words; p++)
                grad_tile<T>(item, z[p], w + p * PANEL, std::min(PANEL, words - p * PANEL), n);
        }
    }
}

template <class T>
void grad(const Head& h, const float* lse, const float* grad, void* out) {
    const int64_t group = group_size(h.hidden_size, T::bytes), groups = ceil_div(h.padded, group);
    const int64_t block = PANELS_PER_ITEM * PANEL, blocks = ceil_div(h.num_words, block);
#pragma omp parallel
    {
        Words<T> weight(h);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * groups; item++) {  // a group's hidden states stay in L2 for its items
            const int64_t begin = item / blocks * group, from = item % blocks * block;
            grad_item<T>(h, weight, from, std::min(from + block, h.num_words), begin, std::min(begin + group, h.padded),
                         lse, grad, out);
        }
    }
}

// One panel: every kept exp(z - top) becomes a probability by one factor a token.
template <class T>
AVX512 void grad_kept_panel(const Head& h, int64_t w, const void* exps, const void* tops, const float* lse,
                            const float* grad, void* out) {
    const int64_t words = std::min(PANEL, h.num_words - w);
    for (int64_t begin = 0; begin < h.padded; begin += MAX_GROUP) {
        const int64_t end = std::min(begin + MAX_GROUP, h.padded);
        alignas(64) int32_t target[MAX_GROUP];
        alignas(64) float lses[MAX_GROUP], grads[MAX_GROUP];
        if (h.target != nullptr)
            load_targets(h, begin, end, target);
        else
            std::fill(target, target + MAX_GROUP, -1);
        load_rows(lse, grad, h.head.inv_temperature, h.num_rows, begin, end, lses, grads);
        for (int64_t n = begin; n < end; n += 16) {
            __m512 top = T::load(tops, w / PANEL * h.padded + n);
            __m512 scale = exp16(_mm512_sub_ps(top, _mm512_loadu_ps(lses + n - begin)));
            __m512 g = _mm512_loadu_ps(grads + n - begin);
            for (int64_t i = 0; i < words; i++) {
                const int64_t at = (w + i) * h.padded + n;
                __m512 p = _mm512_mul_ps(T::load(exps, at), scale);
                __mmask16 hit = is_target(target + n - begin, h.first + w + i);
                T::store(out, at, gradient(g, p, hit, _mm512_set1_ps(1.0f)));
            }
        }
    }
}

template <class T>
void grad_kept(const Head& h, const void* exps, const void* tops, const float* lse, const float* grad, void* out) {
#pragma omp parallel for schedule(static)
    for (int64_t w = 0; w < h.num_words; w += PANEL) grad_kept_panel<T>(h, w, exps, tops, lse, grad, out);
}

template <class T>
void pack(const void* hidden, int64_t num_rows, int64_t hidden_size, int64_t stride, void* packed) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < pad(num_rows); n += TILE)
        pack_tile<T>((const char*)hidden + n * stride * T::bytes, stride, std::min(TILE, num_rows - n),
                     hidden_size / T::depth, (char*)packed + n * hidden_size * T::bytes);
}

}  // namespace head
#pragma GCC diagnostic pop
