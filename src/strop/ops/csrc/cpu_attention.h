// Causal attention over packed sequences for CPUs with AVX-512's bf16 dot product, forward and backward.
//
// A lane is a query of one head, so a softmax needs no shuffles, and a query's numbers do not know which sequences
// lie beside it. Heads that share their keys share a tile of 32 lanes too: all of a query's, then the next query's,
// as they lie in memory. So the causal mask wastes few keys at the diagonal, and the keys' gradients sum over the
// heads as they sum over the queries. Keys come in panels of 8, and in blocks with the running maximum of flash
// attention (Dao et al. 2022); the backward computes the probabilities again from the log-sum-exp.
// A work item of the forward is some tiles of a sequence and a head of keys; of the backward a head of keys in a
// chain of sequences that share prompts, so that every sum over queries has one owner and one order.
//
// Legend: L queries and n keys of a sequence (n > L where a prompt is shared: the first n - L keys are the first
// ones of the sequence before it), D the size of a head, a multiple of 16; group: heads that share their keys.
#pragma once
// As in cpu_avx512.h.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_avx512.h"
#include "strop_cpu.h"

namespace attention {

using head::Bf16;
using head::exp2_16;

// Inlined into a larger function, these loops would share its registers.
#define APART __attribute__((noinline))

constexpr int64_t HALF = 16, TILE = 32;  // lanes of a register, and of a tile
constexpr int64_t PANEL = 8;             // keys, or dims, that meet a tile in registers
constexpr int64_t BLOCK = 128;           // keys between two corrections of a running maximum
constexpr int64_t TEAM = 2;              // tiles of the backward that add to the keys' gradients at once
constexpr int64_t ITEM_TILES = 32;       // of the forward
constexpr float NEVER = -1e30f;          // below every score, and finite: its differences are numbers
constexpr float LN_2 = 0.693147181f;

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

    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t num_queries(int64_t s) const { return cu_queries[s + 1] - cu_queries[s]; }
    int64_t num_keys(int64_t s) const { return cu_keys[s + 1] - cu_keys[s]; }
    int64_t num_shared(int64_t s) const { return num_keys(s) - num_queries(s); }
    int64_t num_tiles(int64_t s) const { return head::ceil_div(num_queries(s) * group(), TILE); }
    // The token of a sequence's j-th key.
    int64_t key_token(int64_t s, int64_t j) const {
        const int64_t shared = num_shared(s);
        return j < shared ? cu_queries[s - 1] + j : cu_queries[s] + j - shared;
    }
};

// An attention whose head size the compiler knows, which unrolls loops over it. Hides the member of Attention.
template <int64_t SIZE>
struct Sized : Attention {
    static constexpr int64_t size = SIZE;
};

template <class Function>
void with_size(const Attention& a, Function function) {
    if (a.size == 64)
        function(Sized<64>{a});
    else if (a.size == 128)
        function(Sized<128>{a});
    else
        function(a);
}

// Memory of a thread, from the start of a cache line on. What it held is gone when it grows.
template <class T>
struct Buffer {
    std::unique_ptr<T[]> memory;
    int64_t room = 0;
    T* at = nullptr;
    void resize(int64_t count) {
        if (count <= room) return;
        memory.reset(new T[count + 64 / sizeof(T)]);
        at = (T*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        room = count;
    }
    void zeros(int64_t count) {
        resize(count);
        std::memset(at, 0, count * sizeof(T));
    }
};

// ---- Layouts

// 32 numbers as bf16: low in the first half.
AVX512 INLINE __m512i halves_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// The first (second) 16 of two rows of 32 bf16, pair by pair.
AVX512 INLINE __m512i interleave(__m512i low, __m512i high, int half) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(low, _mm512_add_epi16(order, _mm512_set1_epi16((short)(16 * half))), high);
}

// Two numbers as bf16 in each 32-bit lane.
AVX512 INLINE __m512i pairs_of(__m512 low, __m512 high) {
    const __m512i both = halves_of(low, high);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

// 16 rows of 16 times 32 bits -> their columns.
AVX512 INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    // r[4 b + c]: of rows 4 b .. 4 b + 3 the columns c, c + 4, c + 8, c + 12, in 128 bits each
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
}

