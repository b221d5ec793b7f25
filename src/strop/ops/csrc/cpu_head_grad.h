// The products of the head's backward in bf16 (see strop_cpu.h): d_words, the gradient by a chunk's logits, by
// the weight (summed over the words) and by the hidden states (summed over the tokens).
//
// Both are the tile of cpu_avx512.h or cpu_amx.h: rows times 32 tokens, with two summands of a sum side by side
// in 32 bits. What is not stored so is interleaved first, which is one pass over each matrix of a product.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "cpu_amx.h"
#include "cpu_avx512.h"

namespace head {

constexpr int64_t TOKENS = 4 * TILE;          // tokens of a work item: with T::words words they stay in L2
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

// Words from .. to - 1 of out [words, H], bf16 or fp32; columns of the tiles first .. last - 1.
template <class T, class Out>
AVX512 void weight_item(const Head& h, int64_t from, int64_t to, int64_t first, int64_t last, int64_t size, Out* out) {
    const bool whole_lines = size % TILE == 0 && (uintptr_t)out % 64 == 0;
    [[maybe_unused]] const typename T::Tiles tiles;
    for (int64_t w = from; w < to; w += T::panels * PANEL) {
        const int64_t words = std::min(T::panels * PANEL, to - w), stride = h.stride * T::bytes;
        const Rows rows = {(const char*)h.weight + w * stride, stride};
        for (int64_t tile = first; tile < last; tile++) {
            __m512 z[T::panels][PANEL][2];
            tile_logits<T>(h, tile, rows, words, z);
            for (int64_t i = 0; i < words; i++) {
                const __m512(&row)[2] = z[i / PANEL][i % PANEL];
                store(out + (w + i) * size + tile * TILE, row[0], row[1], columns_left(size - tile * TILE), whole_lines);
            }
        }
    }
    if (whole_lines) _mm_sfence();
}

// out [words, H] = d_words [words, n] times hidden, as pack_turned gave it.
template <class T, class Out>
void weight_product(const void* d_words, const uint16_t* turned, int64_t padded, int64_t size, int64_t num_words,
                    void* out) {
    const Head h = {turned, d_words, 0, 0, padded, padded, 0, num_words, nullptr, {}, false};
    const int64_t tiles = ceil_div(size, TILE), block = PANELS_PER_ITEM * PANEL, blocks = ceil_div(num_words, block);
    const int64_t fit = std::max<int64_t>(1, COLUMN_BYTES / (TILE * 2 * (padded + 1))), groups = ceil_div(tiles, fit);
    const int64_t group = ceil_div(tiles, groups);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < blocks * groups; item++) {  // those of one group follow each other
        const int64_t from = item % blocks * block, first = item / blocks * group;
        weight_item<T>(h, from, std::min(from + block, num_words), first, std::min(first + group, tiles), size,
                       (Out*)out);
    }
}

// 16 of the weight's elements, those that are `there`: bf16, or rounded to it.
AVX512 INLINE __m512i columns16(__mmask16 there, const uint16_t* row) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row));
}
AVX512 INLINE __m512i columns16(__mmask16 there, const float* row) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, row)));
}

// The first `count` (of 16) columns of two rows of the weight, side by side; the second row may be NULL: zeros.
template <class W>
AVX512 INLINE __m512i column_pairs(const W* one, const W* two, int64_t count) {
    const __mmask16 there = (__mmask16)((1u << count) - 1);
    __m512i a = columns16(there, one), b = two == nullptr ? _mm512_setzero_si512() : columns16(there, two);
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// `words` rows of the weight, whose first column is `column`, -> [pairs of words][12][2]
template <class W>
AVX512 INLINE void turn_columns(Bf16, const W* rows, int64_t stride, int64_t words, int64_t count, uint16_t* out) {
    for (int64_t w = 0; w < words; w += 2, out += 2 * PANEL) {
        const W* row = rows + w * stride;
        _mm512_mask_storeu_epi32(out, 0xfff, column_pairs(row, w + 1 < words ? row + stride : nullptr, count));
    }
}

// sum[12][32 tokens] of a panel of columns, plus the products of `pairs` pairs of words.
template <class T>
AVX512 INLINE void add_products(const uint16_t* panel, const uint16_t* tokens, int64_t pairs, int64_t, float* sum,
                                int64_t padded) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, panel += 2 * PANEL, tokens += 2 * TILE) {
        __m512i a0 = _mm512_loadu_si512(tokens), a1 = _mm512_loadu_si512(tokens + TILE);
#pragma GCC unroll 12
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t pair;
            std::memcpy(&pair, panel + 2 * i, 4);
            __m512i b = _mm512_set1_epi32(pair);
            acc[i][0] = T::dot(acc[i][0], a0, b);
            acc[i][1] = T::dot(acc[i][1], a1, b);
        }
    }
    for (int64_t i = 0; i < PANEL; i++) {
        float* to = sum + i * padded;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[i][0]));
        _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), acc[i][1]));
    }
}

#ifdef STROP_AMX
// r[i] lane j <-> r[j] lane i: bit by bit of the two indices.
AVX512 INLINE void transpose16(__m512i (&r)[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i other = _mm512_add_epi32(lane, _mm512_set1_epi32(16));  // the same lane of the second row
#pragma GCC unroll 4
    for (int bit = 1; bit < 16; bit *= 2) {
        const __m512i by = _mm512_set1_epi32(bit);
        const __mmask16 set = _mm512_test_epi32_mask(lane, by);
        const __m512i low = _mm512_mask_sub_epi32(lane, set, other, by);
        const __m512i high = _mm512_mask_mov_epi32(_mm512_add_epi32(lane, by), set, other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i & bit) continue;
            const __m512i one = r[i], two = r[i + bit];
            r[i] = _mm512_permutex2var_epi32(one, low, two);
            r[i + bit] = _mm512_permutex2var_epi32(one, high, two);
        }
    }
}

