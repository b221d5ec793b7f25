// What libstrop_cpu.so has beyond strop_ops.h: the head's matmul and the walk over its logits in one kernel,
// for CPUs with AVX-512 (fp32) and its bf16 dot product or AMX beside it (bf16). Logits live in registers only, in fp32; one
// row's sums never depend on the rows beside it, nor on the number of threads.
//
// Legend: N tokens, padded to n = ceil(N / STROP_TILE) * STROP_TILE; H hidden size; words are rows of the
// weight. A *panel* is STROP_PANEL words, counted from word 0; `first` below is a multiple of it.
#pragma once
#include "strop_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define STROP_TILE 32
#define STROP_PANEL 12
#define STROP_SEGMENT 3072

// Ask for huge pages behind memory that is about to be written first: a fault for 2 MiB in place of 512. Advice
// only; what is not wholly inside is left as it is.
int strop_huge_pages(void* memory, int64_t bytes);

// Whether this CPU runs these kernels for dtype. H must be even for bf16.
int strop_head_supported(int dtype);

// Whether the head multiplies bf16 by AMX in this process; if not, by AVX-512's dot product. The first call asks
// the CPU and the system (Linux gives AMX's registers to processes that ask for them). No function below needs to
// be told; sums are in another order, so bits differ.
int strop_head_uses_amx(void);

// hidden [N, H], rows `stride` elements apart -> packed, n * H elements, as the functions below want it.
int strop_head_pack(const void* hidden, int dtype, int64_t num_rows, int64_t hidden_size, int64_t stride,
                    void* packed);

// The walk over words first .. first + num_words - 1 of weight [vocab, H]. head->bias: fp32 [vocab].
// target int64 [N], below vocab. walk goes on from what it holds, as in strop_walk_chunk.
// weight_dtype: dtype, or fp32; then its rows are rounded to dtype as they are read.
// exps NULL, or [num_words, n] of dtype, with tops [panels, n] of dtype: exp(z - top of its panel) is kept.
// partial: fp32, 4 * n * ceil(num_words / STROP_SEGMENT) of scratch space.
int strop_head_walk(const void* packed, const void* weight, int dtype, int weight_dtype, int64_t num_rows,
                    int64_t hidden_size, int64_t stride, int64_t first, int64_t num_words, int64_t vocab,
                    const int64_t* target, const strop_head* head, const strop_walk* walk, void* exps, void* tops,
                    float* partial);

// out [num_words, n] of dtype: grad[n] * (1[target] - softmax(z)) * dz/dx of these words, word by word; 0 in
// the padding and where grad is 0. lse, grad: fp32 [N].
int strop_head_grad(const void* packed, const void* weight, int dtype, int weight_dtype, int64_t num_rows,
                    int64_t hidden_size, int64_t stride, int64_t first, int64_t num_words, int64_t vocab,
                    const int64_t* target, const strop_head* head, const float* lse, const float* grad, void* out);

// The same from kept exponentials (without a softcap). exps and tops begin at word `first`. target NULL: no
// word is the target.
int strop_head_grad_kept(const void* exps, const void* tops, int dtype, int64_t num_rows, int64_t first,
                         int64_t num_words, int64_t vocab, const int64_t* target, float inv_temperature,
                         const float* lse, const float* grad, void* out);

// The products of the backward, bf16 only; d_words is `out` of the two functions above.
// hidden [N, H] -> turned, n * ceil(H / STROP_TILE) * STROP_TILE elements, as strop_head_d_weight wants it.
int strop_head_turn(const void* hidden, int64_t num_rows, int64_t hidden_size, int64_t stride, void* turned);
// d_weight [num_words, H] of weight_dtype (bf16 or fp32) = d_words times hidden
int strop_head_d_weight(const void* d_words, const void* turned, int64_t num_rows, int64_t hidden_size,
                        int64_t num_words, int weight_dtype, void* d_weight);