// Lanes of 32 bits that a row of D bf16 has from its pair `d` on.
inline __mmask16 pair_lanes(int64_t size, int64_t d) { return size / 2 - d >= 16 ? 0xffff : 0x00ff; }

// 32 queries of the heads that share a head of keys, and the keys that they see: [begin, end) at all, and a mask
// for each.
struct Tile {
    int64_t count = 0;                        // lanes with a query; the last ones of a sequence may have none
    int64_t tokens[TILE], heads[TILE];        // of each lane
    alignas(64) int32_t positions[TILE];      // of each lane's query among the keys
    int64_t window, begin, end;

    Tile(const Attention& a, int64_t s, int64_t g, int64_t index) : window(a.window) {
        const int64_t length = a.num_queries(s), group = a.group();
        int64_t query = index * TILE / group, h = index * TILE % group;
        for (int64_t i = 0; i < TILE; i++) {
            if (query < length) count = i + 1;
            const int64_t own = std::min(query, length - 1);
            tokens[i] = a.cu_queries[s] + own, heads[i] = g * group + h;
            positions[i] = (int32_t)(a.num_shared(s) + own);
            if (++h == group) query++, h = 0;
        }
        begin = window ? std::max<int64_t>(0, positions[0] - window + 1) / PANEL * PANEL : 0;
        end = positions[TILE - 1] + 1;
    }
    const uint16_t* row(const Rows& rows, int64_t lane) const { return rows.row(tokens[lane], heads[lane]); }
    AVX512 INLINE __mmask16 sees(int64_t key, int64_t half) const {
        const __m512i behind =
            _mm512_sub_epi32(_mm512_load_si512(positions + HALF * half), _mm512_set1_epi32((int32_t)key));
        __mmask16 mask = _mm512_cmpge_epi32_mask(behind, _mm512_setzero_si512());
        if (window) mask &= _mm512_cmplt_epi32_mask(behind, _mm512_set1_epi32((int32_t)window));
        return mask;
    }
    bool sees_panel(int64_t key) const {  // every query all PANEL keys
        return key + PANEL <= positions[0] + 1 && (!window || positions[TILE - 1] - key < window);
    }
};

// What memory brings into the cache while a tile is computed: the rows of another, and its own that it will write.
// Few at a time, since more than the core can wait for at once would stop it; and all the way to the first cache:
// what Zen 5 is asked to bring into the second hardly comes sooner.
template <int COUNT>
struct Errand {
    const Tile &next, &own;
    Rows read[COUNT], written;
    int64_t size, lane = 0;
    INLINE void go_on() {
        for (const int64_t end = std::min(lane + 4, TILE); lane < end; lane++)
            for (int64_t d = 0; d < size; d += 32) {
                for (const Rows& rows : read) __builtin_prefetch(next.row(rows, lane) + d);
                __builtin_prefetch(own.row(written, lane) + d, 1);
            }
    }
};

// Rows of a tile -> [D / 2][32] pairs along D.
AVX512 APART inline void pack_tile(const Rows& rows, const Tile& tile, int64_t size, uint32_t* out) {
    for (int64_t half = 0; half < TILE; half += HALF)
        for (int64_t d = 0; d < size / 2; d += 16) {
            const __mmask16 some = pair_lanes(size, d);
            __m512i r[HALF];
            for (int64_t i = 0; i < HALF; i++)
                r[i] = _mm512_maskz_loadu_epi32(half + i < tile.count ? some : 0, tile.row(rows, half + i) + 2 * d);
            transpose(r);
            for (int64_t i = 0; i < std::min<int64_t>(16, size / 2 - d); i++)
                _mm512_storeu_si512(out + (d + i) * TILE + half, r[i]);
        }
}

