// The functions of strop_ops.h on a GPU. Pointers are the device's, `stream` is a cudaStream_t; nothing waits,
// nothing allocates. The same source runs on the CPU in tests (shim.h).
//
// The row kernels are bound by memory bandwidth, so they are built around the loads: one block a row, 16-byte
// loads with several in flight, each element read once forward, read once and written once backward. Rows may
// begin anywhere: the elements before the first 16-byte boundary and after the last are taken one at a time.
// All sums run in an order that depends on the shape alone: strided within a thread, a butterfly within a warp,
// then warp by warp. No atomics: the same input gives the same bits.
//
// What cannot be checked without waiting for the device is told in the numbers: a target outside the vocabulary
// gives NaN in at_target, cu_seqlens that do not add up give NaN in the sums concerned.
#include "strop_ops.h"

#include "preference.h"
#include "shim.h"

namespace {

constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr int MOST_THREADS = 512;
constexpr int WIDE_ROW = 8192;  // columns from which a row gets MOST_THREADS threads, else FEW_THREADS
constexpr int FEW_THREADS = 128;
constexpr int IN_FLIGHT = 4;    // vectors that a thread asks for before it uses the first

template <int DTYPE>
struct Element;

template <>
struct Element<STROP_F32> {
    using Raw = float;
    static __device__ __forceinline__ float load(Raw raw) { return raw; }
    static __device__ __forceinline__ Raw store(float value) { return value; }
};

template <>
struct Element<STROP_BF16> {
    using Raw = uint16_t;
    static __device__ __forceinline__ float load(Raw raw) { return float_of_bf16(raw); }
    static __device__ __forceinline__ Raw store(float value) { return bf16_of_float(value); }
};

template <>
struct Element<STROP_F16> {
    using Raw = uint16_t;
    static __device__ __forceinline__ float load(Raw raw) { return float_of_half(raw); }
    static __device__ __forceinline__ Raw store(float value) { return half_of_float(value); }
};

constexpr int VECTOR_BYTES = 16;

template <class Raw, int COUNT = VECTOR_BYTES / sizeof(Raw)>
struct alignas(COUNT * sizeof(Raw)) Vector {
    static constexpr int SIZE = COUNT;
    Raw item[SIZE];
};

// Elements before the first 16-byte boundary of a row.
template <class Raw>
__device__ __forceinline__ int elements_before_boundary(const Raw* row, int num_cols) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(row) % VECTOR_BYTES);
    const int before = misaligned ? int((VECTOR_BYTES - misaligned) / sizeof(Raw)) : 0;
    return before < num_cols ? before : num_cols;
}

// Calls use(vector, index) for this thread's share of a row: every blockDim.x-th, IN_FLIGHT loads at a time.
template <class Raw, class Use>
__device__ __forceinline__ void for_each_vector(const Vector<Raw>* vectors, int count, Use use) {
    const int threads = blockDim.x;
    int index = threadIdx.x;
    for (; index + (IN_FLIGHT - 1) * threads < count; index += IN_FLIGHT * threads) {
        Vector<Raw> loaded[IN_FLIGHT];
        STROP_UNROLL
        for (int i = 0; i < IN_FLIGHT; ++i) loaded[i] = vectors[index + i * threads];
        STROP_UNROLL
        for (int i = 0; i < IN_FLIGHT; ++i) use(loaded[i], index + i * threads);
    }
    for (; index < count; index += threads) use(vectors[index], index);
}

// strop_head, plus what a kernel needs of it ready.
struct Head {
    const float* bias;
    float softcap, inv_softcap, inv_temperature;
};

// z, and dz/dx in `slope`. PLAIN: no bias, cap or temperature, z = x.
template <bool PLAIN>
__device__ __forceinline__ float logit(const Head& head, float x, int column, float& slope) {
    slope = 1.0f;
    if (PLAIN) return x;
    if (head.bias) x += head.bias[column];
    slope = head.inv_temperature;
    if (head.softcap > 0.0f) {
        const float t = tanhf(x * head.inv_softcap);
        x = head.softcap * t;
        slope *= 1.0f - t * t;
    }
    return x * head.inv_temperature;
}

// ---- Forward: one chunk of the online log-sum-exp

struct Sums {
    float top, total, weighted, plain;
};

// exp(z - base) where base is the largest z; a row of -inf alone has no largest one, and every term is 0.
__device__ __forceinline__ float finite_base(float top) { return top == -INFINITY ? 0.0f : top; }