// d_hidden fp32 [h, n], h = ceil(H / STROP_PANEL) * STROP_PANEL: the gradient is added to it, column by column.
// weight: that of the first word. scratch: (h + n) * (num_words + 1) elements of bf16.
int strop_head_d_hidden(const void* d_words, const void* weight, int weight_dtype, int64_t num_rows,
                        int64_t hidden_size, int64_t stride, int64_t num_words, void* scratch, float* d_hidden);

// What follows runs where strop_head_supported says so for the dtype. All tensors are contiguous but where
// strides are given, in elements. "size" is that of a row, or of an attention head.

// y = weight * x / sqrt(mean(x^2) + eps); x / sqrt(...) is rounded to dtype first. x, y [rows, size], weight
// [size]; inverse fp32 [rows]: 1 / sqrt(...), for the gradient.
int strop_norm(const void* x, const void* weight, int dtype, int64_t num_rows, int64_t size, float eps, void* y,
               float* inverse);
// partial NULL: no weight gradient; else fp32, size * ceil(rows / STROP_NORM_ROWS) of scratch space.
#define STROP_NORM_ROWS 64
int strop_norm_grad(const void* x, const void* weight, const void* dy, const float* inverse, int dtype,
                    int64_t num_rows, int64_t size, void* dx, float* partial, void* d_weight);

// out = silu(gate) * up, n elements; the gradients of both, and out again into product unless it is NULL.
int strop_gate(const void* gate, const void* up, int dtype, int64_t n, void* out);
int strop_gate_grad(const void* gate, const void* up, const void* dy, int dtype, int64_t n, void* d_gate,
                    void* d_up, void* product);

// Rotary embedding of x (token, head, size at two strides) by cosine, sine [T, size] -> y [T, heads, size]; the
// inverse is its gradient.
int strop_turn(const void* x, int dtype, int64_t token_stride, int64_t head_stride, const void* cosine,
               const void* sine, int64_t num_tokens, int64_t num_heads, int64_t size, int inverse, void* y);

// A linear layer, bf16: x [T, in], bias [out] or NULL, dy and y [T, out]. weight [out, in] and its gradient are of
// weight_dtype, bf16 or fp32; fp32 ones are rounded to bf16 as they are read. in and out are even. Sums run in fp32
// over their whole depth and are rounded once (a gradient in fp32: never); a row of y or dx depends on no other row.
// y = x weight^T + bias. scratch: ceil(out / STROP_TILE) * STROP_TILE * in elements.
int strop_linear(const void* x, const void* weight, int weight_dtype, const void* bias, int64_t num_tokens,
                 int64_t num_in, int64_t num_out, void* scratch, void* y);
// dx [T, in] = dy weight. scratch: ceil(in / STROP_TILE) * STROP_TILE * out elements.
int strop_linear_d_input(const void* dy, const void* weight, int weight_dtype, int64_t num_tokens, int64_t num_in,
                         int64_t num_out, void* scratch, void* dx);
// d_weight [out, in] = dy^T x, zeros for no tokens. scratch: ceil(in / STROP_TILE) * STROP_TILE +
// ceil(out / STROP_PANEL) * STROP_PANEL, times the tokens rounded up to an even number.
int strop_linear_d_weight(const void* dy, const void* x, int64_t num_tokens, int64_t num_in, int64_t num_out,
                          void* scratch, void* d_weight, int weight_dtype);

// Causal attention within each of S sequences (bf16; size a multiple of 16; num_heads one of num_kv_heads).
// cu_queries, cu_keys int32 [S+1]: a sequence with more keys than queries begins with keys of the one before it.
// window 0: none. Strides in elements: of a token, of a head.
typedef struct {
    const void *q, *k, *v;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int64_t num_tokens, num_heads, num_kv_heads, size, num_seqs;
    const int32_t *cu_queries, *cu_keys;
    float scale;
    int64_t window;
} strop_attention;
// out [T, heads, size]; lse fp32 [heads, T].
int strop_attend(const strop_attention* a, void* out, float* lse);
// out, d_out, d_q [T, heads, size]; d_k, d_v [T, kv heads, size].
int strop_attend_grad(const strop_attention* a, const void* out, const void* d_out, const float* lse, void* d_q,
                      void* d_k, void* d_v);

#ifdef __cplusplus
}
#endif
