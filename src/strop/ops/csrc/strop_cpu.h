// What libstrop_cpu.so has beyond strop_ops.h: the head's matmul and the walk over its logits in one kernel,
// for CPUs with AVX-512 (fp32) and its bf16 dot product (bf16). Logits live in registers only, in fp32; one
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

// Whether this CPU runs these kernels for dtype. H must be even for bf16.
int strop_head_supported(int dtype);

// hidden [N, H], rows `stride` elements apart -> packed, n * H elements, as the functions below want it.
int strop_head_pack(const void* hidden, int dtype, int64_t num_rows, int64_t hidden_size, int64_t stride,
                    void* packed);

// The walk over words first .. first + num_words - 1 of weight [vocab, H]. head->bias: fp32 [vocab].
// target int64 [N], below vocab. walk goes on from what it holds, as in strop_walk_chunk.
// exps NULL, or [num_words, n] of dtype, with tops fp32 [panels, n]: exp(z - top of its panel) is kept.
// partial: fp32, 4 * n * ceil(num_words / STROP_SEGMENT) of scratch space.
int strop_head_walk(const void* packed, const void* weight, int dtype, int64_t num_rows, int64_t hidden_size,
                    int64_t stride, int64_t first, int64_t num_words, int64_t vocab, const int64_t* target,
                    const strop_head* head, const strop_walk* walk, void* exps, float* tops, float* partial);

// out [num_words, n] of dtype: grad[n] * (1[target] - softmax(z)) * dz/dx of these words, word by word; 0 in
// the padding and where grad is 0. lse, grad: fp32 [N].
int strop_head_grad(const void* packed, const void* weight, int dtype, int64_t num_rows, int64_t hidden_size,
                    int64_t stride, int64_t first, int64_t num_words, int64_t vocab, const int64_t* target,
                    const strop_head* head, const float* lse, const float* grad, void* out);

// The same from kept exponentials (without a softcap). exps and tops begin at word `first`. target NULL: no
// word is the target.
int strop_head_grad_kept(const void* exps, const float* tops, int dtype, int64_t num_rows, int64_t first,
                         int64_t num_words, int64_t vocab, const int64_t* target, float inv_temperature,
                         const float* lse, const float* grad, void* out);

#ifdef __cplusplus
}
#endif
