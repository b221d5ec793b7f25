// The C interface of strop's native kernels: the same functions from libstrop_cpu.so (g++) and, with device
// pointers and a stream, from libstrop_cuda.so (nvcc). No libtorch: one build serves every torch.
//
// Shapes: N rows (trained tokens), V columns (vocabulary, or a chunk of it), P pairs, T packed tokens.
// Every function returns 0, or a STROP_E* code without having written anything; strop_error says it in words.
// What a GPU cannot know without waiting for it is said in the numbers there: a target outside the vocabulary
// and cu_seqlens that do not add up give NaN where the CPU returns STROP_ETARGET and STROP_ESHAPE.
// Sums run in a fixed order, so the same input gives the same bits. Nothing here allocates.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STROP_ABI 5

enum strop_dtype { STROP_F32 = 0, STROP_BF16 = 1, STROP_F16 = 2 };
enum strop_status { STROP_OK = 0, STROP_EDTYPE = 1, STROP_ESHAPE = 2, STROP_ETARGET = 3, STROP_EKIND = 4,
                    STROP_ENULL = 5, STROP_ECUDA = 6 };

int strop_abi_version(void);
const char* strop_error(int status);

// Of the CUDA library alone: why none of its kernels can run on the current device, such as a driver that is too old
// or machine code for other GPUs only; NULL if they can.
const char* strop_problem(void);

// What becomes of a matmul's output x before the softmax: z = softcap(x + bias) * inv_temperature,
// softcap(x) = cap * tanh(x / cap); cap 0: none; bias NULL: none (fp32 [V] of this chunk).
typedef struct {
    const float* bias;
    float softcap;
    float inv_temperature;
} strop_head;

// Per-row state of the walk over the vocabulary, fp32 [N] each. Before the first chunk: top -inf, the others
// 0. After the last: lse = top + log(total). NULL where not wanted: weighted, plain.
typedef struct {
    float* top;        // largest z so far
    float* total;      // sum of exp(z - top)
    float* weighted;   // sum of exp(z - top) * z, for the entropy lse - weighted / total
    float* plain;      // sum of z
    float* at_target;  // z of the row's target, once its chunk has been seen
} strop_walk;

// One chunk of the forward: x [N, V] with rows `stride` elements apart, whose column 0 is word `first`.
// target int64 [N]: indices into the whole vocabulary of `vocab` words. exact fp32 [N] or NULL: the target's
// matmul output in fp32, which then stands for x's rounded one *everywhere* (sum and numerator alike).
// On the CPU a target outside [0, vocab) is STROP_ETARGET; on a GPU it gives NaN in at_target. A softcap below
// 0, an inv_temperature not above 0, and either if not finite, is STROP_ESHAPE.
int strop_walk_chunk(const void* x, int dtype, int64_t num_rows, int64_t num_cols, int64_t stride,
                     int64_t first, int64_t vocab, const int64_t* target, const float* exact,
                     const strop_head* head, const strop_walk* walk, void* stream);

// One chunk of the backward: out = grad[n] * (1[target] - softmax(z)) * dz/dx, in out_dtype: x's own dtype, or a
// 16-bit one for x in fp32. In its own dtype out may be x, with the same stride.
// lse fp32 [N] in nats, grad fp32 [N]: derivative of the loss by the row's log-prob. A row whose grad is 0
// gives exactly 0, whatever x holds.
// bias_grad fp32 [V] or NULL: the column sums of what is written (before rounding), added to.
int strop_grad_chunk(const void* x, void* out, int dtype, int out_dtype, int64_t num_rows, int64_t num_cols,
                     int64_t stride, int64_t out_stride, int64_t first, int64_t vocab, const int64_t* target,
                     const float* exact, const strop_head* head, const float* lse, const float* grad,
                     float* bias_grad, void* stream);

// Sums of consecutive segments: x fp32 [T], cu_seqlens int32 [S+1] from 0 to T -> out fp32 [S].
int strop_segment_sum(const float* x, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                      float* out, void* stream);

// Its backward: every token of a segment gets the segment's value. g fp32 [S] -> dx fp32 [T].
int strop_segment_spread(const float* g, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                         float* dx, void* stream);

enum strop_dpo_kind {
    STROP_SIGMOID = 0, STROP_ROBUST = 1, STROP_HINGE = 2, STROP_IPO = 3, STROP_EXO_PAIR = 4, STROP_NCA_PAIR = 5,
    STROP_BCO_PAIR = 6, STROP_SPPO_HARD = 7, STROP_APO_ZERO = 8, STROP_APO_DOWN = 9, STROP_SIGMOID_NORM = 10,
    STROP_SIMPO = 11, STROP_ORPO = 12
};

// Preference losses on log-ratios c, d fp32 [P, 2] (policy minus reference, or the policy's alone; chosen first;
// summed or averaged by the caller): loss fp32 [P] and its derivatives by c and d, fp32 [P, 2]. delta: bco_pair's
// running mean, simpo's margin.
// STROP_EKIND if beta is not above 0, or label_smoothing not in [0, 0.5) (exo_pair: above 0).
int strop_dpo_loss(const float* ratio, int64_t num_pairs, int kind, float beta, float label_smoothing,
                   float delta, float* loss, float* d_ratio, void* stream);

#ifdef __cplusplus
}
#endif
