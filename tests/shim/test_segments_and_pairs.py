"""Segment sums and preference losses against fp64 formulas; derivatives by central differences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.shim import abi
from tests.shim.abi import copied

CASES = {
    "one token each": [1, 1, 1],
    "empty ones among them": [0, 5, 0, 0, 3, 0],
    "all empty": [0, 0],
    "one": [4],
    "around a block's threads": [255, 256, 257, 1],
    "long": [5000, 3],
    "none": [],
}


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_segment_sum_and_its_backward(lib, lengths):
    cu_seqlens = copied(np.concatenate([[0], np.cumsum(lengths)]), np.int32)
    x = copied(np.random.default_rng(1).normal(size=sum(lengths)), np.float32)
    out = abi.guarded(len(lengths), np.float32)
    assert lib.segment_sum(x, cu_seqlens, out) == abi.OK
    parts = np.split(x.astype(np.float64), cu_seqlens[1:-1]) if lengths else []
    assert np.allclose(out, [part.sum() for part in parts], rtol=1e-6, atol=1e-5)
    again = abi.guarded(len(lengths), np.float32)
    assert lib.segment_sum(x, cu_seqlens, again) == abi.OK
    assert out.tobytes() == again.tobytes()
    g, dx = copied(np.arange(len(lengths)) + 0.5, np.float32), abi.guarded(sum(lengths), np.float32)
    assert lib.segment_spread(g, cu_seqlens, dx) == abi.OK
    assert (dx == np.repeat(g, lengths)).all()


# begins late, ends early, ends late, runs backwards, runs below zero
BROKEN = ([1, 5, 9], [0, 5, 8], [0, 5, 10], [0, 7, 5, 9], [0, -3, 9])


@pytest.mark.parametrize("cu_seqlens", BROKEN, ids=str)
def test_segments_that_do_not_add_up(lib, cu_seqlens):
    """A status on the CPU; a GPU cannot wait to look, and says it by NaN. Neither leaves its arrays."""
    x, bounds = copied(np.ones(9), np.float32), copied(cu_seqlens, np.int32)
    segments = len(cu_seqlens) - 1
    out, dx = copied(np.zeros(segments), np.float32), copied(np.zeros(9), np.float32)
    g = copied(np.ones(segments), np.float32)
    if lib.name == "cpu":
        assert lib.segment_sum(x, bounds, out) == abi.ESHAPE
        assert lib.segment_spread(g, bounds, dx) == abi.ESHAPE
        assert not out.any()
        assert not dx.any()
    else:
        assert lib.segment_sum(x, bounds, out) == abi.OK
        assert np.isnan(out).any()
        assert lib.segment_spread(g, bounds, dx) == abi.OK
        assert (np.isnan(dx) | (dx == 1)).all()


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def truth(kind, c, d, beta, eps, delta):
    """The losses of correctness.md in fp64, in the order of strop_dpo_kind."""
    h = c - d
    smooth = -(1 - eps) * log_sigmoid(beta * h) - eps * log_sigmoid(-beta * h)
    return [
        smooth,
        (-(1 - eps) * log_sigmoid(beta * h) + eps * log_sigmoid(-beta * h)) / (1 - 2 * eps),
        np.maximum(0, 1 - beta * h),
        (h - 1 / (2 * beta)) ** 2,
        sigmoid(beta * h) * (log_sigmoid(beta * h) - np.log(1 - eps))
        + sigmoid(-beta * h) * (log_sigmoid(-beta * h) - np.log(eps)),
        -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * d),
        -log_sigmoid(beta * c - delta) - log_sigmoid(-(beta * d - delta)),
        (c - 0.5 / beta) ** 2 + (d + 0.5 / beta) ** 2,
        (1 - sigmoid(beta * c)) + sigmoid(beta * d),
        sigmoid(beta * c) + (1 - sigmoid(beta * h)),
        smooth,
    ][kind]


@pytest.mark.parametrize(("beta", "eps", "delta"), [(0.1, 0.001, 0.0), (0.5, 0.1, -0.3), (2.0, 0.3, 1.0)])
@pytest.mark.parametrize("kind", range(11))
def test_preference_losses(lib, kind, beta, eps, delta):
    # one pair more than a block's threads; ratios from nothing to far outside what training meets
    ratio = copied(np.random.default_rng(kind).normal(size=(129, 2)) * 3, np.float32)
    ratio[:4] = [[0, 0], [40, -40], [-40, 40], [1e-4, -1e-4]]
    loss, d_ratio = abi.guarded(129, np.float32), copied(np.zeros((129, 2)), np.float32)
    assert lib.dpo(ratio, kind, beta, eps, delta, loss, d_ratio) == abi.OK
    c, d = ratio.astype(np.float64).T
    setting = [float(np.float32(value)) for value in (beta, eps, delta)]
    assert np.allclose(loss, truth(kind, c, d, *setting), rtol=3e-6, atol=1e-6)
    step = 1e-5
    slopes = [
        (truth(kind, c + a, d + b, *setting) - truth(kind, c - a, d - b, *setting)) / (2 * step)
        for a, b in ((step, 0), (0, step))
    ]
    smooth = np.abs(1 - setting[0] * (c - d)) > 1e-3  # hinge has no derivative at its corner
    assert np.allclose(d_ratio[smooth], np.stack(slopes, 1)[smooth], rtol=1e-5, atol=2e-6)
    again, d_again = abi.guarded(129, np.float32), copied(np.zeros((129, 2)), np.float32)
    assert lib.dpo(ratio, kind, beta, eps, delta, again, d_again) == abi.OK
    assert (loss.tobytes(), d_ratio.tobytes()) == (again.tobytes(), d_again.tobytes())


def test_equal_policy_and_reference(lib):
    """ln 2 to the last bit of fp32, and a derivative of half of beta."""
    ratio, loss = copied(np.zeros((1, 2)), np.float32), abi.guarded(1, np.float32)
    d_ratio = copied(np.zeros((1, 2)), np.float32)
    assert lib.dpo(ratio, 0, 0.1, 0.0, 0.0, loss, d_ratio) == abi.OK
    assert loss[0] == np.float32(np.log(2))
    assert np.allclose(d_ratio, [[-0.05, 0.05]], rtol=1e-7)


@pytest.mark.parametrize("kind", range(11))
def test_no_overflow_far_out(lib, kind):
    """Ratios of thousands of nats, as a diverging run has them: finite losses and derivatives."""
    ratio = copied([[5e3, -5e3], [-5e3, 5e3], [5e3, 5e3]], np.float32)
    loss, d_ratio = abi.guarded(3, np.float32), copied(np.zeros((3, 2)), np.float32)
    assert lib.dpo(ratio, kind, 0.5, 0.1, 0.2, loss, d_ratio) == abi.OK
    assert np.isfinite(loss).all()
    assert np.isfinite(d_ratio).all()


@pytest.mark.parametrize("kind", range(11))
def test_nan_stays_nan(lib, kind):
    """In every loss: a clamp must not turn a broken ratio into a fine one."""
    ratio, loss = copied([[np.nan, 0.0], [1.0, 0.0]], np.float32), abi.guarded(2, np.float32)
    d_ratio = copied(np.zeros((2, 2)), np.float32)
    assert lib.dpo(ratio, kind, 0.5, 0.1, 0.2, loss, d_ratio) == abi.OK
    assert np.isnan(loss).tolist() == [True, False]


def test_no_pairs(lib):
    empty = np.zeros((0, 2), np.float32)
    assert lib.dpo(empty, 0, 0.1, 0.0, 0.0, empty, empty) == abi.OK