// -> [column][pairs of words][2]: rows as AMX loads them
template <class W>
AVX512 INLINE void turn_columns(Amx, const W* rows, int64_t stride, int64_t words, int64_t count, uint16_t* out) {
    const int64_t pairs = ceil_div(words, 2);
    for (int64_t k = 0; k < pairs; k += 16) {
        const int64_t here = std::min<int64_t>(16, pairs - k);
        __m512i r[16];
        for (int64_t j = 0; j < 16; j++) {
            const int64_t w = 2 * (k + j);
            const W* row = rows + w * stride;
            r[j] = j < here ? column_pairs(row, w + 1 < words ? row + stride : nullptr, count) : _mm512_setzero_si512();
        }
        transpose16(r);
        for (int64_t i = 0; i < count; i++)
            _mm512_mask_storeu_epi32(out + 2 * (i * pairs + k), (__mmask16)((1u << here) - 1), r[i]);
    }
}

// sum[count columns][32 tokens]
template <>
AVX512 INLINE void add_products<Amx>(const uint16_t* columns, const uint16_t* tokens, int64_t pairs, int64_t count,
                                     float* sum, int64_t padded) {
    amx_product((const char*)tokens, (const char*)columns, pairs * 4, count, pairs, sum, padded * 4, true);
}
#endif

// d_words and the weight, two rows of a pair of words side by side, for the words from `from`: one work item.
template <class T, class W>
AVX512 void turn_item(const uint16_t* d_words, const W* weight, int64_t padded, int64_t size, int64_t stride,
                      int64_t words, int64_t which, uint16_t* columns, uint16_t* tokens) {
    const int64_t pairs = ceil_div(words, 2), blocks = ceil_div(size, T::columns);
    if (which < blocks) {
        const int64_t column = which * T::columns, count = std::min(T::columns, size - column);
        turn_columns(T(), weight + column, stride, words, count, columns + column * 2 * pairs);
        return;
    }
    const int64_t tile = which - blocks;
    uint16_t* to = tokens + TILE * tile * 2 * pairs;
    for (int64_t w = 0; w < words; w += 2, to += 2 * TILE) {
        const uint16_t* row = d_words + w * padded + tile * TILE;
        interleave(row, w + 1 < words ? row + padded : nullptr, TILE, to);
    }
}

// Columns begin .. end - 1 of the weight, tokens of the tiles first .. last - 1.
template <class T>
AVX512 void hidden_item(const uint16_t* scratch, const uint16_t* tokens, int64_t padded, int64_t size,
                        int64_t num_words, int64_t first, int64_t last, int64_t begin, int64_t end, float* sum) {
    const int64_t h = ceil_div(size, PANEL) * PANEL, step = T::panels * PANEL;
    [[maybe_unused]] const typename T::Tiles tiles;
    for (int64_t from = 0; from < num_words; from += T::words) {
        const int64_t pairs = ceil_div(std::min(T::words, num_words - from), 2);
        for (int64_t column = begin; column < end; column += step)
            for (int64_t tile = first; tile < last; tile++)
                add_products<T>(scratch + h * from + column * 2 * pairs,
                                tokens + padded * from + tile * TILE * 2 * pairs, pairs, std::min(step, size - column),
                                sum + column * padded + tile * TILE, padded);
    }
}

// sum fp32 [h, n] += (d_words [words, n]^T times weight [words, H])^T. Two rows of a pair of words are put side by
// side in scratch first: the weight as turn_columns does, [depth][h][pairs][2] or [depth][panel][pairs][12][2],
// then [depth][tile][pairs][32][2] of d_words.
template <class T, class W>
void hidden_product(const uint16_t* d_words, const void* weight, int64_t padded, int64_t size, int64_t stride,
                    int64_t num_words, uint16_t* scratch, float* sum) {
    const int64_t h = ceil_div(size, PANEL) * PANEL, tiles = padded / TILE, depths = ceil_div(num_words, T::words);
    const int64_t blocks = ceil_div(size, T::columns) + tiles;
    uint16_t* const tokens = scratch + h * ceil_div(num_words, 2) * 2;
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < depths * blocks; item++) {
        const int64_t from = item % depths * T::words;
        turn_item<T>(d_words + from * padded, (const W*)weight + from * stride, padded, size, stride,
                     std::min(T::words, num_words - from), item / depths, scratch + h * from, tokens + padded * from);
    }
    const int64_t step = T::panels * PANEL, steps = ceil_div(size, step);
    const int64_t groups = ceil_div(padded, TOKENS), parts = std::min<int64_t>(4, steps), part = ceil_div(steps, parts);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < groups * parts; item++) {
        const int64_t first = item / parts * (TOKENS / TILE), last = std::min(first + TOKENS / TILE, tiles);
        const int64_t begin = item % parts * part * step, end = std::min(begin + part * step, size);
        hidden_item<T>(scratch, tokens, padded, size, num_words, first, last, begin, end, sum);
    }
}

}  // namespace head
#pragma GCC diagnostic pop
