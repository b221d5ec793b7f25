"""strop_walk_chunk and strop_grad_chunk against numpy's fp64 softmax of the same rounded inputs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.shim import abi
from tests.shim.abi import BF16, F16, F32, HeadSettings, Matrix, Walk, copied

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
# one word; less than a 16-byte vector of fp32 (4) and bf16 (8); around a warp's width; more than a block's
# threads; not a multiple of anything
VOCABS = (1, 3, 7, 8, 31, 32, 33, 1000, 1025)
# below and above the width at which a row gets more threads, each with several vectors a thread
WIDE = (8191, 20011)
HEADS = {
    "plain": (False, 0.0, 1.0),
    "bias": (True, 0.0, 1.0),
    "softcap": (False, 3.0, 1.0),
    "temperature": (False, 0.0, 0.7),
    "all": (True, 2.0, 1.3),
}


def numbers(seed, *shape, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def make_head(name, vocab):
    with_bias, softcap, temperature = HEADS[name]
    bias = copied(numbers(vocab, vocab, scale=1.0), np.float32) if with_bias else None
    return HeadSettings(bias, softcap, temperature)


def make_targets(rows, vocab):
    """The first and the last word among them."""
    return copied((np.arange(rows) * (vocab - 1) + np.arange(rows) // 2) % vocab, np.int64)


def stand_in(values, targets, exact):
    """The matmul's output with the exact value in each target's place."""
    values = values.copy()
    if exact is not None:
        values[np.arange(len(targets)), targets] = exact
    return values


def softmax_truth(z):
    """fp64 (lse, softmax, entropy) of rows that may hold -inf."""
    top = z.max(1, keepdims=True)
    e = np.exp(z - top)
    p = e / e.sum(1, keepdims=True)
    lse = top[:, 0] + np.log(e.sum(1))
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return lse, p, -(p * logs).sum(1)


def takes(lib, dtype):
    """fp16 is the GPU's alone."""
    return dtype != F16 or lib.name != "cpu"


def check_walk(walk, z, targets):
    lse, _, entropy = softmax_truth(z)
    assert np.allclose(walk.lse, lse, rtol=2e-6, atol=4e-6)
    at_target = z[np.arange(len(targets)), targets]
    assert np.allclose(walk.at_target, at_target, rtol=1e-6, atol=1e-6)
    assert (walk.at_target <= walk.top).all()
    if walk.stats:
        assert np.allclose(walk.entropy, entropy, rtol=1e-5, atol=2e-5)
        assert np.allclose(walk.plain, z.sum(1), rtol=1e-5, atol=1e-5 * np.abs(z).sum(1).max())


@DTYPES
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_a_row_in_one_chunk(lib, dtype, head_name, vocab):
    if not takes(lib, dtype):
        return
    for rows, stride in ((1, vocab), (3, vocab + 5)):
        x = Matrix.of(numbers(vocab, rows, vocab), dtype, stride)
        targets, head = make_targets(rows, vocab), make_head(head_name, vocab)
        exact = copied(x.values[np.arange(rows), targets] * 1.001, np.float32)
        for given in (None, exact):
            for stats in (True, False):
                walk = Walk(rows, stats)
                assert lib.walk(x, targets, walk, head, exact=given) == abi.OK
                check_walk(walk, head.logits(stand_in(x.values, targets, given)), targets)


@DTYPES
@pytest.mark.parametrize("vocab", WIDE)
def test_wide_rows(lib, dtype, vocab):
    if not takes(lib, dtype):
        return
    x = Matrix.of(numbers(vocab, 2, vocab), dtype, vocab + 1)
    targets, head = make_targets(2, vocab), make_head("plain", vocab)
    walk = Walk(2)
    assert lib.walk(x, targets, walk, head) == abi.OK
    check_walk(walk, x.values, targets)
    check_grad(lib, x, targets, head, None)


