// strop's kernels for CPUs: strop_ops.h in portable C++ (vectorised by the compiler, three variants on x86 of
// which the running CPU picks one), and strop_cpu.h where there is AVX-512.
//
// A row, a segment or a pair is one thread's work from beginning to end and sums run in one order, so results
// do not depend on the number of threads. OpenMP's library is the one that torch has loaded.
#include "strop_cpu.h"

#include "preference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define STROP_FUSED 1
#include "cpu_attention.h"
#include "cpu_avx512.h"
#include "cpu_head_grad.h"
#include "cpu_layers.h"
#include "cpu_linear.h"
#define VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VARIANTS
#endif
#undef INLINE
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t BLOCK = 512;  // columns of a row that are worked on at a time: they stay in L1

INLINE float widen(float x) { return x; }
INLINE float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, uint16_t* out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *out = (uint16_t)(x != x ? 0x7fc0 : rounded);
}

// exp(x) for x <= 0 or a little above, within 2 units of the last place; 0 below -87; NaN stays NaN.
INLINE float exp_fast(float x) {
    float y = x < -87.0f ? -87.0f : x;
    y = y > 88.0f ? 88.0f : y;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    float r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    int32_t power = ((int32_t)(n == n ? n : 0.0f) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

INLINE float tanh_fast(float x) {
    float q = exp_fast(-2.0f * std::fabs(x));
    return std::copysign((1.0f - q) / (1.0f + q), x);
}

struct Chunk {
    int64_t cols, stride, out_stride, first;
    const int64_t* target;
    const float* exact;
    strop_head head;
};

// z of columns j .. j + n - 1 of a row, and with SLOPE dz/dx.
template <class T, bool SLOPE>
INLINE void load_logits(const Chunk& c, const T* x, int64_t row, int64_t j, int64_t n, float* z, float* slope) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) z[i] = widen(x[row * c.stride + j + i]);
    const int64_t at = c.target[row] - c.first - j;
    if (c.exact != nullptr && at >= 0 && at < n) z[at] = c.exact[row];
    if (c.head.bias != nullptr) {
        const float* bias = c.head.bias + j;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) z[i] += bias[i];
    }
    const float cap = c.head.softcap, inv = c.head.inv_temperature;
    if (cap != 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float t = tanh_fast(z[i] / cap);
            z[i] = cap * t * inv;
            if (SLOPE) slope[i] = (1.0f - t * t) * inv;
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        z[i] *= inv;
        if (SLOPE) slope[i] = inv;
    }
}

template <class T>
INLINE void walk_row_of(const Chunk& c, const T* x, int64_t row, const strop_walk& walk) {
    float z[BLOCK];
    float top = walk.top[row], total = walk.total[row];
    float weighted = walk.weighted ? walk.weighted[row] : 0.0f, plain = walk.plain ? walk.plain[row] : 0.0f;
    for (int64_t j = 0; j < c.cols; j += BLOCK) {
        const int64_t n = std::min(BLOCK, c.cols - j), at = c.target[row] - c.first - j;
        load_logits<T, false>(c, x, row, j, n, z, nullptr);
        if (at >= 0 && at < n) walk.at_target[row] = z[at];
        float high = top, e = 0.0f, ez = 0.0f, s = 0.0f;
#pragma omp simd reduction(max : high)
        for (int64_t i = 0; i < n; i++) high = z[i] > high ? z[i] : high;
        const float safe = high == -INFINITY ? 0.0f : high;
#pragma omp simd reduction(+ : e, ez, s)
        for (int64_t i = 0; i < n; i++) {
            float p = exp_fast(z[i] - safe);
            e += p;
            ez += p * (z[i] >= -FLT_MAX ? z[i] : 0.0f);  // 0 * -inf is not NaN here
            s += z[i];
        }
        const float shrink = std::exp(top - safe);
        total = total * shrink + e;
        weighted = weighted * shrink + ez;
        plain += s;
        top = high;
    }
    walk.top[row] = top;
    walk.total[row] = total;
    if (walk.weighted) walk.weighted[row] = weighted;
    if (walk.plain) walk.plain[row] = plain;
}

