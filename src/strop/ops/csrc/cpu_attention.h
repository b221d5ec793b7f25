// Causal attention over packed sequences for CPUs with AVX-512's bf16 dot product, forward and backward.
//
// As in cpu_avx512.h a lane is a token: a tile is 32 queries of one head, so a softmax needs no shuffles and a
// query's numbers do not know which sequences lie beside it. Keys come in blocks, with the running maximum of
// flash attention (Dao et al. 2022); the backward computes the probabilities again from the log-sum-exp.
// A work item of the forward is a sequence and a head of keys (with all heads of queries that share it); of the
// backward a chain of sequences that share prompts, so that every sum over queries has one owner and one order.
//
// Legend: L queries and n keys of a sequence (n > L where a prompt is shared: the first n - L keys are the first
// ones of the sequence before it), D the size of a head, a multiple of 16.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_avx512.h"
#include "strop_cpu.h"

namespace attention {

using head::Bf16;
using head::exp16;

constexpr int64_t TILE = 32, BLOCK = 128, PANEL = 8;  // queries; keys at a time; keys or dims in registers
constexpr float NEVER = -1e30f;                       // below every score, and finite: its differences are numbers

// Rows of heads in memory: element (token, head, d) at token * token_stride + head * head_stride + d.
struct Rows {
    const uint16_t* at;
    int64_t token_stride, head_stride;
    const uint16_t* row(int64_t token, int64_t h) const { return at + token * token_stride + h * head_stride; }
};

struct Attention {
    Rows q, k, v;
    int64_t num_tokens, num_heads, num_kv_heads, size;  // size: D
    const int32_t *cu_queries, *cu_keys;
    float scale;
    int64_t window;  // keys that a query sees, itself included; 0: all before it

    int64_t num_queries(int64_t s) const { return cu_queries[s + 1] - cu_queries[s]; }
    int64_t num_keys(int64_t s) const { return cu_keys[s + 1] - cu_keys[s]; }
    int64_t num_shared(int64_t s) const { return num_keys(s) - num_queries(s); }
    // The token of a sequence's j-th key.
    int64_t key_token(int64_t s, int64_t j) const {
        const int64_t shared = num_shared(s);
        return j < shared ? cu_queries[s - 1] + j : cu_queries[s] + j - shared;
    }
};

// Two neighbours in one 32-bit lane.
inline uint32_t pair_of(uint16_t low, uint16_t high) { return (uint32_t)low | (uint32_t)high << 16; }

AVX512 INLINE __m512i pairs_of(__m512 low, __m512 high) {
    __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// Queries i0 .. i0 + 31 of a sequence (zeros behind its end) -> [D / 2][32] pairs along D.
inline void pack_tile(const Rows& rows, int64_t first, int64_t count, int64_t h, int64_t size, uint32_t* out) {
    for (int64_t i = 0; i < TILE; i++) {
        const uint16_t* row = i < count ? rows.row(first + i, h) : nullptr;
        for (int64_t d = 0; d < size / 2; d++) out[d * TILE + i] = row ? pair_of(row[2 * d], row[2 * d + 1]) : 0;
    }
}

// The same -> [16][D] pairs along the queries.
inline void pack_queries(const Rows& rows, int64_t first, int64_t count, int64_t h, int64_t size, uint32_t* out) {
    for (int64_t i = 0; i < TILE; i += 2) {
        const uint16_t* a = i < count ? rows.row(first + i, h) : nullptr;
        const uint16_t* b = i + 1 < count ? rows.row(first + i + 1, h) : nullptr;
        for (int64_t d = 0; d < size; d++) out[i / 2 * size + d] = pair_of(a ? a[d] : 0, b ? b[d] : 0);
    }
}

// Keys or values of a sequence -> [n / 2 rounded up][D] pairs along the keys.
inline void pack_keys(const Attention& a, const Rows& rows, int64_t s, int64_t g, std::vector<uint32_t>& out) {
    const int64_t n = a.num_keys(s);
    out.resize((n + 1) / 2 * a.size);
    for (int64_t j = 0; j < n; j += 2) {
        const uint16_t* low = rows.row(a.key_token(s, j), g);
        const uint16_t* high = j + 1 < n ? rows.row(a.key_token(s, j + 1), g) : nullptr;
        for (int64_t d = 0; d < a.size; d++) out[j / 2 * a.size + d] = pair_of(low[d], high ? high[d] : 0);
    }
}

// z[key][half of the tile]: products of a tile with PANEL rows over D.
AVX512 INLINE void products(const uint32_t* tile, const uint16_t* const* rows, int64_t size,
                            __m512 (&z)[PANEL][2]) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t d = 0; d < size / 2; d++) {
        const __m512bh a0 = (__m512bh)_mm512_loadu_si512(tile + d * TILE);
        const __m512bh a1 = (__m512bh)_mm512_loadu_si512(tile + d * TILE + 16);
#pragma GCC unroll 8
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t two;
            std::memcpy(&two, rows[i] + 2 * d, 4);
            const __m512bh b = (__m512bh)_mm512_set1_epi32(two);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a0, b);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a1, b);
        }
    }
    for (int64_t i = 0; i < PANEL; i++) z[i][0] = acc[i][0], z[i][1] = acc[i][1];
}