template <bool STATS>
__device__ __forceinline__ void add(Sums& into, const Sums& other) {
    const float top = fmaxf(into.top, other.top), base = finite_base(top);
    const float own = __expf(into.top - base), others = __expf(other.top - base);
    into.total = into.total * own + other.total * others;
    if (STATS) {
        into.weighted = into.weighted * own + other.weighted * others;
        into.plain += other.plain;
    }
    into.top = top;
}

template <bool STATS, int COUNT>
__device__ __forceinline__ void add_logits(Sums& into, const float (&z)[COUNT]) {
    float top = into.top;
    STROP_UNROLL
    for (int i = 0; i < COUNT; ++i) top = fmaxf(top, z[i]);
    const float base = finite_base(top), shrink = __expf(into.top - base);
    into.total *= shrink;
    into.weighted *= shrink;
    STROP_UNROLL
    for (int i = 0; i < COUNT; ++i) {
        const float e = __expf(z[i] - base);
        into.total += e;
        if (STATS) {
            into.weighted += z[i] == -INFINITY ? 0.0f : e * z[i];  // 0 * -inf counts as its limit, 0
            into.plain += z[i];
        }
    }
    into.top = top;
}

// Over all threads of the block; the result is thread 0's.
template <bool STATS>
__device__ __forceinline__ Sums sum_over_block(Sums sums) {
    __shared__ Sums of_warp[MOST_THREADS / WARP];
    for (int step = WARP / 2; step; step /= 2) {
        Sums other;
        other.top = __shfl_xor_sync(EVERY_LANE, sums.top, step);
        other.total = __shfl_xor_sync(EVERY_LANE, sums.total, step);
        if (STATS) {
            other.weighted = __shfl_xor_sync(EVERY_LANE, sums.weighted, step);
            other.plain = __shfl_xor_sync(EVERY_LANE, sums.plain, step);
        }
        add<STATS>(sums, other);
    }
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = sums;
    __syncthreads();
    if (threadIdx.x == 0)
        for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) add<STATS>(sums, of_warp[warp]);
    return sums;
}

struct WalkArgs {
    const void* x;
    int num_cols;
    int64_t stride, first, vocab;
    const int64_t* target;
    const float* exact;
    Head head;
    strop_walk walk;
};

template <int DTYPE, bool PLAIN, bool STATS>
__global__ void __launch_bounds__(MOST_THREADS) walk_kernel(const WalkArgs args) {
    using Raw = typename Element<DTYPE>::Raw;
    constexpr int SIZE = Vector<Raw>::SIZE;
    const int64_t row = blockIdx.x;
    const Raw* const x = static_cast<const Raw*>(args.x) + row * args.stride;
    const int num_cols = args.num_cols, thread = threadIdx.x;
    const int64_t target = args.target[row], within = target - args.first;
    const int target_column = within >= 0 && within < num_cols ? int(within) : -1;
    const bool replace = args.exact && target_column >= 0;
    const float exact = replace ? args.exact[row] : 0.0f;
    const int replaced_column = replace ? target_column : -1;

    float slope;
    const auto logit_at = [&](int column) {
        const float value = column == replaced_column ? exact : Element<DTYPE>::load(x[column]);
        return logit<PLAIN>(args.head, value, column, slope);
    };
    Sums sums = {-INFINITY, 0.0f, 0.0f, 0.0f};
    const int before = elements_before_boundary(x, num_cols), num_vectors = (num_cols - before) / SIZE;
    const int after = before + num_vectors * SIZE;
    if (thread < before) {
        const float z[1] = {logit_at(thread)};
        add_logits<STATS>(sums, z);
    }
    const auto add_vector = [&](const Vector<Raw>& vector, int index) {
        const int column = before + index * SIZE;
        float z[SIZE];
        STROP_UNROLL
        for (int i = 0; i < SIZE; ++i) {
            const float value = column + i == replaced_column ? exact : Element<DTYPE>::load(vector.item[i]);
            z[i] = logit<PLAIN>(args.head, value, column + i, slope);
        }
        add_logits<STATS>(sums, z);
    };
    for_each_vector(reinterpret_cast<const Vector<Raw>*>(x + before), num_vectors, add_vector);
    if (thread < num_cols - after) {
        const float z[1] = {logit_at(after + thread)};
        add_logits<STATS>(sums, z);
    }

    sums = sum_over_block<STATS>(sums);
    if (thread) return;
    const strop_walk& walk = args.walk;
    Sums so_far = {walk.top[row], walk.total[row], 0.0f, 0.0f};
    if (walk.weighted) so_far.weighted = walk.weighted[row];
    if (walk.plain) so_far.plain = walk.plain[row];
    add<STATS>(so_far, sums);
    walk.top[row] = so_far.top;
    walk.total[row] = so_far.total;
    if (walk.weighted) walk.weighted[row] = so_far.weighted;
    if (walk.plain) walk.plain[row] = so_far.plain;
    if (target < 0 || target >= args.vocab) walk.at_target[row] = NAN;
    if (target_column >= 0) walk.at_target[row] = logit_at(target_column);
}

