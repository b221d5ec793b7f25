// The products of the head's backward in bf16 (see strop_cpu.h): d_words, the gradient by a chunk's logits, by
// the weight (summed over the words) and by the hidden states (summed over the tokens).
//
// Both are cpu_avx512.h's tile: 12 rows broadcast against 32 lanes, with two summands of a sum side by side
// in 32 bits. What is not stored so is interleaved first, which is one pass over each matrix of a product.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cpu_avx512.h"

namespace head {

constexpr int64_t DEPTH = 1024;              // words whose products are summed in registers: a panel fills half of L1
constexpr int64_t TOKENS = 4 * TILE;         // tokens of a work item: with DEPTH words they stay in L2
constexpr int64_t COLUMN_BYTES = 512 * 1024;  // interleaved hidden states of a work item: they stay in L2

// 32 columns of two rows (the second may be NULL: zeros), of which `count` are there -> [32][2].
AVX512 INLINE void interleave(const uint16_t* one, const uint16_t* two, int64_t count, uint16_t* out) {
    const __mmask32 there = count >= 32 ? ~0u : (1u << count) - 1;
    __m512i a = _mm512_maskz_loadu_epi16(there, one);
    __m512i b = two == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, two);
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1));
    __m512i low_b = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(b));
    __m512i high_b = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(low_b, 16)));
    _mm512_storeu_si512(out + 32, _mm512_or_si512(high, _mm512_slli_epi32(high_b, 16)));
}

// hidden [N, H] -> [ceil(H / 32)][n / 2][32][2]; zeros beyond N and H.
AVX512 inline void pack_turned(const uint16_t* hidden, int64_t num_rows, int64_t size, int64_t stride, uint16_t* out) {
    const int64_t pairs = pad(num_rows) / 2;
#pragma omp parallel for schedule(static)
    for (int64_t column = 0; column < size; column += TILE) {
        uint16_t* to = out + column * 2 * pairs;
        for (int64_t k = 0; k < pairs; k++, to += 2 * TILE) {
            const uint16_t* from = hidden + 2 * k * stride + column;
            const int64_t count = 2 * k < num_rows ? size - column : 0;
            interleave(from, 2 * k + 1 < num_rows ? from + stride : nullptr, count, to);
        }
    }
}

// Words from .. to - 1 of out [words, H], columns of the tiles first .. last - 1.
AVX512 inline void weight_item(const Head& h, int64_t from, int64_t to, int64_t first, int64_t last, int64_t size,
                               uint16_t* out) {
    const bool whole_lines = size % TILE == 0 && (uintptr_t)out % 64 == 0;
    for (int64_t w = from; w < to; w += PANEL) {
        const int64_t words = std::min(PANEL, to - w);
        for (int64_t tile = first; tile < last; tile++) {
            __m512 z[PANEL][2];
            tile_logits<Bf16>(h, tile, w, words, z);
            const int64_t left = size - tile * TILE;
            const __mmask32 there = left >= TILE ? ~0u : (1u << left) - 1;
            for (int64_t i = 0; i < words; i++) {
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(z[i][1], z[i][0]);
                uint16_t* const line = out + (w + i) * size + tile * TILE;
                if (whole_lines)  // not read again before it has left the caches
                    _mm512_stream_si512((__m512i*)line, both);
                else
                    _mm512_mask_storeu_epi16(line, there, both);
            }
        }
    }
}

// out [words, H] = d_words [words, n] times hidden, as pack_turned gave it.
inline void weight_product(const void* d_words, const uint16_t* turned, int64_t padded, int64_t size,
                           int64_t num_words, uint16_t* out) {
    const Head h = {turned, d_words, 0, 0, padded, padded, 0, num_words, nullptr, {}};
    const int64_t tiles = ceil_div(size, TILE), block = PANELS_PER_ITEM * PANEL, blocks = ceil_div(num_words, block);
    const int64_t fit = std::max<int64_t>(1, COLUMN_BYTES / (TILE * 2 * (padded + 1))), groups = ceil_div(tiles, fit);
    const int64_t group = ceil_div(tiles, groups);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < blocks * groups; item++) {  // those of one group follow each other
        const int64_t from = item % blocks * block, first = item / blocks * group;
        weight_item(h, from, std::min(from + block, num_words), first, std::min(first + group, tiles), size, out);
    }
}