// out [D][32] = out * factor + Σ over pairs of keys weights[pair][32] * values[pair][D].
AVX512 INLINE void add_weighted(const uint32_t* weights, const uint32_t* values, int64_t num_pairs, int64_t size,
                                const __m512 (&factor)[2], float* out) {
    for (int64_t d = 0; d < size; d += PANEL) {
        __m512 acc[PANEL][2];
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t half = 0; half < 2; half++)
                acc[i][half] = _mm512_mul_ps(_mm512_loadu_ps(out + (d + i) * TILE + 16 * half), factor[half]);
        for (int64_t j = 0; j < num_pairs; j++) {
            const __m512bh p0 = (__m512bh)_mm512_loadu_si512(weights + j * TILE);
            const __m512bh p1 = (__m512bh)_mm512_loadu_si512(weights + j * TILE + 16);
            const uint32_t* row = values + j * size + d;
#pragma GCC unroll 8
            for (int64_t i = 0; i < PANEL; i++) {
                const __m512bh b = (__m512bh)_mm512_set1_epi32((int32_t)row[i]);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], p0, b);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], p1, b);
            }
        }
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t half = 0; half < 2; half++)
                _mm512_storeu_ps(out + (d + i) * TILE + 16 * half, acc[i][half]);
    }
}

// out [key][D] += Σ over the tile's queries weights[key][32] (bf16) * rows[16 pairs][D], for PANEL keys.
AVX512 INLINE void add_transposed(const uint16_t* weights, const uint32_t* rows, int64_t num_keys, int64_t size,
                                  float* out) {
    for (int64_t d = 0; d < size; d += 16) {
        __m512 acc[PANEL];
        for (int64_t i = 0; i < num_keys; i++) acc[i] = _mm512_loadu_ps(out + i * size + d);
        for (int64_t i = num_keys; i < PANEL; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t two = 0; two < TILE / 2; two++) {
            const __m512bh b = (__m512bh)_mm512_loadu_si512(rows + two * size + d);
#pragma GCC unroll 8
            for (int64_t i = 0; i < PANEL; i++) {
                int32_t w;
                std::memcpy(&w, weights + i * TILE + 2 * two, 4);
                acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_set1_epi32(w), b);
            }
        }
        for (int64_t i = 0; i < num_keys; i++) _mm512_storeu_ps(out + i * size + d, acc[i]);
    }
}

// What a tile of queries sees: keys [begin, end) at all, and a mask for each.
struct Sight {
    int64_t first, window, begin, end;  // first: the key position of the tile's first query
    Sight(const Attention& a, int64_t s, int64_t i0, int64_t count) : first(a.num_shared(s) + i0), window(a.window) {
        begin = window ? std::max<int64_t>(0, first - window + 1) / 2 * 2 : 0;
        end = first + count;
    }
    AVX512 INLINE __mmask16 of(int64_t key, int64_t half) const {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i behind =
            _mm512_add_epi32(lane, _mm512_set1_epi32((int32_t)(first + 16 * half - key)));  // query - key
        __mmask16 mask = _mm512_cmpge_epi32_mask(behind, _mm512_setzero_si512());
        if (window) mask &= _mm512_cmplt_epi32_mask(behind, _mm512_set1_epi32((int32_t)window));
        return mask;
    }
    bool sees_all(int64_t from, int64_t to) const {  // every query of the tile every key of [from, to)
        return to <= first + 1 && (!window || first + TILE - from <= window);
    }
};