// ---- Backward: the gradient of one chunk

struct GradArgs {
    const void* x;
    void* out;
    int64_t num_rows;
    int num_cols;
    int64_t stride, out_stride, first;
    const int64_t* target;
    const float* exact;
    Head head;
    const float* lse;
    const float* grad;
    float* bias_grad;
};

// What one row's elements have in common.
struct RowGrad {
    float lse, grad, exact;
    int target_column, replaced_column;
};

__device__ __forceinline__ RowGrad row_grad(const GradArgs& args, int64_t row) {
    const int64_t within = args.target[row] - args.first;
    RowGrad common;
    common.target_column = within >= 0 && within < args.num_cols ? int(within) : -1;
    common.replaced_column = args.exact ? common.target_column : -1;
    common.exact = common.replaced_column >= 0 ? args.exact[row] : 0.0f;
    common.lse = args.lse[row];
    common.grad = args.grad[row];
    return common;
}

template <bool PLAIN>
__device__ __forceinline__ float gradient_elsewhere(const GradArgs& args, const RowGrad& common, float x, int column) {
    float slope;
    const float z = logit<PLAIN>(args.head, x, column, slope);
    return common.grad * -__expf(z - common.lse) * slope;
}

template <bool PLAIN>
__device__ __forceinline__ float gradient(const GradArgs& args, const RowGrad& common, float x, int column) {
    if (column != common.target_column) return gradient_elsewhere<PLAIN>(args, common, x, column);
    if (column == common.replaced_column) x = common.exact;
    float slope;
    const float z = logit<PLAIN>(args.head, x, column, slope);
    // 1 - p through expm1: the gradient of a token that is nearly certain keeps its digits
    return common.grad * -expm1f(z - common.lse) * slope;
}

// OUT: what is written; in place it is DTYPE.
template <int DTYPE, int OUT, bool PLAIN>
__global__ void __launch_bounds__(MOST_THREADS) grad_kernel(const GradArgs args) {
    using Raw = typename Element<DTYPE>::Raw;
    using OutRaw = typename Element<OUT>::Raw;
    constexpr int SIZE = Vector<Raw>::SIZE;
    using OutVector = Vector<OutRaw, SIZE>;
    const int64_t row = blockIdx.x;
    const Raw* const x = static_cast<const Raw*>(args.x) + row * args.stride;
    OutRaw* const out = static_cast<OutRaw*>(args.out) + row * args.out_stride;
    const int num_cols = args.num_cols, thread = threadIdx.x, threads = blockDim.x;
    const RowGrad common = row_grad(args, row);
    const bool zero = common.grad == 0.0f;  // whatever x holds, NaN and infinities too

    const auto do_one = [&](int column) {
        const float value = zero ? 0.0f : gradient<PLAIN>(args, common, Element<DTYPE>::load(x[column]), column);
        out[column] = Element<OUT>::store(value);
    };
    const int before = elements_before_boundary(x, num_cols), num_vectors = (num_cols - before) / SIZE;
    if (reinterpret_cast<uintptr_t>(out + before) % alignof(OutVector)) {  // no column begins a vector in both
        for (int column = thread; column < num_cols; column += threads) do_one(column);
        return;
    }
    const int after = before + num_vectors * SIZE;
    if (thread < before) do_one(thread);
    if (thread < num_cols - after) do_one(after + thread);
    OutVector* const to = reinterpret_cast<OutVector*>(out + before);
    if (zero) {
        const OutVector nothing = {};
        for (int v = thread; v < num_vectors; v += threads) to[v] = nothing;
        return;
    }
    const auto do_vector = [&](const Vector<Raw>& vector, int index) {
        const int column = before + index * SIZE, target = common.target_column;
        OutVector result;
        STROP_UNROLL
        for (int i = 0; i < SIZE; ++i)
            result.item[i] = Element<OUT>::store(
                gradient_elsewhere<PLAIN>(args, common, Element<DTYPE>::load(vector.item[i]), column + i));
        if (target < column || target >= column + SIZE) {
            to[index] = result;
            return;
        }
        const Raw at_target = x[target];  // before it may be overwritten
        to[index] = result;
        out[target] = Element<OUT>::store(gradient<PLAIN>(args, common, Element<DTYPE>::load(at_target), target));
    };
    for_each_vector(reinterpret_cast<const Vector<Raw>*>(x + before), num_vectors, do_vector);
}