VARIANTS void walk_row(const Chunk& c, const uint16_t* x, int64_t row, const strop_walk& walk) {
    walk_row_of(c, x, row, walk);
}
VARIANTS void walk_row(const Chunk& c, const float* x, int64_t row, const strop_walk& walk) {
    walk_row_of(c, x, row, walk);
}

// Columns j .. j + n - 1 (at most BLOCK) of one row; bias_grad of these columns or NULL.
template <class T, class Out>
INLINE void grad_block_of(const Chunk& c, const T* x, Out* out, int64_t row, int64_t j, int64_t n, float lse,
                          float grad, float* bias_grad) {
    Out* to = out + row * c.out_stride + j;
    if (grad == 0.0f) {
        std::fill(to, to + n, Out(0));
        return;
    }
    float z[BLOCK], slope[BLOCK];
    load_logits<T, true>(c, x, row, j, n, z, slope);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) z[i] = -grad * exp_fast(z[i] - lse);
    const int64_t at = c.target[row] - c.first - j;
    if (at >= 0 && at < n) z[at] += grad;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        z[i] *= slope[i];
        narrow(z[i], to + i);
    }
    if (bias_grad != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) bias_grad[i] += z[i];
    }
}

VARIANTS void grad_block(const Chunk& c, const uint16_t* x, uint16_t* out, int64_t row, int64_t j, int64_t n,
                         float lse, float grad, float* bias_grad) {
    grad_block_of(c, x, out, row, j, n, lse, grad, bias_grad);
}
VARIANTS void grad_block(const Chunk& c, const float* x, float* out, int64_t row, int64_t j, int64_t n, float lse,
                         float grad, float* bias_grad) {
    grad_block_of(c, x, out, row, j, n, lse, grad, bias_grad);
}
VARIANTS void grad_block(const Chunk& c, const float* x, uint16_t* out, int64_t row, int64_t j, int64_t n,
                         float lse, float grad, float* bias_grad) {
    grad_block_of(c, x, out, row, j, n, lse, grad, bias_grad);
}

template <class T>
void walk_chunk(const Chunk& c, const void* x, int64_t num_rows, const strop_walk& walk) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < num_rows; row++) walk_row(c, (const T*)x, row, walk);
}

template <class T, class Out>
void grad_chunk(const Chunk& c, const void* x, void* out, int64_t num_rows, const float* lse, const float* grad,
                float* bias_grad) {
    const int64_t blocks = (c.cols + BLOCK - 1) / BLOCK;
    // A block of columns is one thread's, all rows in turn: so a bias gradient has its fixed order too.
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t j = b * BLOCK, n = std::min(BLOCK, c.cols - j);
        for (int64_t row = 0; row < num_rows; row++)
            grad_block(c, (const T*)x, (Out*)out, row, j, n, lse[row], grad[row], bias_grad ? bias_grad + j : nullptr);
    }
}

bool is_dtype(int dtype) { return dtype == STROP_F32 || dtype == STROP_BF16; }

bool fits(const strop_head& head) {
    return head.softcap >= 0.0f && std::isfinite(head.softcap) && head.inv_temperature > 0.0f &&
           std::isfinite(head.inv_temperature);
}

bool targets_fit(const int64_t* target, int64_t num_rows, int64_t vocab) {
    return std::all_of(target, target + num_rows, [=](int64_t t) { return t >= 0 && t < vocab; });
}

int check_chunk(const void* x, int dtype, int64_t num_rows, int64_t num_cols, int64_t stride, int64_t first,
                int64_t vocab, const int64_t* target, const strop_head* head) {
    if (!is_dtype(dtype)) return STROP_EDTYPE;
    if (num_rows < 0 || num_cols < 0 || first < 0 || num_cols > vocab - first) return STROP_ESHAPE;
    if (num_rows == 0 || num_cols == 0) return STROP_OK;
    if (x == nullptr || target == nullptr || head == nullptr) return STROP_ENULL;
    if ((num_rows > 1 && stride < num_cols) || !fits(*head)) return STROP_ESHAPE;
    return targets_fit(target, num_rows, vocab) ? STROP_OK : STROP_ETARGET;
}