// 12 columns of two rows of the weight -> [12][2]
AVX512 INLINE void interleave_panel(const uint16_t* one, const uint16_t* two, int64_t count, uint16_t* out) {
    const __mmask16 there = (1u << count) - 1;
    __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, one));
    __m512i b = two == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, two));
    _mm512_mask_storeu_epi32(out, 0xfff, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// sum[12][32 tokens] of a panel of columns, plus the products of `pairs` pairs of words.
AVX512 INLINE void add_products(const uint16_t* panel, const uint16_t* tokens, int64_t pairs, float* sum, int64_t padded) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, panel += 2 * PANEL, tokens += 2 * TILE) {
        __m512i a0 = _mm512_loadu_si512(tokens), a1 = _mm512_loadu_si512(tokens + TILE);
#pragma GCC unroll 12
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t pair;
            std::memcpy(&pair, panel + 2 * i, 4);
            __m512i b = _mm512_set1_epi32(pair);
            acc[i][0] = Bf16::dot(acc[i][0], a0, b);
            acc[i][1] = Bf16::dot(acc[i][1], a1, b);
        }
    }
    for (int64_t i = 0; i < PANEL; i++) {
        float* to = sum + i * padded;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[i][0]));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), acc[i][1]));
    }
}

// sum fp32 [panels * 12, n] += (d_words [words, n]^T times weight [words, H])^T. Two rows of a pair of words
// are interleaved in scratch first: [depth][panel][pairs][12][2] of the weight, then [depth][tile][pairs][32][2].
AVX512 inline void hidden_product(const uint16_t* d_words, const uint16_t* weight, int64_t padded, int64_t size,
                                  int64_t stride, int64_t num_words, uint16_t* scratch, float* sum) {
    const int64_t panels = ceil_div(size, PANEL), tiles = padded / TILE, depths = ceil_div(num_words, DEPTH);
    uint16_t* const tokens = scratch + panels * PANEL * ceil_div(num_words, 2) * 2;
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < depths * (panels + tiles); item++) {
        const int64_t from = item % depths * DEPTH, words = std::min(DEPTH, num_words - from);
        const int64_t pairs = ceil_div(words, 2), which = item / depths;
        if (which < panels) {
            uint16_t* to = scratch + PANEL * (panels * from + which * 2 * pairs);
            const int64_t column = which * PANEL, count = std::min(PANEL, size - column);
            for (int64_t w = from; w < from + words; w += 2, to += 2 * PANEL) {
                const uint16_t* row = weight + w * stride + column;
                interleave_panel(row, w + 1 < num_words ? row + stride : nullptr, count, to);
            }
        } else {
            const int64_t tile = which - panels;
            uint16_t* to = tokens + TILE * (tiles * from + tile * 2 * pairs);
            for (int64_t w = from; w < from + words; w += 2, to += 2 * TILE) {
                const uint16_t* row = d_words + w * padded + tile * TILE;
                interleave(row, w + 1 < num_words ? row + padded : nullptr, TILE, to);
            }
        }
    }
    const int64_t groups = ceil_div(padded, TOKENS), parts = std::min<int64_t>(4, panels);
    const int64_t part = ceil_div(panels, parts);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < groups * parts; item++) {
        const int64_t first = item / parts * (TOKENS / TILE), last = std::min(first + TOKENS / TILE, tiles);
        const int64_t begin = item % parts * part, end = std::min(begin + part, panels);
        for (int64_t from = 0; from < num_words; from += DEPTH) {
            const int64_t pairs = ceil_div(std::min(DEPTH, num_words - from), 2);
            for (int64_t panel = begin; panel < end; panel++)
                for (int64_t tile = first; tile < last; tile++)
                    add_products(scratch + PANEL * (panels * from + panel * 2 * pairs),
                                 tokens + TILE * (tiles * from + tile * 2 * pairs), pairs,
                                 sum + panel * PANEL * padded + tile * TILE, padded);
        }
    }
}

}  // namespace head
#pragma GCC diagnostic pop