constexpr int COLUMN_WARPS = 8;

// bias_grad: a lane a column, a warp every eighth row, then the warps in turn. Reads x once more, before
// grad_kernel may overwrite it.
template <int DTYPE>
__global__ void __launch_bounds__(WARP * COLUMN_WARPS) bias_grad_kernel(const GradArgs args) {
    using Raw = typename Element<DTYPE>::Raw;
    __shared__ float of_warp[COLUMN_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t column = int64_t(blockIdx.x) * WARP + lane;
    float sum = 0.0f;
    if (column < args.num_cols)
        for (int64_t row = warp; row < args.num_rows; row += COLUMN_WARPS) {
            const RowGrad common = row_grad(args, row);
            if (common.grad == 0.0f) continue;
            const Raw raw = static_cast<const Raw*>(args.x)[row * args.stride + column];
            sum += gradient<false>(args, common, Element<DTYPE>::load(raw), int(column));
        }
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= args.num_cols) return;
    for (int other = 1; other < COLUMN_WARPS; ++other) sum += of_warp[other][lane];
    args.bias_grad[column] += sum;
}

// ---- Segments and pairs

constexpr int SEGMENT_THREADS = 256;
constexpr int PAIR_THREADS = 128;

// One block a segment.
__global__ void __launch_bounds__(SEGMENT_THREADS)
    segment_sum_kernel(const float* x, int64_t num_tokens, const int32_t* cu_seqlens, float* out) {
    __shared__ float of_warp[SEGMENT_THREADS / WARP];
    const int64_t segment = blockIdx.x, begin = cu_seqlens[segment], end = cu_seqlens[segment + 1];
    const bool fits = begin >= 0 && begin <= end && end <= num_tokens && (segment > 0 || begin == 0) &&
                      (segment + 1 < gridDim.x || end == num_tokens);
    float sum = 0.0f;
    if (fits)
        for (int64_t token = begin + threadIdx.x; token < end; token += SEGMENT_THREADS) sum += x[token];
    for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, step);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < SEGMENT_THREADS / WARP; ++warp) sum += of_warp[warp];
    out[segment] = fits ? sum : NAN;
}

// One thread a token: the last segment that begins at or before it, by bisection.
__global__ void __launch_bounds__(SEGMENT_THREADS)
    segment_spread_kernel(const float* g, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                          float* dx) {
    const int64_t token = int64_t(blockIdx.x) * SEGMENT_THREADS + threadIdx.x;
    if (token >= num_tokens) return;
    int64_t low = 0, high = num_segments;  // cu_seqlens[low] <= token < cu_seqlens[high], if they add up
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (cu_seqlens[middle] <= token ? low : high) = middle;
    }
    dx[token] = cu_seqlens[low] <= token && token < cu_seqlens[low + 1] ? g[low] : NAN;
}

__global__ void __launch_bounds__(PAIR_THREADS)
    dpo_kernel(const float* ratio, int64_t num_pairs, int kind, float beta, float label_smoothing, float delta,
               float* loss, float* d_ratio) {
    const int64_t pair = int64_t(blockIdx.x) * PAIR_THREADS + threadIdx.x;
    if (pair >= num_pairs) return;
    const PairLoss<float> result =
        pair_loss(kind, ratio[2 * pair], ratio[2 * pair + 1], beta, label_smoothing, delta);
    loss[pair] = result.loss;
    d_ratio[2 * pair] = result.by_chosen;
    d_ratio[2 * pair + 1] = result.by_rejected;
}

// ---- Host side