int check_segments(const void* tokens, const void* sums, int64_t num_tokens, const int32_t* cu_seqlens,
                   int64_t num_segments) {
    if (num_tokens < 0 || num_segments < 0) return STROP_ESHAPE;
    if (cu_seqlens == nullptr || (num_tokens && !tokens) || (num_segments && !sums)) return STROP_ENULL;
    if (cu_seqlens[0] != 0 || cu_seqlens[num_segments] != num_tokens) return STROP_ESHAPE;
    return std::is_sorted(cu_seqlens, cu_seqlens + num_segments + 1) ? STROP_OK : STROP_ESHAPE;
}

}  // namespace

int strop_abi_version(void) { return STROP_ABI; }

const char* strop_error(int status) {
    switch (status) {
        case STROP_OK: return "no error";
        case STROP_EDTYPE: return "this dtype has no kernel here";
        case STROP_ESHAPE: return "a size, stride, offset or parameter of the head does not fit";
        case STROP_ETARGET: return "a target is outside the vocabulary";
        case STROP_EKIND: return "no such loss, or beta or label smoothing outside its range";
        case STROP_ENULL: return "a pointer that is needed is null";
        case STROP_ECUDA: return "a CUDA call failed";
        default: return "unknown status";
    }
}

int strop_walk_chunk(const void* x, int dtype, int64_t num_rows, int64_t num_cols, int64_t stride, int64_t first,
                     int64_t vocab, const int64_t* target, const float* exact, const strop_head* head,
                     const strop_walk* walk, void*) {
    const int status = check_chunk(x, dtype, num_rows, num_cols, stride, first, vocab, target, head);
    if (status != STROP_OK || num_rows == 0 || num_cols == 0) return status;
    if (walk == nullptr || !walk->top || !walk->total || !walk->at_target) return STROP_ENULL;
    const Chunk c = {num_cols, stride, 0, first, target, exact, *head};
    dtype == STROP_F32 ? walk_chunk<float>(c, x, num_rows, *walk) : walk_chunk<uint16_t>(c, x, num_rows, *walk);
    return STROP_OK;
}

int strop_grad_chunk(const void* x, void* out, int dtype, int out_dtype, int64_t num_rows, int64_t num_cols,
                     int64_t stride, int64_t out_stride, int64_t first, int64_t vocab, const int64_t* target,
                     const float* exact, const strop_head* head, const float* lse, const float* grad,
                     float* bias_grad, void*) {
    const bool narrows = dtype == STROP_F32 && out_dtype == STROP_BF16;
    if (out_dtype != dtype && !narrows) return STROP_EDTYPE;
    const int status = check_chunk(x, dtype, num_rows, num_cols, stride, first, vocab, target, head);
    if (status != STROP_OK || num_rows == 0 || num_cols == 0) return status;
    if (out == nullptr || lse == nullptr || grad == nullptr) return STROP_ENULL;
    if (num_rows > 1 && (out_stride < num_cols || (x == out && stride != out_stride))) return STROP_ESHAPE;
    if (narrows && x == out) return STROP_ESHAPE;
    const Chunk c = {num_cols, stride, out_stride, first, target, exact, *head};
    const auto chunk = narrows              ? grad_chunk<float, uint16_t>
                       : dtype == STROP_F32 ? grad_chunk<float, float>
                                            : grad_chunk<uint16_t, uint16_t>;
    chunk(c, x, out, num_rows, lse, grad, bias_grad);
    return STROP_OK;
}

int strop_segment_sum(const float* x, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                      float* out, void*) {
    const int status = check_segments(x, out, num_tokens, cu_seqlens, num_segments);
    if (status != STROP_OK) return status;
    for (int64_t s = 0; s < num_segments; s++) {
        double sum = 0;
        for (int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1]; t++) sum += x[t];
        out[s] = (float)sum;
    }
    return STROP_OK;
}

int strop_segment_spread(const float* g, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                         float* dx, void*) {
    const int status = check_segments(dx, g, num_tokens, cu_seqlens, num_segments);
    if (status != STROP_OK) return status;
    for (int64_t s = 0; s < num_segments; s++) std::fill(dx + cu_seqlens[s], dx + cu_seqlens[s + 1], g[s]);
    return STROP_OK;
}

