// A linear layer's three products in bf16 for CPUs with AVX-512's bf16 dot product: y = x W^T, dx = dy W and
// dW = dy^T x, summed in fp32 over the whole depth and rounded once. Weights may be fp32: they are rounded as they
// are packed, and dW then is not rounded at all.
//
// As in cpu_avx512.h a tile is 12 rows, broadcast, by 32 columns in lanes: 24 accumulators. What lies in lanes is
// packed first, [tile][depth / 2][32 columns][2], with two summands of a sum side by side in 32 bits: W for y and
// dx, x for dW. The rows are x and dy as they are; for dW those of dy^T, packed [panel][depth / 2][12][2]. A tile
// has one owner and one order of summation, and its numbers do not know which rows lie beside it: results depend
// neither on the threads nor on the height of the batch.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <array>
#include <utility>

#include "cpu_avx512.h"

namespace linear {

using head::ceil_div;
using head::columns_left;
using head::store;

constexpr int64_t TILE = STROP_TILE, PANEL = STROP_PANEL;
constexpr int64_t ROWS_PER_ITEM = 10 * PANEL, TILES_PER_ITEM = 9;
constexpr int64_t L1_BYTES = 40 * 1024, L2_BYTES = 512 * 1024;  // what a work item keeps in them of one operand
constexpr int64_t STRIP = 4 * TILE, PANEL_STRIP = 8 * PANEL;    // columns that are packed side by side
constexpr int64_t PACK_ROWS = 512;                              // rows of a work item of packing
constexpr int64_t AHEAD = 32;                                   // rows that packing asks memory for in advance

struct Product {
    const uint16_t* lanes;  // packed
    const uint16_t* rows;   // rows `stride` apart, or panels
    int64_t stride, num_rows, num_columns, pairs;  // pairs: half of the depth, rounded up
    const uint16_t* bias;                          // of the columns, or NULL
    void* out;                                     // [num_rows, num_columns]
};

// ROWS rows of out at `out`. PANELS: rows is a panel; such a product is the weight's gradient, which nothing reads
// soon: whole lines go past the caches. next: the panel of rows after this one, asked for in advance.
template <int ROWS, bool PANELS, typename Out>
AVX512 __attribute__((noinline)) void tile(const Product& p, const uint16_t* lanes, const uint16_t* rows,
                                           const char* next, int64_t column, Out* out) {
    __m512 acc[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    const int64_t stride = p.stride, pairs = p.pairs;
    const uint16_t* const third[4] = {rows, rows + 3 * stride, rows + 6 * stride, rows + 9 * stride};
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh a0 = (__m512bh)_mm512_loadu_si512(lanes + k * 2 * TILE);
        const __m512bh a1 = (__m512bh)_mm512_loadu_si512(lanes + k * 2 * TILE + TILE);
        if (ROWS == PANEL) _mm_prefetch(next + k * 4 * PANEL, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, PANELS ? rows + (k * PANEL + i) * 2 : third[i / 3] + i % 3 * stride + k * 2, 4);
            const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a0, b);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a1, b);
        }
    }
    const __mmask32 there = columns_left(p.num_columns - column);
    if (p.bias != nullptr) {
        const __m512i both = _mm512_maskz_loadu_epi16(there, p.bias + column);
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
        const __m512 b1 = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            acc[i][0] = _mm512_add_ps(acc[i][0], b0);
            acc[i][1] = _mm512_add_ps(acc[i][1], b1);
        }
    }
    const int64_t ld = p.num_columns;
    if (PANELS && there == ~0u && ((uintptr_t)out | (uintptr_t)ld * sizeof(Out)) % 64 == 0) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) store(out + i * ld, acc[i][0], acc[i][1], there, true);
        return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) store(out + i * ld, acc[i][0], acc[i][1], there, false);
}

template <typename Out>
using Tile = void (*)(const Product&, const uint16_t*, const uint16_t*, const char*, int64_t, Out*);
template <bool PANELS, typename Out, int... I>
constexpr std::array<Tile<Out>, sizeof...(I)> tiles_of(std::integer_sequence<int, I...>) {
    return {tile<I + 1, PANELS, Out>...};
}