# chunks of one word, of less than a vector, of a vector and one, all but the last word, and wider than V
@DTYPES
@pytest.mark.parametrize(
    ("vocab", "width"), [(33, 1), (100, 7), (100, 9), (1000, 999), (1000, 333), (33, 64)]
)
@pytest.mark.parametrize("head_name", ["plain", "all"])
def test_chunks_are_the_whole(lib, dtype, vocab, width, head_name):
    if not takes(lib, dtype):
        return
    values, head = numbers(vocab + width, 6, vocab), make_head(head_name, vocab)
    starts = list(range(0, vocab, width))
    # targets on both sides of the chunks' edges
    edges = [0, min(width, vocab) - 1, min(width, vocab - 1), starts[-1], vocab - 1, vocab // 2]
    targets = copied(edges, np.int64)
    whole = Matrix.of(values, dtype)
    exact = copied(whole.values[np.arange(6), targets] + 0.01, np.float32)
    z = head.logits(stand_in(whole.values, targets, exact))
    walk, bias_grad = Walk(6), copied(np.full(vocab, 0.5), np.float32)
    lse = copied(softmax_truth(z)[0], np.float32)
    grad = copied([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], np.float32)
    out = np.empty((6, vocab))
    for first in starts:
        last = min(first + width, vocab)
        x = Matrix.of(values[:, first:last], dtype)
        part = head.columns(first, last)
        assert lib.walk(x, targets, walk, part, first, vocab, exact) == abi.OK
        sums = copied(bias_grad[first:last], np.float32)
        assert lib.grad(x, x, targets, lse, grad, part, first, vocab, exact, sums) == abi.OK
        out[:, first:last], bias_grad[first:last] = x.values, sums
    check_walk(walk, z, targets)
    expected = gradient_truth(stand_in(whole.values, targets, exact), targets, head, lse, grad)
    assert_rounded(out, expected, dtype)
    assert np.allclose(bias_grad, 0.5 + expected[0].sum(0), rtol=1e-5, atol=1e-6)


ULP = 2.0**-23


def gradient_truth(x, targets, head, lse, grad):
    """grad * (1[target] - softmax) * dz/dx in fp64, with the log-sum-exp that the kernel is given; and what
    fp32 may cost: z and lse are rounded and their difference is an exponent; 1 - tanh^2 cancels."""
    z, lse = head.logits(x), lse.astype(np.float64)[:, None]
    p = np.exp(z - lse)
    one_hot = np.zeros_like(p)
    one_hot[np.arange(len(targets)), targets] = 1
    by_z, grad = one_hot - p, grad.astype(np.float64)[:, None]
    lost_by_z = 2 * p * (1 + np.abs(np.where(p > 0, z, 0)) + np.abs(lse)) + 2 * np.abs(by_z)
    lost_by_slope = 2 * np.abs(by_z) / head.temperature if head.softcap else 0.0
    lost = np.abs(grad) * ULP * (head.slopes(x) * lost_by_z + lost_by_slope)
    return grad * by_z * head.slopes(x), lost


def assert_rounded(values, truth, dtype):
    """Equal up to fp32 arithmetic and one rounding to dtype."""
    expected, lost = truth
    wrong = (
        np.abs(values - expected) > np.abs(expected) * 1.01 * abi.HALF_STEP[dtype] + lost + abi.TINY[dtype]
    )
    assert not wrong.any(), (np.argwhere(wrong)[:5], values[wrong][:5], expected[wrong][:5])


def check_grad(lib, x, targets, head, exact):
    """Out of place with another stride and alignment, out of place with the same, and in place."""
    rows, vocab = x.shape
    values = stand_in(x.values, targets, exact)
    lse = copied(softmax_truth(head.logits(values))[0], np.float32)
    grad = copied(np.resize([1.5, -0.25, 0.0], rows), np.float32)
    expected = gradient_truth(values, targets, head, lse, grad)
    before = x.flat.copy()
    bias_grad = copied(np.ones(vocab), np.float32)
    results = []
    for out in (Matrix.of(values, x.dtype, x.stride + 3), Matrix.of(values, x.dtype, x.stride), x):
        untouched = out.flat.copy()
        assert lib.grad(x, out, targets, lse, grad, head, exact=exact, bias_grad=bias_grad) == abi.OK
        assert_rounded(out.values, expected, x.dtype)
        assert (out.values[grad == 0] == 0).all()
        for row in range(rows - 1):  # what lies between the rows
            between = slice(row * out.stride + vocab, (row + 1) * out.stride)
            assert out.flat[between].tobytes() == untouched[between].tobytes()
        if out is not x:
            assert x.flat.tobytes() == before.tobytes()
        results.append(out.raw.tobytes())
    assert len(set(results)) == 1
    assert np.allclose(bias_grad, 1 + 3 * expected[0].sum(0), rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_gradients(lib, dtype, head_name, vocab):
    if not takes(lib, dtype):
        return
    for rows, stride in ((1, vocab), (5, vocab + 5)):
        for with_exact in (False, True):
            x = Matrix.of(numbers(vocab, rows, vocab), dtype, stride)
            targets = make_targets(rows, vocab)
            exact = copied(x.values[np.arange(rows), targets] + 0.01, np.float32) if with_exact else None
            check_grad(lib, x, targets, make_head(head_name, vocab), exact)


# 9, 10: 16-bit results that begin on and off what four of them are aligned to
@pytest.mark.parametrize("out_dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("vocab", [*VOCABS, 9, 10, WIDE[0]])
def test_narrow_gradients_of_fp32_logits(lib, out_dtype, head_name, vocab):
    """Those of fp32, rounded once."""
    if not takes(lib, out_dtype):
        return
    rows = 3
    x, targets, head = (
        Matrix.of(numbers(vocab, rows, vocab), F32),
        make_targets(rows, vocab),
        make_head(head_name, vocab),
    )
    lse = copied(softmax_truth(head.logits(x.values))[0], np.float32)
    grad, before = copied([1.5, 0.0, -0.25], np.float32), x.flat.copy()
    wide, wide_sums = Matrix.of(np.ones((rows, vocab)), F32), copied(np.ones(vocab), np.float32)
    assert lib.grad(x, wide, targets, lse, grad, head, bias_grad=wide_sums) == abi.OK
    assert_rounded(wide.values, gradient_truth(x.values, targets, head, lse, grad), F32)
    for more in (0, 1, 2):
        out = Matrix.of(np.ones((rows, vocab)), out_dtype, vocab + more)
        sums = copied(np.ones(vocab), np.float32)
        assert lib.grad(x, out, targets, lse, grad, head, bias_grad=sums) == abi.OK
        assert out.raw.tobytes() == abi.encode(wide.values, out_dtype).tobytes()
        assert (sums == wide_sums).all()
    assert x.flat.tobytes() == before.tobytes()


@DTYPES
def test_extreme_logits(lib, dtype):
    if not takes(lib, dtype):
        return
    vocab = 100
    rows = np.zeros((6, vocab))
    rows[1] = 1e4  # all equal and large
    rows[2] = -1e4
    rows[3, 5] = 1e4  # one word certain
    rows[4] = np.linspace(-1e4, 1e4, vocab)
    rows[5, ::2] = -1e4
    x = Matrix.of(rows, dtype)
    targets = copied([0, 99, 50, 5, 0, 1], np.int64)  # row 4: the least likely word
    walk = Walk(6)
    assert lib.walk(x, targets, walk) == abi.OK
    check_walk(walk, x.values, targets)
    check_grad(lib, x, targets, HeadSettings(), None)


@DTYPES
def test_masked_words(lib, dtype):
    """A bias of -inf: probability 0, gradient 0, no NaN; a chunk of nothing else, and that chunk first."""
    if not takes(lib, dtype):
        return
    vocab, masked = 90, 40
    bias = copied(np.where(np.arange(vocab) < masked, -np.inf, 0.25), np.float32)
    values, targets = numbers(1, 3, vocab), copied([40, 89, 60], np.int64)
    head, walk = HeadSettings(bias), Walk(3)
    whole = Matrix.of(values, dtype)
    for first, last in ((0, masked), (masked, vocab)):
        x = Matrix.of(values[:, first:last], dtype)
        assert lib.walk(x, targets, walk, head.columns(first, last), first, vocab) == abi.OK
        assert not np.isnan([walk.top, walk.total, walk.weighted]).any()
    lse, p, entropy = softmax_truth(head.logits(whole.values))
    assert np.allclose(walk.lse, lse, rtol=1e-6)
    assert np.allclose(walk.entropy, entropy, rtol=1e-5)
    assert (p[:, :masked] == 0).all()
    check_grad(lib, whole, targets, head, None)


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_logit_shows_in_its_row_alone(lib, dtype, bad):
    if not takes(lib, dtype):
        return
    values = numbers(3, 3, 50)
    values[1, 20] = bad
    x, walk = Matrix.of(values, dtype), Walk(3)
    assert lib.walk(x, copied([0, 1, 2], np.int64), walk) == abi.OK
    assert np.isnan(walk.lse).tolist() == [False, True, False]


@DTYPES
def test_a_row_without_gradient_is_exactly_zero(lib, dtype):
    if not takes(lib, dtype):
        return
    values = np.stack([np.full(77, np.nan), np.full(77, np.inf), np.full(77, -np.inf), numbers(2, 77)])
    x, out = Matrix.of(values, dtype), Matrix.of(values, dtype)
    targets = copied([0, 1, 2, 3], np.int64)
    lse = copied([np.nan, np.inf, -np.inf, 0.0], np.float32)
    sums = copied(np.zeros(77), np.float32)
    zeros = copied([0.0, -0.0, 0.0, 0.0], np.float32)
    assert lib.grad(x, out, targets, lse, zeros, bias_grad=sums) == abi.OK
    assert not out.raw.tobytes().strip(b"\0")
    assert not sums.any()


@DTYPES
def test_rounding_is_to_the_nearest_even(lib, dtype):
    """With x = lse = 0 and the target in another chunk, what is written is -grad, rounded: ties, subnormal
    and too large numbers among them."""
    if not takes(lib, dtype):
        return
    exact = np.float32(2.0) ** np.arange(-30, 20)
    grads = np.concatenate([exact * (1 + np.float32(k) / 4096) for k in range(0, 40)]).astype(np.float32)
    rows = len(grads)
    x, targets = Matrix.of(np.zeros((rows, 1)), dtype), copied(np.ones(rows), np.int64)
    out = Matrix.of(np.zeros((rows, 1)), dtype)
    lse, given = copied(np.zeros(rows), np.float32), copied(grads, np.float32)
    assert lib.grad(x, out, targets, lse, given, vocab=2) == abi.OK
    assert out.raw.tobytes() == abi.encode(-grads[:, None], dtype).tobytes()


@DTYPES
def test_every_size_of_number_is_read_right(lib, dtype):
    """at_target is the number itself: normal, subnormal, zero, infinite."""
    if not takes(lib, dtype):
        return
    bits = np.concatenate([np.arange(0, 0x7C00, 41), np.arange(0x8000, 0xFC00, 41)]).astype(np.uint16)
    x = Matrix.of(np.zeros((len(bits), 1)), dtype)
    if dtype == F32:
        x.raw[:, 0] = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        x.raw[:, 0] = bits.view(abi.STORAGE[dtype])
    walk = Walk(len(bits))
    assert lib.walk(x, copied(np.zeros(len(bits)), np.int64), walk) == abi.OK
    assert (walk.at_target.astype(np.float64) == x.values[:, 0]).all()


@DTYPES
def test_no_rows_and_no_columns(lib, dtype):
    if not takes(lib, dtype):
        return
    nothing = np.zeros(0, np.int64)
    for shape in ((0, 5), (0, 0)):
        x = Matrix.of(np.zeros(shape), dtype)
        assert lib.walk(x, nothing, Walk(0)) == abi.OK
        assert lib.grad(x, x, nothing, nothing, nothing) == abi.OK
    x, walk = Matrix.of(np.zeros((2, 0)), dtype), Walk(2)
    assert lib.walk(x, copied([0, 1], np.int64), walk, vocab=5) == abi.OK
    assert (walk.top == -np.inf).all()


@DTYPES
@pytest.mark.parametrize("vocab", [33, 9001])
def test_same_bits_on_repeat_and_for_rows_in_any_order(lib, dtype, vocab):
    if not takes(lib, dtype):
        return
    order = [3, 0, 2, 1]
    values, head = numbers(5, 4, vocab), make_head("all", vocab)
    runs = []
    for picked in (range(4), range(4), order):
        rows = list(picked)
        x, targets = Matrix.of(values[rows], dtype, vocab + 8 - vocab % 8), make_targets(4, vocab)[rows]
        walk = Walk(4)
        assert lib.walk(x, copied(targets, np.int64), walk, head) == abi.OK
        runs.append([getattr(walk, name) for name in ("top", "total", "weighted", "plain", "at_target")])
    for first, second, moved in zip(*runs):
        assert first.tobytes() == second.tobytes()
        assert first[order].tobytes() == moved.tobytes()


def test_the_stride_of_a_single_row_means_nothing(lib):
    """A column seen as a row, `torch.ones(5, 1).t()`, has stride 1."""
    x, walk, targets = Matrix.of(np.zeros((1, 5)), F32), Walk(1), copied([3], np.int64)
    x.stride = 1
    assert lib.walk(x, targets, walk) == abi.OK
    assert np.allclose(walk.lse, np.log(5))
    one = copied([1.0], np.float32)
    assert lib.grad(x, x, targets, copied(walk.lse, np.float32), one) == abi.OK
    assert np.allclose(x.flat, [-0.2, -0.2, -0.2, 0.8, -0.2])