// Two rows of D (high may be NULL: zeros) -> [D] pairs.
AVX512 INLINE void pack_pair(const uint16_t* low, const uint16_t* high, int64_t size, uint32_t* out) {
    for (int64_t d = 0; d < size; d += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + d)));
        const __m512i b = high ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + d)))
                               : _mm512_setzero_si512();
        _mm512_storeu_si512(out + d, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
}

// Rows of a tile -> [16][D] pairs along the queries.
AVX512 APART inline void pack_queries(const Rows& rows, const Tile& tile, int64_t size, uint32_t* out) {
    for (int64_t i = 0; i < TILE; i += 2, out += size) {
        if (i < tile.count)
            pack_pair(tile.row(rows, i), i + 1 < tile.count ? tile.row(rows, i + 1) : nullptr, size, out);
        else
            std::memset(out, 0, size * 4);
    }
}

// Keys or values of a sequence, up to `end` and zeros to a whole panel: rows [key][D] ...
template <class A>
void copy_keys(const A& a, const Rows& rows, int64_t s, int64_t g, int64_t end,
                      Buffer<uint16_t>& out) {
    out.resize(head::ceil_div(end, PANEL) * PANEL * a.size);
    for (int64_t j = 0; j < end; j++)
        std::memcpy(out.at + j * a.size, rows.row(a.key_token(s, j), g), a.size * 2);
    for (int64_t j = end; j % PANEL; j++) std::memset(out.at + j * a.size, 0, a.size * 2);
}

// ... or [key / 2][D] pairs along the keys.
template <class A>
AVX512 void pack_keys(const A& a, const Rows& rows, int64_t s, int64_t g, int64_t end,
                             Buffer<uint32_t>& out) {
    const int64_t pairs = head::ceil_div(end, PANEL) * PANEL / 2;
    out.resize(pairs * a.size);
    for (int64_t j = 0; j < pairs; j++) {
        if (2 * j < end)
            pack_pair(rows.row(a.key_token(s, 2 * j), g),
                      2 * j + 1 < end ? rows.row(a.key_token(s, 2 * j + 1), g) : nullptr, a.size, out.at + j * a.size);
        else
            std::memset(out.at + j * a.size, 0, a.size * 4);
    }
}

// out [D][32] times factor -> bf16 rows of [T, heads, D].
AVX512 APART inline void store_tile(const float* out, const __m512 (&factor)[2], const Tile& tile, int64_t num_heads,
                              int64_t size, uint16_t* to) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t d = 0; d < size / 2; d += 16) {
            const __mmask16 some = pair_lanes(size, d);
            __m512i r[16];
            for (int64_t i = 0; i < 16; i++) {
                const float* at = out + 2 * std::min(d + i, size / 2 - 1) * TILE + HALF * half;
                r[i] = pairs_of(_mm512_mul_ps(_mm512_loadu_ps(at), factor[half]),
                                _mm512_mul_ps(_mm512_loadu_ps(at + TILE), factor[half]));
            }
            transpose(r);
            for (int64_t i = 0; i < std::min(HALF, tile.count - HALF * half); i++) {
                const int64_t lane = HALF * half + i;
                _mm512_mask_storeu_epi32(to + (tile.tokens[lane] * num_heads + tile.heads[lane]) * size + 2 * d, some,
                                         r[i]);
            }
        }
}

// ---- Products. Each keeps 16 sums in registers, enough to hide the latency of the dot product.

// acc[key][half of the tile] += products of pairs [from, to) of a tile [D / 2][32] with those of PANEL rows of D.
AVX512 INLINE void add_products(const uint32_t* tile, const uint16_t* rows, int64_t size, int64_t from, int64_t to,
                                __m512 (&acc)[PANEL][2]) {
    for (int64_t d = from; d < to; d++) {
        const __m512bh a0 = (__m512bh)_mm512_loadu_si512(tile + d * TILE);
        const __m512bh a1 = (__m512bh)_mm512_loadu_si512(tile + d * TILE + 16);
#pragma GCC unroll 8
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t two;
            std::memcpy(&two, rows + i * size + 2 * d, 4);
            const __m512bh b = (__m512bh)_mm512_set1_epi32(two);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a0, b);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a1, b);
        }
    }
}