// Rows from .. to - 1 (from: a multiple of the panel) of the tiles first .. last - 1. What fits into L1 is kept
// there: the lanes of a tile, else the rows of a panel.
template <bool PANELS, typename Out>
void item(const Product& p, int64_t from, int64_t to, int64_t first, int64_t last) {
    static constexpr auto TILES = tiles_of<PANELS, Out>(std::make_integer_sequence<int, PANEL>());
    const int64_t step = PANELS ? 2 * p.pairs : p.stride;  // elements between rows of one column, or panels' 12
    const auto one = [&](int64_t row, int64_t t) {
        const int64_t next = row + PANEL < to ? row + PANEL : from;
        TILES[std::min(PANEL, to - row) - 1](p, p.lanes + t * TILE * 2 * p.pairs, p.rows + row * step,
                                            (const char*)(p.rows + next * step), t * TILE,
                                            (Out*)p.out + row * p.num_columns + t * TILE);
    };
    if (p.pairs * 4 * TILE <= L1_BYTES) {
        for (int64_t t = first; t < last; t++)
            for (int64_t row = from; row < to; row += PANEL) one(row, t);
    } else {
        for (int64_t row = from; row < to; row += PANEL)
            for (int64_t t = first; t < last; t++) one(row, t);
    }
    if (PANELS) _mm_sfence();
}

// Inside a parallel region.
template <bool PANELS, typename Out>
void multiply(const Product& p) {
    const int64_t tiles = ceil_div(p.num_columns, TILE), tile_bytes = 4 * TILE * p.pairs;
    const int64_t group = std::max<int64_t>(1, std::min(TILES_PER_ITEM, L2_BYTES / std::max<int64_t>(tile_bytes, 1)));
    const int64_t blocks = ceil_div(p.num_rows, ROWS_PER_ITEM);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < ceil_div(tiles, group) * blocks; i++) {
        const int64_t first = i / blocks * group, from = i % blocks * ROWS_PER_ITEM;
        item<PANELS, Out>(p, from, std::min(from + ROWS_PER_ITEM, p.num_rows), first, std::min(first + group, tiles));
    }
}

// ---- Packing

AVX512 INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// 32 elements in bf16, zeros where `there` has none.
AVX512 INLINE __m512i load(const uint16_t* from, __mmask32 there) { return _mm512_maskz_loadu_epi16(there, from); }
AVX512 INLINE __m512i load(const float* from, __mmask32 there) {
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, from);
    const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// The lines of 32 elements are asked for in advance.
template <typename In>
INLINE void fetch(const In* from) {
    _mm_prefetch((const char*)from, _MM_HINT_T0);
    if (sizeof(In) == 4) _mm_prefetch((const char*)(from + 16), _MM_HINT_T0);
}

// `count` <= 32 rows of a matrix as the columns of a tile: [size / 2][32][2], zeros beyond count.
template <typename In>
AVX512 inline void pack_transposed(const In* from, int64_t count, int64_t size, uint16_t* out) {
    const int64_t pairs = size / 2;
    for (int64_t k = 0; k < pairs; k += 16) {
        const int64_t left = std::min<int64_t>(16, pairs - k);
        const __mmask32 there = columns_left(2 * left);
        for (int64_t half = 0; half < 2; half++) {
            __m512i r[16];
            for (int64_t i = 0; i < 16; i++) {  // the next tile's 32 rows follow these in memory
                fetch(from + TILE * size + 2 * TILE * k + (16 * half + i) * TILE);
                const int64_t row = 16 * half + i;
                r[i] = load(from + std::min(row, count - 1) * size + 2 * k, row < count ? there : 0);
            }
            transpose(r);
            for (int64_t i = 0; i < left; i++) _mm512_storeu_si512(out + (k + i) * 2 * TILE + half * TILE, r[i]);
        }
    }
}