int strop_dpo_loss(const float* ratio, int64_t num_pairs, int kind, float beta, float label_smoothing, float delta,
                   float* loss, float* d_ratio, void*) {
    if (num_pairs < 0) return STROP_ESHAPE;
    const int status = check_kind(kind, beta, label_smoothing);
    if (status != STROP_OK || num_pairs == 0) return status;
    if (ratio == nullptr || loss == nullptr || d_ratio == nullptr) return STROP_ENULL;
    for (int64_t p = 0; p < num_pairs; p++) {
        const PairLoss<double> l =
            pair_loss<double>(kind, ratio[2 * p], ratio[2 * p + 1], beta, label_smoothing, delta);
        loss[p] = (float)l.loss;
        d_ratio[2 * p] = (float)l.by_chosen;
        d_ratio[2 * p + 1] = (float)l.by_rejected;
    }
    return STROP_OK;
}

int strop_huge_pages(void* memory, int64_t bytes) {
    if (bytes < 0) return STROP_ESHAPE;
    if (memory == nullptr && bytes > 0) return STROP_ENULL;
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
    if (end > begin) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a kernel without them refuses
#endif
    return STROP_OK;
}

int strop_head_supported(int dtype) {
#ifdef STROP_FUSED
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (dtype == STROP_F32) return avx512;
    if (dtype == STROP_BF16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    (void)dtype;
    return 0;
}

int strop_head_uses_amx(void) {
#ifdef STROP_AMX
    static const bool granted = strop_head_supported(STROP_BF16) && tiles::start();  // asked once in the process
    return granted;
#else
    return 0;
#endif
}

#ifdef STROP_FUSED
namespace {

int check_head(int dtype, int64_t num_rows, int64_t hidden_size, int64_t stride) {
    if (!is_dtype(dtype) || !strop_head_supported(dtype)) return STROP_EDTYPE;
    if (num_rows < 0 || hidden_size <= 0 || stride < hidden_size) return STROP_ESHAPE;
    return dtype == STROP_BF16 && hidden_size % 2 ? STROP_ESHAPE : STROP_OK;
}

// A weight, or its gradient, beside hidden states of dtype.
bool fits_beside(int dtype, int weight_dtype) { return weight_dtype == dtype || weight_dtype == STROP_F32; }

int check_words(int64_t num_rows, int64_t first, int64_t num_words, int64_t vocab, const int64_t* target,
                const strop_head& head) {
    if (first < 0 || first % STROP_PANEL || num_words <= 0 || num_words > vocab - first || vocab > INT32_MAX ||
        !fits(head))
        return STROP_ESHAPE;
    return target == nullptr || targets_fit(target, num_rows, vocab) ? STROP_OK : STROP_ETARGET;
}

}  // namespace

int strop_head_pack(const void* hidden, int dtype, int64_t num_rows, int64_t hidden_size, int64_t stride,
                    void* packed) {
    const int status = check_head(dtype, num_rows, hidden_size, stride);
    if (status != STROP_OK || num_rows == 0) return status;
    if (hidden == nullptr || packed == nullptr) return STROP_ENULL;
    dtype == STROP_F32 ? head::pack<head::F32>(hidden, num_rows, hidden_size, stride, packed)
                       : head::pack<head::Bf16>(hidden, num_rows, hidden_size, stride, packed);
    return STROP_OK;
}

int strop_head_walk(const void* packed, const void* weight, int dtype, int weight_dtype, int64_t num_rows,
                    int64_t hidden_size, int64_t stride, int64_t first, int64_t num_words, int64_t vocab,
                    const int64_t* target, const strop_head* head, const strop_walk* walk, void* exps, void* tops,
                    float* partial) {
    int status = check_head(dtype, num_rows, hidden_size, stride);
    if (status == STROP_OK && !fits_beside(dtype, weight_dtype)) status = STROP_EDTYPE;
    if (status != STROP_OK || num_rows == 0) return status;
    if (!packed || !weight || !target || !head || !walk || !partial || (exps && !tops)) return STROP_ENULL;
    if (!walk->top || !walk->total || !walk->at_target) return STROP_ENULL;
    status = check_words(num_rows, first, num_words, vocab, target, *head);
    if (status != STROP_OK) return status;
    const head::Head h = {packed, weight, num_rows, head::pad(num_rows), hidden_size, stride, first, num_words,
                          target, *head, weight_dtype != dtype};
    const auto run = dtype == STROP_F32      ? head::walk<head::F32>
                     : strop_head_uses_amx() ? head::walk<head::Amx>
                                             : head::walk<head::Bf16>;
    run(h, *walk, exps, tops, partial);
    return STROP_OK;
}

int strop_head_grad(const void* packed, const void* weight, int dtype, int weight_dtype, int64_t num_rows,
                    int64_t hidden_size, int64_t stride, int64_t first, int64_t num_words, int64_t vocab,
                    const int64_t* target, const strop_head* head, const float* lse, const float* grad, void* out) {
    int status = check_head(dtype, num_rows, hidden_size, stride);
    if (status == STROP_OK && !fits_beside(dtype, weight_dtype)) status = STROP_EDTYPE;
    if (status != STROP_OK || num_rows == 0) return status;
    if (!packed || !weight || !target || !head || !lse || !grad || !out) return STROP_ENULL;
    status = check_words(num_rows, first, num_words, vocab, target, *head);
    if (status != STROP_OK) return status;
    const head::Head h = {packed, weight, num_rows, head::pad(num_rows), hidden_size, stride, first, num_words,
                          target, *head, weight_dtype != dtype};
    const auto run = dtype == STROP_F32      ? head::grad<head::F32>
                     : strop_head_uses_amx() ? head::grad<head::Amx>
                                             : head::grad<head::Bf16>;
    run(h, lse, grad, out);
    return STROP_OK;
}

int strop_head_grad_kept(const void* exps, const void* tops, int dtype, int64_t num_rows, int64_t first,
                         int64_t num_words, int64_t vocab, const int64_t* target, float inv_temperature,
                         const float* lse, const float* grad, void* out) {
    int status = check_head(dtype, num_rows, 2, 2);
    if (status != STROP_OK || num_rows == 0) return status;
    if (!exps || !tops || !lse || !grad || !out) return STROP_ENULL;
    const strop_head head = {nullptr, 0.0f, inv_temperature};
    status = check_words(num_rows, first, num_words, vocab, target, head);
    if (status != STROP_OK) return status;
    const head::Head h = {nullptr, nullptr, num_rows, head::pad(num_rows), 0, 0, first, num_words, target, head, false};
    dtype == STROP_F32 ? head::grad_kept<head::F32>(h, exps, tops, lse, grad, out)
                       : head::grad_kept<head::Bf16>(h, exps, tops, lse, grad, out);
    return STROP_OK;
}

int strop_head_turn(const void* hidden, int64_t num_rows, int64_t hidden_size, int64_t stride, void* turned) {
    const int status = check_head(STROP_BF16, num_rows, hidden_size, stride);
    if (status != STROP_OK || num_rows == 0) return status;
    if (!hidden || !turned) return STROP_ENULL;
    head::pack_turned((const uint16_t*)hidden, num_rows, hidden_size, stride, (uint16_t*)turned);
    return STROP_OK;
}

int strop_head_d_weight(const void* d_words, const void* turned, int64_t num_rows, int64_t hidden_size,
                        int64_t num_words, int weight_dtype, void* d_weight) {
    const int status = check_head(STROP_BF16, num_rows, hidden_size, hidden_size);
    if (status != STROP_OK) return status;
    if (!fits_beside(STROP_BF16, weight_dtype)) return STROP_EDTYPE;
    if (num_words < 0) return STROP_ESHAPE;
    if (num_words > 0 && (!d_weight || (num_rows > 0 && (!d_words || !turned)))) return STROP_ENULL;
    const bool amx = strop_head_uses_amx();
    const auto run = weight_dtype == STROP_F32 ? (amx ? head::weight_product<head::Amx, float>
                                                      : head::weight_product<head::Bf16, float>)
                                               : (amx ? head::weight_product<head::Amx, uint16_t>
                                                      : head::weight_product<head::Bf16, uint16_t>);
    run(d_words, (const uint16_t*)turned, head::pad(num_rows), hidden_size, num_words, d_weight);
    return STROP_OK;
}

int strop_head_d_hidden(const void* d_words, const void* weight, int weight_dtype, int64_t num_rows,
                        int64_t hidden_size, int64_t stride, int64_t num_words, void* scratch, float* d_hidden) {
    int status = check_head(STROP_BF16, num_rows, hidden_size, stride);
    if (status == STROP_OK && !fits_beside(STROP_BF16, weight_dtype)) status = STROP_EDTYPE;
    if (status != STROP_OK || num_rows == 0) return status;
    if (num_words < 0) return STROP_ESHAPE;
    if (!d_words || !weight || !scratch || !d_hidden) return STROP_ENULL;
    const bool amx = strop_head_uses_amx();
    const auto run = weight_dtype == STROP_F32 ? (amx ? head::hidden_product<head::Amx, float>
                                                      : head::hidden_product<head::Bf16, float>)
                                               : (amx ? head::hidden_product<head::Amx, uint16_t>
                                                      : head::hidden_product<head::Bf16, uint16_t>);
    run((const uint16_t*)d_words, weight, head::pad(num_rows), hidden_size, stride, num_words,
        (uint16_t*)scratch, d_hidden);
    return STROP_OK;
}

namespace {

int check_layer(int dtype, int64_t num_rows, int64_t size) {
    if (!is_dtype(dtype) || !strop_head_supported(dtype)) return STROP_EDTYPE;
    return num_rows < 0 || size <= 0 ? STROP_ESHAPE : STROP_OK;
}

int check_linear(int weight_dtype, int64_t num_tokens, int64_t num_in, int64_t num_out) {
    const int status = check_layer(STROP_BF16, num_tokens, num_in);
    if (status != STROP_OK) return status;
    if (weight_dtype != STROP_F32 && weight_dtype != STROP_BF16) return STROP_EDTYPE;
    return num_out <= 0 || num_in % 2 || num_out % 2 ? STROP_ESHAPE : STROP_OK;
}

int check_attention(const strop_attention* a) {
    if (a == nullptr) return STROP_ENULL;
    const int status = check_layer(STROP_BF16, a->num_tokens, a->size);
    if (status != STROP_OK) return status;
    if (a->size % 16 || a->num_kv_heads <= 0 || a->num_heads <= 0 || a->num_heads % a->num_kv_heads || a->window < 0)
        return STROP_ESHAPE;
    if (a->num_tokens > INT32_MAX || a->num_seqs < 0) return STROP_ESHAPE;
    if (a->num_tokens == 0) return STROP_OK;
    if (!a->q || !a->k || !a->v || !a->cu_queries || !a->cu_keys) return STROP_ENULL;
    const int32_t *queries = a->cu_queries, *keys = a->cu_keys;
    if (queries[0] != 0 || keys[0] != 0 || queries[a->num_seqs] != a->num_tokens) return STROP_ESHAPE;
    for (int64_t s = 0; s < a->num_seqs; s++) {
        const int64_t length = (int64_t)queries[s + 1] - queries[s], shared = (int64_t)keys[s + 1] - keys[s] - length;
        if (length < 0 || shared < 0 || (shared > 0 && (s == 0 || shared > queries[s] - queries[s - 1])))
            return STROP_ESHAPE;
    }
    return STROP_OK;
}

attention::Attention inside(const strop_attention& a) {
    return {{(const uint16_t*)a.q, a.q_token, a.q_head},
            {(const uint16_t*)a.k, a.k_token, a.k_head},
            {(const uint16_t*)a.v, a.v_token, a.v_head},
            a.num_tokens, a.num_heads, a.num_kv_heads, a.size, a.cu_queries, a.cu_keys, a.scale, a.window};
}

}  // namespace

int strop_norm(const void* x, const void* weight, int dtype, int64_t num_rows, int64_t size, float eps, void* y,
               float* inverse) {
    const int status = check_layer(dtype, num_rows, size);
    if (status != STROP_OK || num_rows == 0) return status;
    if (!x || !weight || !y || !inverse) return STROP_ENULL;
    dtype == STROP_F32 ? layers::norm<layers::F32>(x, weight, num_rows, size, eps, y, inverse)
                       : layers::norm<layers::Bf16>(x, weight, num_rows, size, eps, y, inverse);
    return STROP_OK;
}

int strop_norm_grad(const void* x, const void* weight, const void* dy, const float* inverse, int dtype,
                    int64_t num_rows, int64_t size, void* dx, float* partial, void* d_weight) {
    const int status = check_layer(dtype, num_rows, size);
    if (status != STROP_OK || num_rows == 0) return status;
    if (!x || !weight || !dy || !inverse || !dx || (partial && !d_weight)) return STROP_ENULL;
    dtype == STROP_F32
        ? layers::norm_grad<layers::F32>(x, weight, dy, inverse, num_rows, size, dx, partial, d_weight)
        : layers::norm_grad<layers::Bf16>(x, weight, dy, inverse, num_rows, size, dx, partial, d_weight);
    return STROP_OK;
}

int strop_gate(const void* gate, const void* up, int dtype, int64_t n, void* out) {
    const int status = check_layer(dtype, n, 1);
    if (status != STROP_OK || n == 0) return status;
    if (!gate || !up || !out) return STROP_ENULL;
    dtype == STROP_F32 ? layers::gate<layers::F32>(gate, up, n, out) : layers::gate<layers::Bf16>(gate, up, n, out);
    return STROP_OK;
}

int strop_gate_grad(const void* gate, const void* up, const void* dy, int dtype, int64_t n, void* d_gate,
                    void* d_up, void* product) {
    const int status = check_layer(dtype, n, 1);
    if (status != STROP_OK || n == 0) return status;
    if (!gate || !up || !dy || !d_gate || !d_up) return STROP_ENULL;
    dtype == STROP_F32 ? layers::gate_grad<layers::F32>(gate, up, dy, n, d_gate, d_up, product)
                       : layers::gate_grad<layers::Bf16>(gate, up, dy, n, d_gate, d_up, product);
    return STROP_OK;
}

int strop_turn(const void* x, int dtype, int64_t token_stride, int64_t head_stride, const void* cosine,
               const void* sine, int64_t num_tokens, int64_t num_heads, int64_t size, int inverse, void* y) {
    const int status = check_layer(dtype, num_tokens, size);
    if (status != STROP_OK || num_tokens == 0) return status;
    if (size % 2 || num_heads < 0) return STROP_ESHAPE;
    if (!x || !cosine || !sine || !y) return STROP_ENULL;
    const auto turn = dtype == STROP_F32 ? layers::turn<layers::F32> : layers::turn<layers::Bf16>;
    turn(x, token_stride, head_stride, cosine, sine, num_tokens, num_heads, size, inverse != 0, y);
    return STROP_OK;
}

int strop_linear(const void* x, const void* weight, int weight_dtype, const void* bias, int64_t num_tokens,
                 int64_t num_in, int64_t num_out, void* scratch, void* y) {
    const int status = check_linear(weight_dtype, num_tokens, num_in, num_out);
    if (status != STROP_OK || num_tokens == 0) return status;
    if (!x || !weight || !scratch || !y) return STROP_ENULL;
    const auto run = [&](auto* w) {
        linear::forward((const uint16_t*)x, w, (const uint16_t*)bias, num_tokens, num_in, num_out, (uint16_t*)scratch,
                        (uint16_t*)y);
    };
    weight_dtype == STROP_F32 ? run((const float*)weight) : run((const uint16_t*)weight);
    return STROP_OK;
}

int strop_linear_d_input(const void* dy, const void* weight, int weight_dtype, int64_t num_tokens, int64_t num_in,
                         int64_t num_out, void* scratch, void* dx) {
    const int status = check_linear(weight_dtype, num_tokens, num_in, num_out);
    if (status != STROP_OK || num_tokens == 0) return status;
    if (!dy || !weight || !scratch || !dx) return STROP_ENULL;
    const auto run = [&](auto* w) {
        linear::input_gradient((const uint16_t*)dy, w, num_tokens, num_in, num_out, (uint16_t*)scratch, (uint16_t*)dx);
    };
    weight_dtype == STROP_F32 ? run((const float*)weight) : run((const uint16_t*)weight);
    return STROP_OK;
}

int strop_linear_d_weight(const void* dy, const void* x, int64_t num_tokens, int64_t num_in, int64_t num_out,
                          void* scratch, void* d_weight, int weight_dtype) {
    const int status = check_linear(weight_dtype, num_tokens, num_in, num_out);
    if (status != STROP_OK) return status;
    if (!d_weight || (num_tokens > 0 && (!dy || !x || !scratch))) return STROP_ENULL;
    const auto run = [&](auto* w) {
        linear::weight_gradient((const uint16_t*)dy, (const uint16_t*)x, num_tokens, num_in, num_out,
                                (uint16_t*)scratch, w);
    };
    weight_dtype == STROP_F32 ? run((float*)d_weight) : run((uint16_t*)d_weight);
    return STROP_OK;
}

int strop_attend(const strop_attention* a, void* out, float* lse) {
    const int status = check_attention(a);
    if (status != STROP_OK || a->num_tokens == 0) return status;
    if (!out || !lse) return STROP_ENULL;
    attention::with_size(inside(*a), [&](const auto& sized) {
        attention::forward(sized, a->num_seqs, (uint16_t*)out, lse);
    });
    return STROP_OK;
}

int strop_attend_grad(const strop_attention* a, const void* out, const void* d_out, const float* lse, void* d_q,
                      void* d_k, void* d_v) {
    const int status = check_attention(a);
    if (status != STROP_OK || a->num_tokens == 0) return status;
    if (!out || !d_out || !lse || !d_q || !d_k || !d_v) return STROP_ENULL;
    const int64_t row = a->num_heads * a->size;
    const attention::Gradients grads = {{(const uint16_t*)d_out, row, a->size},
                                        {(const uint16_t*)out, row, a->size},
                                        lse,
                                        (uint16_t*)d_q,
                                        (uint16_t*)d_k,
                                        (uint16_t*)d_v};
    attention::with_size(inside(*a), [&](const auto& sized) { attention::backward(sized, a->num_seqs, grads); });
    return STROP_OK;
}
#else
int strop_head_pack(const void*, int, int64_t, int64_t, int64_t, void*) { return STROP_EDTYPE; }
int strop_head_walk(const void*, const void*, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const int64_t*, const strop_head*, const strop_walk*, void*, void*, float*) {
    return STROP_EDTYPE;
}
int strop_head_grad(const void*, const void*, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const int64_t*, const strop_head*, const float*, const float*, void*) {
    return STROP_EDTYPE;
}
int strop_head_grad_kept(const void*, const void*, int, int64_t, int64_t, int64_t, int64_t, const int64_t*, float,
                         const float*, const float*, void*) {
    return STROP_EDTYPE;
}
int strop_head_turn(const void*, int64_t, int64_t, int64_t, void*) { return STROP_EDTYPE; }
int strop_head_d_weight(const void*, const void*, int64_t, int64_t, int64_t, int, void*) { return STROP_EDTYPE; }
int strop_head_d_hidden(const void*, const void*, int, int64_t, int64_t, int64_t, int64_t, void*, float*) {
    return STROP_EDTYPE;
}
int strop_norm(const void*, const void*, int, int64_t, int64_t, float, void*, float*) { return STROP_EDTYPE; }
int strop_norm_grad(const void*, const void*, const void*, const float*, int, int64_t, int64_t, void*, float*, void*) {
    return STROP_EDTYPE;
}
int strop_gate(const void*, const void*, int, int64_t, void*) { return STROP_EDTYPE; }
int strop_gate_grad(const void*, const void*, const void*, int, int64_t, void*, void*, void*) { return STROP_EDTYPE; }
int strop_turn(const void*, int, int64_t, int64_t, const void*, const void*, int64_t, int64_t, int64_t, int, void*) {
    return STROP_EDTYPE;
}
int strop_linear(const void*, const void*, int, const void*, int64_t, int64_t, int64_t, void*, void*) {
    return STROP_EDTYPE;
}
int strop_linear_d_input(const void*, const void*, int, int64_t, int64_t, int64_t, void*, void*) {
    return STROP_EDTYPE;
}
int strop_linear_d_weight(const void*, const void*, int64_t, int64_t, int64_t, void*, void*, int) {
    return STROP_EDTYPE;
}
int strop_attend(const strop_attention*, void*, float*) { return STROP_EDTYPE; }
int strop_attend_grad(const strop_attention*, const void*, const void*, const float*, void*, void*, void*) {
    return STROP_EDTYPE;
}
#endif