AVX512 INLINE void products(const uint32_t* tile, const uint16_t* rows, int64_t size, __m512 (&z)[PANEL][2]) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    add_products(tile, rows, size, 0, size / 2, acc);
    for (int64_t i = 0; i < PANEL; i++) z[i][0] = acc[i][0], z[i][1] = acc[i][1];
}

// The same with beside(0) .. beside(PANEL - 1): other work, for pipes that the dot products leave idle.
template <class Beside>
AVX512 INLINE void products(const uint32_t* tile, const uint16_t* rows, int64_t size, __m512 (&z)[PANEL][2],
                            Beside beside) {
    __m512 acc[PANEL][2];
    for (int64_t i = 0; i < PANEL; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < PANEL; i++) {
        beside(i);
        add_products(tile, rows, size, i * (size / 16), (i + 1) * (size / 16), acc);
    }
    for (int64_t i = 0; i < PANEL; i++) z[i][0] = acc[i][0], z[i][1] = acc[i][1];
}

// out [D][32] = out * factor + Σ over pairs of keys weights[pair][32] * values[pair][D]. fresh: there is no out yet.
AVX512 APART inline void add_weighted(const uint32_t* weights, const uint32_t* values, int64_t num_pairs, int64_t size,
                                const __m512 (&factor)[2], bool fresh, float* out) {
    for (int64_t d = 0; d < size; d += PANEL) {
        __m512 acc[PANEL][2];
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t half = 0; half < 2; half++)
                acc[i][half] = fresh ? _mm512_setzero_ps()
                                     : _mm512_mul_ps(_mm512_loadu_ps(out + (d + i) * TILE + 16 * half), factor[half]);
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

// out [PANEL][D] += Σ over pairs of queries weights[key][pair] * rows[pair][D], WIDTH registers of D at `d`.
template <int WIDTH>
AVX512 INLINE void add_transposed_at(const uint16_t* weights, const uint32_t* rows, int64_t num_pairs, int64_t size,
                                     int64_t d, float* out) {
    __m512 acc[PANEL][WIDTH];
    for (int64_t i = 0; i < PANEL; i++)
        for (int k = 0; k < WIDTH; k++) acc[i][k] = _mm512_loadu_ps(out + i * size + d + 16 * k);
    for (int64_t two = 0; two < num_pairs; two++) {
        __m512bh b[WIDTH];
        for (int k = 0; k < WIDTH; k++) b[k] = (__m512bh)_mm512_loadu_si512(rows + two * size + d + 16 * k);
#pragma GCC unroll 8
        for (int64_t i = 0; i < PANEL; i++) {
            int32_t w;
            std::memcpy(&w, weights + i * TEAM * TILE + 2 * two, 4);
            for (int k = 0; k < WIDTH; k++)
                acc[i][k] = _mm512_dpbf16_ps(acc[i][k], (__m512bh)_mm512_set1_epi32(w), b[k]);
        }
    }
    for (int64_t i = 0; i < PANEL; i++)
        for (int k = 0; k < WIDTH; k++) _mm512_storeu_ps(out + i * size + d + 16 * k, acc[i][k]);
}

AVX512 APART inline void add_transposed(const uint16_t* weights, const uint32_t* rows, int64_t num_pairs, int64_t size,
                                  float* out) {
    int64_t d = 0;
    for (; d + 32 <= size; d += 32) add_transposed_at<2>(weights, rows, num_pairs, size, d, out);
    if (d < size) add_transposed_at<1>(weights, rows, num_pairs, size, d, out);
}

struct Scratch {
    Buffer<uint32_t> values, keys, tile, d_tile, queries, d_out, weights;
    Buffer<uint16_t> key_rows, value_rows, rows, d_rows;
    Buffer<float> out, scores, d_keys, d_values, shared_keys, shared_values;
};

// Work items, the longest first, so that no thread is left with one at the end.
struct Item {
    int64_t cost, sequence, to, head;  // forward: tiles [to - ITEM_TILES, to) of it; backward: sequences up to `to`
};

inline void longest_first(std::vector<Item>& items) {
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

// ---- Forward

// One tile against the keys that it sees: out [D][32], the maximum (of scores times log2 e) and the sum of each query.
template <class A>
AVX512 APART void forward_tile(const A& a, const Tile& tile, Errand<1> errand, Scratch& w,
                                __m512 (&top)[2], __m512 (&total)[2]) {
    const __m512 scale = _mm512_set1_ps(a.scale * head::LOG2_E);
    for (int64_t half = 0; half < 2; half++) top[half] = _mm512_set1_ps(NEVER), total[half] = _mm512_setzero_ps();
    for (int64_t from = tile.begin; from < tile.end; from += BLOCK) {
        const int64_t whole = head::ceil_div(std::min(BLOCK, tile.end - from), PANEL) * PANEL;
        __m512 high[2] = {top[0], top[1]};
        for (int64_t j = 0; j < whole; j += PANEL) {
            __m512 z[PANEL][2];
            products(w.tile.at, w.key_rows.at + (from + j) * a.size, a.size, z);
            errand.go_on();
            const bool all = tile.sees_panel(from + j);
            for (int64_t i = 0; i < PANEL; i++)
                for (int64_t half = 0; half < 2; half++) {
                    __m512 x = _mm512_mul_ps(z[i][half], scale);
                    if (!all) x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), tile.sees(from + j + i, half), x);
                    high[half] = _mm512_max_ps(high[half], x);
                    _mm512_storeu_ps(w.scores.at + (j + i) * TILE + 16 * half, x);
                }
        }
        __m512 factor[2];
        for (int64_t half = 0; half < 2; half++) {
            factor[half] = exp2_16(_mm512_sub_ps(top[half], high[half]));
            top[half] = high[half];
            __m512 sum = _mm512_mul_ps(total[half], factor[half]);
            for (int64_t j = 0; j < whole; j += 2) {
                const float* x = w.scores.at + j * TILE + 16 * half;
                const __m512 p0 = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(x), top[half]));
                const __m512 p1 = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(x + TILE), top[half]));
                sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
                _mm512_storeu_si512(w.weights.at + j / 2 * TILE + 16 * half, pairs_of(p0, p1));
            }
            total[half] = sum;
        }
        add_weighted(w.weights.at, w.values.at + from / 2 * a.size, whole / 2, a.size, factor,
                     from == tile.begin, w.out.at);
    }
}