// Lanes of two rows, a and b, in turns: those of the first and of the second half of 32 columns.
alignas(64) constexpr uint16_t TURNS[64] = {
    0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
    16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

// Rows from .. to - 1 (from even) of `depth` rows of `size` columns, of which column .. column + width - 1 are
// packed into their tiles. WIDTH: 32 for tiles of lanes, 12 for panels of rows.
template <int WIDTH, typename In>
AVX512 inline void pack_pairs(const In* matrix, int64_t depth, int64_t size, int64_t from, int64_t to,
                              int64_t column, int64_t width, uint16_t* out) {
    const __m512i low = _mm512_load_si512(TURNS), high = _mm512_load_si512(TURNS + 32);
    const int64_t pairs = ceil_div(depth, 2);
    for (int64_t k = from; k < to; k += 2) {
        const In* row = matrix + k * size + column;
        for (int64_t c = 0; c < width; c += TILE) {
            fetch(row + AHEAD * size + c);
            fetch(row + (AHEAD + 1) * size + c);
        }
        uint16_t* to_tile = out + column * 2 * pairs + k * WIDTH;
        for (int64_t c = 0; c < width; c += WIDTH, to_tile += 2 * WIDTH * pairs) {
            const int64_t left = std::min<int64_t>(WIDTH, width - c);
            const __mmask32 there = columns_left(left);
            const __m512i a = load(row + c, there);
            const __m512i b = load(row + size + c, k + 1 < depth ? there : 0);
            const __m512i first = _mm512_permutex2var_epi16(a, low, b);
            if (WIDTH == PANEL) {
                _mm256_storeu_si256((__m256i*)to_tile, _mm512_castsi512_si256(first));
                _mm_storeu_si128((__m128i*)(to_tile + 16), _mm512_extracti32x4_epi32(first, 2));
            } else {
                _mm512_storeu_si512(to_tile, first);
                _mm512_storeu_si512(to_tile + TILE, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }
}

// Work item i of packing a matrix [depth, size] so; see num_items.
template <int WIDTH, typename In>
void pack_item(const In* matrix, int64_t depth, int64_t size, int64_t i, uint16_t* out) {
    const int64_t strip = WIDTH == PANEL ? PANEL_STRIP : STRIP, strips = ceil_div(size, strip);
    const int64_t column = i % strips * strip, from = i / strips * PACK_ROWS;
    pack_pairs<WIDTH>(matrix, depth, size, from, std::min(from + PACK_ROWS, depth), column,
                      std::min(strip, size - column), out);
}

inline int64_t num_items(int64_t depth, int64_t size, int64_t strip) {
    return ceil_div(size, strip) * ceil_div(depth, PACK_ROWS);
}

// ---- The products: x [T, K], weight [N, K], dy [T, N]

// y [T, N]; scratch: ceil(N / 32) * 32 * K
template <typename Weight>
void forward(const uint16_t* x, const Weight* weight, const uint16_t* bias, int64_t num_tokens, int64_t num_in,
                    int64_t num_out, uint16_t* scratch, uint16_t* y) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < num_out; n += TILE)
            pack_transposed(weight + n * num_in, std::min(TILE, num_out - n), num_in, scratch + n * num_in);
        multiply<false, uint16_t>({scratch, x, num_in, num_tokens, num_out, num_in / 2, bias, y});
    }
}

// dx [T, K]; scratch: ceil(K / 32) * 32 * N
template <typename Weight>
void input_gradient(const uint16_t* dy, const Weight* weight, int64_t num_tokens, int64_t num_in,
                           int64_t num_out, uint16_t* scratch, uint16_t* dx) {
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_items(num_out, num_in, STRIP); i++)
            pack_item<TILE>(weight, num_out, num_in, i, scratch);
        multiply<false, uint16_t>({scratch, dy, num_out, num_tokens, num_in, num_out / 2, nullptr, dx});
    }
}

// dW [N, K]; scratch: (ceil(K / 32) * 32 + ceil(N / 12) * 12) * ceil(T / 2) * 2
template <typename Weight>
void weight_gradient(const uint16_t* dy, const uint16_t* x, int64_t num_tokens, int64_t num_in, int64_t num_out,
                     uint16_t* scratch, Weight* d_weight) {
    const int64_t pairs = ceil_div(num_tokens, 2), lanes = num_items(num_tokens, num_in, STRIP);
    const int64_t panels = num_items(num_tokens, num_out, PANEL_STRIP);
    uint16_t* const rows = scratch + ceil_div(num_in, TILE) * TILE * 2 * pairs;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < lanes + panels; i++) {
            if (i < lanes)
                pack_item<TILE>(x, num_tokens, num_in, i, scratch);
            else
                pack_item<PANEL>(dy, num_tokens, num_out, i - lanes, rows);
        }
        multiply<true, Weight>({scratch, rows, 0, num_out, num_in, pairs, nullptr, d_weight});
    }
}

}  // namespace linear
#pragma GCC diagnostic pop