// out [D][32] fp32 times factor -> bf16 rows of a head.
AVX512 inline void store_tile(const float* out, const __m512 (&factor)[2], int64_t first, int64_t count, int64_t h,
                              int64_t num_heads, int64_t size, uint16_t* to) {
    alignas(64) uint16_t column[TILE];
    for (int64_t d = 0; d < size; d++) {
        for (int64_t half = 0; half < 2; half++)
            Bf16::store(column, 16 * half, _mm512_mul_ps(_mm512_loadu_ps(out + d * TILE + 16 * half), factor[half]));
        for (int64_t i = 0; i < count; i++) to[((first + i) * num_heads + h) * size + d] = column[i];
    }
}

struct Scratch {
    std::vector<uint32_t> values, keys, tile, d_tile, queries, d_out, weights, d_pairs;
    std::vector<uint16_t> rows, d_rows;
    std::vector<float> out, scores, d_keys, d_values, chain_keys, chain_values;
    std::vector<const uint16_t*> key_rows, value_rows;
};

inline void find_rows(const Attention& a, const Rows& rows, int64_t s, int64_t g,
                      std::vector<const uint16_t*>& out) {
    const int64_t n = a.num_keys(s);
    out.resize(n + PANEL);
    for (int64_t j = 0; j < n; j++) out[j] = rows.row(a.key_token(s, j), g);
    for (int64_t j = n; j < n + PANEL; j++) out[j] = out[n - 1];  // masked: read, never used
}

// ---- Forward

// One tile against the keys that it sees: out [D][32], the maximum and the sum of each query.
AVX512 inline void forward_tile(const Attention& a, const Sight& sight, Scratch& w, __m512 (&top)[2],
                                __m512 (&total)[2]) {
    std::fill(w.out.begin(), w.out.end(), 0.0f);
    const __m512 scale = _mm512_set1_ps(a.scale);
    for (int64_t half = 0; half < 2; half++) top[half] = _mm512_set1_ps(NEVER), total[half] = _mm512_setzero_ps();
    for (int64_t from = sight.begin; from < sight.end; from += BLOCK) {
        const int64_t to = std::min(from + BLOCK, sight.end), whole = (to - from + PANEL - 1) / PANEL * PANEL;
        const bool all = sight.sees_all(from, from + whole);
        __m512 high[2] = {top[0], top[1]};
        for (int64_t j = 0; j < whole; j += PANEL) {
            __m512 z[PANEL][2];
            products(w.tile.data(), w.key_rows.data() + from + j, a.size, z);
            for (int64_t i = 0; i < PANEL; i++)
                for (int64_t half = 0; half < 2; half++) {
                    __m512 x = _mm512_mul_ps(z[i][half], scale);
                    if (!all) {
                        const __mmask16 seen = from + j + i < to ? sight.of(from + j + i, half) : 0;
                        x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x);
                    }
                    high[half] = _mm512_max_ps(high[half], x);
                    _mm512_storeu_ps(w.scores.data() + (j + i) * TILE + 16 * half, x);
                }
        }
        __m512 factor[2];
        for (int64_t half = 0; half < 2; half++) {
            factor[half] = exp16(_mm512_sub_ps(top[half], high[half]));
            top[half] = high[half];
            __m512 sum = _mm512_mul_ps(total[half], factor[half]);
            for (int64_t j = 0; j < whole; j += 2) {
                const float* x = w.scores.data() + j * TILE + 16 * half;
                const __m512 p0 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x), top[half]));
                const __m512 p1 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + TILE), top[half]));
                sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
                _mm512_storeu_si512(w.weights.data() + j / 2 * TILE + 16 * half, pairs_of(p0, p1));
            }
            total[half] = sum;
        }
        const int64_t pairs = (to - from + 1) / 2;
        add_weighted(w.weights.data(), w.values.data() + from / 2 * a.size, pairs, a.size, factor, w.out.data());
    }
}

AVX512 inline void forward_item(const Attention& a, int64_t s, int64_t g, Scratch& w, uint16_t* out, float* lse) {
    const int64_t length = a.num_queries(s), start = a.cu_queries[s], per_group = a.num_heads / a.num_kv_heads;
    if (length == 0) return;
    w.tile.resize(a.size / 2 * TILE), w.out.resize(a.size * TILE);
    w.scores.resize(BLOCK * TILE), w.weights.resize(BLOCK / 2 * TILE);
    find_rows(a, a.k, s, g, w.key_rows);
    pack_keys(a, a.v, s, g, w.values);
    alignas(64) float log_sum[TILE];
    for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
        for (int64_t i0 = 0; i0 < length; i0 += TILE) {
            const int64_t count = std::min(TILE, length - i0);
            pack_tile(a.q, start + i0, count, h, a.size, w.tile.data());
            __m512 top[2], total[2];
            forward_tile(a, Sight(a, s, i0, count), w, top, total);
            const __m512 inverse[2] = {_mm512_div_ps(_mm512_set1_ps(1.0f), total[0]),
                                       _mm512_div_ps(_mm512_set1_ps(1.0f), total[1])};
            store_tile(w.out.data(), inverse, start + i0, count, h, a.num_heads, a.size, out);
            for (int64_t half = 0; half < 2; half++) _mm512_store_ps(log_sum + 16 * half, total[half]);
            float tops[TILE];
            for (int64_t half = 0; half < 2; half++) _mm512_storeu_ps(tops + 16 * half, top[half]);
            for (int64_t i = 0; i < count; i++)
                lse[h * a.num_tokens + start + i0 + i] = tops[i] + std::log(log_sum[i]);
        }
}