constexpr int64_t MOST_BLOCKS = 2147483647;
constexpr int64_t MOST_COLUMNS = 1 << 30;  // so that a column's index plus a stride of threads is an int

int launched() { return cudaGetLastError() == cudaSuccess ? STROP_OK : STROP_ECUDA; }

int64_t blocks_for(int64_t count, int threads) { return (count + threads - 1) / threads; }

int threads_for(int64_t num_cols) { return num_cols >= WIDE_ROW ? MOST_THREADS : FEW_THREADS; }

bool is_plain(const Head& head) {
    return !head.bias && !(head.softcap > 0.0f) && head.inv_temperature == 1.0f;
}

Head make_head(const strop_head& head) {
    const bool capped = head.softcap > 0.0f;
    return {head.bias, head.softcap, capped ? 1.0f / head.softcap : 0.0f, head.inv_temperature};
}

bool fits(const strop_head& head) {
    return head.softcap >= 0.0f && isfinite(head.softcap) && head.inv_temperature > 0.0f &&
           isfinite(head.inv_temperature);
}

int check_chunk(int dtype, int64_t num_rows, int64_t num_cols, int64_t stride, int64_t first, int64_t vocab) {
    if (dtype != STROP_F32 && dtype != STROP_BF16 && dtype != STROP_F16) return STROP_EDTYPE;
    if (num_rows < 0 || num_rows > MOST_BLOCKS || num_cols < 0 || num_cols > MOST_COLUMNS) return STROP_ESHAPE;
    if (first < 0 || vocab < num_cols || first > vocab - num_cols) return STROP_ESHAPE;
    if (num_rows > 1 && stride < num_cols) return STROP_ESHAPE;
    return STROP_OK;
}

template <int DTYPE, bool PLAIN>
void start_walk(const WalkArgs& args, int64_t num_rows, void* stream) {
    const bool stats = args.walk.weighted || args.walk.plain;
    const auto kernel = stats ? walk_kernel<DTYPE, PLAIN, true> : walk_kernel<DTYPE, PLAIN, false>;
    STROP_LAUNCH(kernel, unsigned(num_rows), threads_for(args.num_cols), stream, args);
}

template <int DTYPE>
int walk(const WalkArgs& args, int64_t num_rows, void* stream) {
    if (is_plain(args.head))
        start_walk<DTYPE, true>(args, num_rows, stream);
    else
        start_walk<DTYPE, false>(args, num_rows, stream);
    return launched();
}

template <int DTYPE, int OUT = DTYPE>
int grad(const GradArgs& args, void* stream) {
    if (args.bias_grad) {
        const auto kernel = bias_grad_kernel<DTYPE>;
        STROP_LAUNCH(kernel, unsigned(blocks_for(args.num_cols, WARP)), WARP * COLUMN_WARPS, stream, args);
        if (const int status = launched()) return status;
    }
    const auto kernel = is_plain(args.head) ? grad_kernel<DTYPE, OUT, true> : grad_kernel<DTYPE, OUT, false>;
    STROP_LAUNCH(kernel, unsigned(args.num_rows), threads_for(args.num_cols), stream, args);
    return launched();
}

}  // namespace