template <class A>
AVX512 void forward_item(const A& a, const Item& item, Scratch& w, uint16_t* out, float* lse) {
    const int64_t s = item.sequence, g = item.head, end = Tile(a, s, g, item.to - 1).end;
    w.tile.resize(a.size / 2 * TILE), w.out.resize(a.size * TILE);
    w.scores.resize(BLOCK * TILE), w.weights.resize(BLOCK / 2 * TILE);
    copy_keys(a, a.k, s, g, end, w.key_rows);
    pack_keys(a, a.v, s, g, end, w.values);
    for (int64_t t = std::max<int64_t>(0, item.to - ITEM_TILES); t < item.to; t++) {
        const Tile tile(a, s, g, t);
        pack_tile(a.q, tile, a.size, w.tile.at);
        const Tile next(a, s, g, std::min(t + 1, item.to - 1));
        __m512 top[2], total[2];
        forward_tile(a, tile, {next, tile, {a.q}, {out, a.num_heads * a.size, a.size}, a.size}, w, top, total);
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 inverse[2] = {_mm512_div_ps(one, total[0]), _mm512_div_ps(one, total[1])};
        store_tile(w.out.at, inverse, tile, a.num_heads, a.size, out);
        float tops[TILE], totals[TILE];
        for (int64_t half = 0; half < 2; half++) {
            _mm512_storeu_ps(tops + HALF * half, top[half]);
            _mm512_storeu_ps(totals + HALF * half, total[half]);
        }
        for (int64_t i = 0; i < tile.count; i++)
            lse[tile.heads[i] * a.num_tokens + tile.tokens[i]] = tops[i] * LN_2 + std::log(totals[i]);
    }
}