// ---- Backward

struct Gradients {
    Rows d_out, out;   // of the output, and the output itself
    const float* lse;  // [heads, T]
    uint16_t *d_q, *d_k, *d_v;
};

// dS = P * (dP - Σ dO·O) * scale of a block of keys, as rows [key][32] and as pairs of keys; P as rows.
AVX512 inline void score_gradients(const Attention& a, const Sight& sight, int64_t from, int64_t to, Scratch& w,
                                   const __m512 (&lse)[2], const __m512 (&delta)[2]) {
    const __m512 scale = _mm512_set1_ps(a.scale);
    const int64_t whole = (to - from + PANEL - 1) / PANEL * PANEL;
    const bool all = sight.sees_all(from, from + whole);
    for (int64_t j = 0; j < whole; j += PANEL) {
        __m512 z[PANEL][2], dp[PANEL][2];
        products(w.tile.data(), w.key_rows.data() + from + j, a.size, z);
        products(w.d_tile.data(), w.value_rows.data() + from + j, a.size, dp);
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t half = 0; half < 2; half++) {
                __m512 p = exp16(_mm512_fmsub_ps(z[i][half], scale, lse[half]));
                if (!all) p = _mm512_maskz_mov_ps(from + j + i < to ? sight.of(from + j + i, half) : 0, p);
                Bf16::store(w.rows.data(), (j + i) * TILE + 16 * half, p);
                z[i][half] = _mm512_mul_ps(_mm512_mul_ps(p, scale), _mm512_sub_ps(dp[i][half], delta[half]));
                Bf16::store(w.d_rows.data(), (j + i) * TILE + 16 * half, z[i][half]);
            }
        for (int64_t i = 0; i < PANEL; i += 2)
            for (int64_t half = 0; half < 2; half++)
                _mm512_storeu_si512(w.d_pairs.data() + (j + i) / 2 * TILE + 16 * half,
                                    pairs_of(z[i][half], z[i + 1][half]));
    }
}

// log-sum-exp, and Σ dO·O, of a tile's queries. Behind the sequence's end: probabilities of 0.
AVX512 inline void tile_sums(const Attention& a, const Gradients& grads, int64_t first, int64_t count, int64_t h,
                             __m512 (&lse)[2], __m512 (&delta)[2]) {
    float sums[2][TILE];
    for (int64_t i = 0; i < TILE; i++) {
        sums[0][i] = i < count ? grads.lse[h * a.num_tokens + first + i] : INFINITY;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; i < count && d < a.size; d += 16)
            sum = _mm512_fmadd_ps(Bf16::load(grads.d_out.row(first + i, h), d),
                                  Bf16::load(grads.out.row(first + i, h), d), sum);
        sums[1][i] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t half = 0; half < 2; half++) {
        lse[half] = _mm512_loadu_ps(sums[0] + 16 * half);
        delta[half] = _mm512_loadu_ps(sums[1] + 16 * half);
    }
}