extern "C" {

int strop_abi_version(void) { return STROP_ABI; }

const char* strop_problem(void) { return problem_with(reinterpret_cast<const void*>(dpo_kernel)); }

const char* strop_error(int status) {
    switch (status) {
        case STROP_OK: return "no error";
        case STROP_EDTYPE: return "a dtype that this function does not take";
        case STROP_ESHAPE: return "sizes, strides or a head's parameters that do not fit";
        case STROP_ETARGET: return "a target outside the vocabulary";
        case STROP_EKIND: return "no such loss, or beta or label smoothing outside its range";
        case STROP_ENULL: return "a null pointer where data is needed";
        case STROP_ECUDA: return "CUDA refused to launch the kernel";
    }
    return "an unknown status";
}

int strop_walk_chunk(const void* x, int dtype, int64_t num_rows, int64_t num_cols, int64_t stride, int64_t first,
                     int64_t vocab, const int64_t* target, const float* exact, const strop_head* head,
                     const strop_walk* state, void* stream) {
    if (const int status = check_chunk(dtype, num_rows, num_cols, stride, first, vocab)) return status;
    if (num_rows == 0 || num_cols == 0) return STROP_OK;
    if (!x || !target || !head || !state || !state->top || !state->total || !state->at_target) return STROP_ENULL;
    if (!fits(*head)) return STROP_ESHAPE;
    const WalkArgs args = {x, int(num_cols), stride, first, vocab, target, exact, make_head(*head), *state};
    switch (dtype) {
        case STROP_F32: return walk<STROP_F32>(args, num_rows, stream);
        case STROP_BF16: return walk<STROP_BF16>(args, num_rows, stream);
        default: return walk<STROP_F16>(args, num_rows, stream);
    }
}

int strop_grad_chunk(const void* x, void* out, int dtype, int out_dtype, int64_t num_rows, int64_t num_cols,
                     int64_t stride, int64_t out_stride, int64_t first, int64_t vocab, const int64_t* target,
                     const float* exact, const strop_head* head, const float* lse, const float* row_grads,
                     float* bias_grad, void* stream) {
    const bool narrows = dtype == STROP_F32 && (out_dtype == STROP_BF16 || out_dtype == STROP_F16);
    if (out_dtype != dtype && !narrows) return STROP_EDTYPE;
    if (const int status = check_chunk(dtype, num_rows, num_cols, stride, first, vocab)) return status;
    if (num_rows > 1 && (out_stride < num_cols || (x == out && stride != out_stride))) return STROP_ESHAPE;
    if (num_rows == 0 || num_cols == 0) return STROP_OK;
    if (narrows && x == out) return STROP_ESHAPE;
    if (!x || !out || !target || !head || !lse || !row_grads) return STROP_ENULL;
    if (!fits(*head)) return STROP_ESHAPE;
    const GradArgs args = {x,     out,   num_rows, int(num_cols),    stride, out_stride, first,
                           target, exact, make_head(*head), lse, row_grads, bias_grad};
    if (narrows)
        return out_dtype == STROP_BF16 ? grad<STROP_F32, STROP_BF16>(args, stream)
                                       : grad<STROP_F32, STROP_F16>(args, stream);
    switch (dtype) {
        case STROP_F32: return grad<STROP_F32>(args, stream);
        case STROP_BF16: return grad<STROP_BF16>(args, stream);
        default: return grad<STROP_F16>(args, stream);
    }
}

int strop_segment_sum(const float* x, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                      float* out, void* stream) {
    if (num_tokens < 0 || num_segments < 0 || num_segments > MOST_BLOCKS) return STROP_ESHAPE;
    if (num_segments == 0) return num_tokens ? STROP_ESHAPE : STROP_OK;
    if (!cu_seqlens || !out || (num_tokens && !x)) return STROP_ENULL;
    STROP_LAUNCH(segment_sum_kernel, unsigned(num_segments), SEGMENT_THREADS, stream, x, num_tokens, cu_seqlens,
                 out);
    return launched();
}

int strop_segment_spread(const float* g, int64_t num_tokens, const int32_t* cu_seqlens, int64_t num_segments,
                         float* dx, void* stream) {
    if (num_tokens < 0 || num_segments < 0 || num_tokens > MOST_BLOCKS) return STROP_ESHAPE;
    if (num_segments == 0) return num_tokens ? STROP_ESHAPE : STROP_OK;
    if (!cu_seqlens || !g || (num_tokens && !dx)) return STROP_ENULL;
    if (num_tokens == 0) return STROP_OK;
    const unsigned blocks = unsigned(blocks_for(num_tokens, SEGMENT_THREADS));
    STROP_LAUNCH(segment_spread_kernel, blocks, SEGMENT_THREADS, stream, g, num_tokens, cu_seqlens, num_segments,
                 dx);
    return launched();
}

int strop_dpo_loss(const float* ratio, int64_t num_pairs, int kind, float beta, float label_smoothing,
                   float delta, float* loss, float* d_ratio, void* stream) {
    if (num_pairs < 0 || num_pairs > MOST_BLOCKS) return STROP_ESHAPE;
    const int status = check_kind(kind, beta, label_smoothing);
    if (status != STROP_OK || num_pairs == 0) return status;
    if (!ratio || !loss || !d_ratio) return STROP_ENULL;
    const unsigned blocks = unsigned(blocks_for(num_pairs, PAIR_THREADS));
    STROP_LAUNCH(dpo_kernel, blocks, PAIR_THREADS, stream, ratio, num_pairs, kind, beta, label_smoothing, delta,
                 loss, d_ratio);
    return launched();
}

}  // extern "C"