template <class A>
void forward(const A& a, int64_t num_seqs, uint16_t* out, float* lse) {
    std::vector<Item> items;
    for (int64_t s = 0; s < num_seqs; s++)
        for (int64_t to = a.num_tiles(s); to > 0; to -= ITEM_TILES)
            for (int64_t g = 0; g < a.num_kv_heads; g++) {
                const int64_t from = std::max<int64_t>(0, to - ITEM_TILES);
                items.push_back({(to - from) * Tile(a, s, g, (from + to - 1) / 2).end, s, to, g});
            }
    longest_first(items);
#pragma omp parallel
    {
        Scratch w;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < items.size(); i++) forward_item(a, items[i], w, out, lse);
    }
}

// ---- Backward

struct Gradients {
    Rows d_out, out;   // of the output, and the output itself
    const float* lse;  // [heads, T]
    uint16_t *d_q, *d_k, *d_v;
};

// P and dS = P * (dP - Σ dO·O) of keys [from, from + whole) and the t-th tile of a team: both as rows
// [key][queries of the team], dS also as pairs of keys. The scale comes last, into the sums. Exponentials run beside
// the second product.
template <class A>
AVX512 APART void score_gradients(const A& a, const Tile& tile, int64_t t, int64_t from, int64_t whole,
                                   int64_t row, Errand<3>& errand, Scratch& w, const __m512 (&lse)[2],
                                   const __m512 (&delta)[2]) {
    const __m512 scale = _mm512_set1_ps(a.scale * head::LOG2_E);
    const uint32_t *queries = w.tile.at + t * a.size / 2 * TILE, *d_out = w.d_tile.at + t * a.size / 2 * TILE;
    float* const scores = w.scores.at;
    for (int64_t j = 0; j < whole; j += PANEL) {
        __m512 z[PANEL][2], dp[PANEL][2];
        uint16_t* const rows = w.rows.at + ((row + j) * TEAM + t) * TILE;
        uint16_t* const d_rows = w.d_rows.at + ((row + j) * TEAM + t) * TILE;
        products(queries, w.key_rows.at + (from + j) * a.size, a.size, z);
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t half = 0; half < 2; half++) _mm512_storeu_ps(scores + i * TILE + HALF * half, z[i][half]);
        errand.go_on();
        const bool all = tile.sees_panel(from + j);
        products(d_out, w.value_rows.at + (from + j) * a.size, a.size, dp, [&](int64_t i) AVX512 {
            __m512 p[2];
            for (int64_t half = 0; half < 2; half++) {
                float* at = scores + i * TILE + HALF * half;
                p[half] = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(at), scale, lse[half]));
                if (!all) p[half] = _mm512_maskz_mov_ps(tile.sees(from + j + i, half), p[half]);
                _mm512_storeu_ps(at, p[half]);
            }
            _mm512_storeu_si512(rows + i * TEAM * TILE, halves_of(p[0], p[1]));
        });
        for (int64_t i = 0; i < PANEL; i += 2) {
            __m512i ds[2];
            for (int64_t k = 0; k < 2; k++) {
                const float* p = scores + (i + k) * TILE;
                ds[k] = halves_of(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_sub_ps(dp[i + k][0], delta[0])),
                                  _mm512_mul_ps(_mm512_loadu_ps(p + HALF), _mm512_sub_ps(dp[i + k][1], delta[1])));
                _mm512_storeu_si512(d_rows + (i + k) * TEAM * TILE, ds[k]);
            }
            for (int half = 0; half < 2; half++)
                _mm512_storeu_si512(w.weights.at + (j + i) / 2 * TILE + HALF * half, interleave(ds[0], ds[1], half));
        }
    }
}