AVX512 inline void backward_tile(const Attention& a, const Gradients& grads, int64_t s, int64_t i0, int64_t h,
                                 Scratch& w) {
    const int64_t start = a.cu_queries[s] + i0, count = std::min(TILE, a.num_queries(s) - i0), size = a.size;
    const Sight sight(a, s, i0, count);
    pack_tile(a.q, start, count, h, size, w.tile.data());
    pack_tile(grads.d_out, start, count, h, size, w.d_tile.data());
    pack_queries(a.q, start, count, h, size, w.queries.data());
    pack_queries(grads.d_out, start, count, h, size, w.d_out.data());
    __m512 lse[2], delta[2];
    tile_sums(a, grads, start, count, h, lse, delta);
    const __m512 ones[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
    std::fill(w.out.begin(), w.out.end(), 0.0f);
    for (int64_t from = sight.begin; from < sight.end; from += BLOCK) {
        const int64_t to = std::min(from + BLOCK, sight.end);
        score_gradients(a, sight, from, to, w, lse, delta);
        add_weighted(w.d_pairs.data(), w.keys.data() + from / 2 * size, (to - from + 1) / 2, size, ones,
                     w.out.data());
        for (int64_t j = 0; j < to - from; j += PANEL) {
            const int64_t keys = std::min(PANEL, to - from - j), at = (from + j) * size;
            add_transposed(w.rows.data() + j * TILE, w.d_out.data(), keys, size, w.d_values.data() + at);
            add_transposed(w.d_rows.data() + j * TILE, w.queries.data(), keys, size, w.d_keys.data() + at);
        }
    }
    store_tile(w.out.data(), ones, start, count, h, a.num_heads, size, grads.d_q);
}

// Sequences [begin, end), each but the first with keys of the one before it; one head of keys.
AVX512 inline void backward_item(const Attention& a, const Gradients& grads, int64_t begin, int64_t end, int64_t g,
                                 Scratch& w) {
    const int64_t first = a.cu_queries[begin], num_tokens = a.cu_queries[end] - first, size = a.size;
    const int64_t per_group = a.num_heads / a.num_kv_heads;
    w.tile.resize(size / 2 * TILE), w.d_tile.resize(size / 2 * TILE), w.out.resize(size * TILE);
    w.queries.resize(TILE / 2 * size), w.d_out.resize(TILE / 2 * size), w.d_pairs.resize(BLOCK / 2 * TILE);
    w.rows.resize(BLOCK * TILE), w.d_rows.resize(BLOCK * TILE);
    w.chain_keys.assign(num_tokens * size, 0.0f), w.chain_values.assign(num_tokens * size, 0.0f);
    for (int64_t s = begin; s < end; s++) {
        const int64_t n = a.num_keys(s), length = a.num_queries(s);
        if (length == 0) continue;
        find_rows(a, a.k, s, g, w.key_rows), find_rows(a, a.v, s, g, w.value_rows);
        pack_keys(a, a.k, s, g, w.keys);
        w.d_keys.assign(n * size, 0.0f), w.d_values.assign(n * size, 0.0f);
        for (int64_t h = g * per_group; h < (g + 1) * per_group; h++)
            for (int64_t i0 = 0; i0 < length; i0 += TILE) backward_tile(a, grads, s, i0, h, w);
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (a.key_token(s, j) - first) * size;
            for (int64_t d = 0; d < size; d += 16) {
                float *k = w.chain_keys.data() + at + d, *v = w.chain_values.data() + at + d;
                _mm512_storeu_ps(k, _mm512_add_ps(_mm512_loadu_ps(k), _mm512_loadu_ps(w.d_keys.data() + j * size + d)));
                _mm512_storeu_ps(v,
                                 _mm512_add_ps(_mm512_loadu_ps(v), _mm512_loadu_ps(w.d_values.data() + j * size + d)));
            }
        }
    }
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t d = 0; d < size; d += 16) {
            const int64_t to = ((first + t) * a.num_kv_heads + g) * size + d;
            Bf16::store(grads.d_k, to, _mm512_loadu_ps(w.chain_keys.data() + t * size + d));
            Bf16::store(grads.d_v, to, _mm512_loadu_ps(w.chain_values.data() + t * size + d));
        }
}

inline void forward(const Attention& a, int64_t num_seqs, uint16_t* out, float* lse) {
#pragma omp parallel
    {
        Scratch w;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_seqs * a.num_kv_heads; item++)
            forward_item(a, item / a.num_kv_heads, item % a.num_kv_heads, w, out, lse);
    }
}

inline void backward(const Attention& a, int64_t num_seqs, const Gradients& grads) {
    std::vector<int64_t> chains;  // where each begins, and the end of the last
    for (int64_t s = 0; s < num_seqs; s++)
        if (a.num_shared(s) == 0) chains.push_back(s);
    const int64_t num_chains = (int64_t)chains.size();
    chains.push_back(num_seqs);
#pragma omp parallel
    {
        Scratch w;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_chains * a.num_kv_heads; item++) {
            const int64_t c = item / a.num_kv_heads;
            backward_item(a, grads, chains[c], chains[c + 1], item % a.num_kv_heads, w);
        }
    }
}

}  // namespace attention