// log-sum-exp (times log2 e), and Σ dO·O, of half a tile. Behind the sequence's end: probabilities of 0.
template <class A>
AVX512 APART void half_sums(const A& a, const Gradients& grads, const Tile& tile, int64_t half, __m512& lse,
                             __m512& delta) {
    float own[HALF];
    __m512i sums[HALF];
    for (int64_t i = 0; i < HALF; i++) {
        const int64_t lane = HALF * half + i;
        const bool used = lane < tile.count;
        own[i] = used ? grads.lse[tile.heads[lane] * a.num_tokens + tile.tokens[lane]] * head::LOG2_E : INFINITY;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < a.size / 2; d += 16) {
            const __mmask16 some = used ? pair_lanes(a.size, d) : 0;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi32(some, tile.row(grads.d_out, lane) + 2 * d),
                                   (__m512bh)_mm512_maskz_loadu_epi32(some, tile.row(grads.out, lane) + 2 * d));
        }
        sums[i] = _mm512_castps_si512(sum);
    }
    transpose(sums);
    delta = _mm512_setzero_ps();
    for (int64_t i = 0; i < HALF; i++) delta = _mm512_add_ps(delta, _mm512_castsi512_ps(sums[i]));
    lse = _mm512_loadu_ps(own);
}

// Tiles t0 .. of a sequence, at most TEAM: their dQ, and what they add to dK and dV.
template <class A>
AVX512 void backward_team(const A& a, const Gradients& grads, int64_t s, int64_t g, int64_t t0,
                                 Scratch& w) {
    const int64_t size = a.size, num_tiles = std::min(TEAM, a.num_tiles(s) - t0);
    const Tile tiles[TEAM] = {Tile(a, s, g, t0), Tile(a, s, g, t0 + num_tiles - 1)};
    __m512 lse[TEAM][2], delta[TEAM][2];
    for (int64_t t = 0; t < num_tiles; t++) {
        const Tile& tile = tiles[t];
        pack_tile(a.q, tile, size, w.tile.at + t * size / 2 * TILE);
        pack_tile(grads.d_out, tile, size, w.d_tile.at + t * size / 2 * TILE);
        pack_queries(a.q, tile, size, w.queries.at + t * TILE / 2 * size);
        pack_queries(grads.d_out, tile, size, w.d_out.at + t * TILE / 2 * size);
        for (int64_t half = 0; half < 2; half++) half_sums(a, grads, tile, half, lse[t][half], delta[t][half]);
    }
    const int64_t last_tile = a.num_tiles(s) - 1;
    const Tile next[TEAM] = {Tile(a, s, g, std::min(t0 + TEAM, last_tile)),
                             Tile(a, s, g, std::min(t0 + TEAM + 1, last_tile))};
    const Rows read[] = {a.q, grads.d_out, grads.out}, written = {grads.d_q, a.num_heads * size, size};
    Errand<3> errands[TEAM] = {{next[0], tiles[0], {read[0], read[1], read[2]}, written, size},
                               {next[1], tiles[1], {read[0], read[1], read[2]}, written, size}};
    const __m512 ones[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
    int64_t lane = 0;  // of the team, the first of two that see a panel
    for (int64_t from = tiles[0].begin; from < tiles[num_tiles - 1].end; from += BLOCK) {
        int64_t begins[TEAM], ends[TEAM];  // whole panels of the block that a tile sees
        for (int64_t t = 0; t < num_tiles; t++) {
            begins[t] = std::max(from, tiles[t].begin);
            ends[t] = head::ceil_div(std::min(from + BLOCK, tiles[t].end), PANEL) * PANEL;
            if (begins[t] >= ends[t]) continue;
            score_gradients(a, tiles[t], t, begins[t], ends[t] - begins[t], begins[t] - from, errands[t], w,
                            lse[t], delta[t]);
            add_weighted(w.weights.at, w.keys.at + begins[t] / 2 * size,
                         head::ceil_div(std::min(ends[t], tiles[t].end) - begins[t], 2), size, ones,
                         begins[t] == tiles[t].begin, w.out.at + t * size * TILE);
        }
        for (int64_t j = from; j < ends[num_tiles - 1]; j += PANEL) {
            // The queries before these keys see none of them. Those of a window's begin are the first tile's only.
            while (tiles[lane / TILE].positions[lane % TILE + 1] < j) lane += 2;
            const int64_t last = j >= begins[num_tiles - 1] ? num_tiles : 1, pairs = (last * TILE - lane) / 2;
            const int64_t at = (j - from) * TEAM * TILE + lane, skipped = lane / 2 * size;
            add_transposed(w.rows.at + at, w.d_out.at + skipped, pairs, size, w.d_values.at + j * size);
            add_transposed(w.d_rows.at + at, w.queries.at + skipped, pairs, size, w.d_keys.at + j * size);
        }
    }
    const __m512 scale[2] = {_mm512_set1_ps(a.scale), _mm512_set1_ps(a.scale)};
    for (int64_t t = 0; t < num_tiles; t++)
        store_tile(w.out.at + t * size * TILE, scale, tiles[t], a.num_heads, size, grads.d_q);
}

// Sequences [item.sequence, item.to), each but the first with keys of the one before it; one head of keys. From the
// last to the first, so that what a sequence adds to its prompt's keys is there when their own turn comes.
template <class A>
AVX512 void backward_item(const A& a, const Gradients& grads, const Item& item, Scratch& w) {
    const int64_t g = item.head, size = a.size;
    w.tile.resize(TEAM * size / 2 * TILE), w.d_tile.resize(TEAM * size / 2 * TILE), w.out.resize(TEAM * size * TILE);
    w.queries.resize(TEAM * TILE / 2 * size), w.d_out.resize(TEAM * TILE / 2 * size);
    w.scores.resize(PANEL * TILE), w.weights.resize(BLOCK / 2 * TILE);
    w.rows.resize(BLOCK * TEAM * TILE), w.d_rows.resize(BLOCK * TEAM * TILE);
    const __m512 scale = _mm512_set1_ps(a.scale);
    for (int64_t s = item.to - 1; s >= item.sequence; s--) {
        const int64_t n = a.num_keys(s), shared = a.num_shared(s), padded = head::ceil_div(n, PANEL) * PANEL;
        w.d_keys.zeros(padded * size), w.d_values.zeros(padded * size);
        if (s + 1 < item.to) {
            std::memcpy(w.d_keys.at + shared * size, w.shared_keys.at, a.num_shared(s + 1) * size * 4);
            std::memcpy(w.d_values.at + shared * size, w.shared_values.at, a.num_shared(s + 1) * size * 4);
        }
        copy_keys(a, a.k, s, g, n, w.key_rows), copy_keys(a, a.v, s, g, n, w.value_rows);
        pack_keys(a, a.k, s, g, n, w.keys);
        for (int64_t t = 0; t < a.num_tiles(s); t += TEAM) backward_team(a, grads, s, g, t, w);
        for (int64_t j = shared; j < n; j++)
            for (int64_t d = 0; d < size; d += 16) {
                const int64_t to = (a.key_token(s, j) * a.num_kv_heads + g) * size + d;
                Bf16::store(grads.d_k, to, _mm512_mul_ps(scale, _mm512_loadu_ps(w.d_keys.at + j * size + d)));
                Bf16::store(grads.d_v, to, _mm512_loadu_ps(w.d_values.at + j * size + d));
            }
        if (shared == 0) continue;
        w.shared_keys.resize(shared * size), w.shared_values.resize(shared * size);
        std::memcpy(w.shared_keys.at, w.d_keys.at, shared * size * 4);
        std::memcpy(w.shared_values.at, w.d_values.at, shared * size * 4);
    }
}

template <class A>
void backward(const A& a, int64_t num_seqs, const Gradients& grads) {
    std::vector<Item> items;
    for (int64_t s = 0, end; s < num_seqs; s = end) {
        int64_t cost = 0;
        for (end = s; end < num_seqs && (end == s || a.num_shared(end) > 0); end++)
            cost += a.num_queries(end) * (a.num_queries(end) + 2 * a.num_shared(end));
        for (int64_t g = 0; g < a.num_kv_heads; g++) items.push_back({cost, s, end, g});
    }
    longest_first(items);
#pragma omp parallel
    {
        Scratch w;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < items.size(); i++) backward_item(a, grads, items[i], w);
    }
}

}  // namespace attention
#pragma GCC diagnostic pop
