"""What the C interface says to bad input: the status that strop_ops.h promises, and nothing written."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.shim import abi
from tests.shim.abi import BF16, F16, F32, HeadSettings, Matrix, Walk, copied

WALK = {
    "dtype": ({"dtype": 3}, abi.EDTYPE),
    "negative dtype": ({"dtype": -1}, abi.EDTYPE),
    "rows below zero": ({"num_rows": -1}, abi.ESHAPE),
    "columns below zero": ({"num_cols": -1}, abi.ESHAPE),
    "rows that overlap": ({"stride": 4}, abi.ESHAPE),
    "first below zero": ({"first": -1}, abi.ESHAPE),
    "beyond the vocabulary": ({"first": 3, "vocab": 7}, abi.ESHAPE),
    "a vocabulary below zero": ({"vocab": -1}, abi.ESHAPE),
    "64-bit overflow": ({"first": 2**63 - 1, "vocab": 2**63 - 1}, abi.ESHAPE),
    "no x": ({"x": None}, abi.ENULL),
    "no target": ({"target": None}, abi.ENULL),
    "no head": ({"head": None}, abi.ENULL),
}


def call(lib, function, changes, **named):
    """Call with the arguments in `named`'s order, some changed."""
    named.update(changes)
    return getattr(lib.c, function)(*named.values())


@pytest.mark.parametrize(("changes", "status"), WALK.values(), ids=WALK.keys())
def test_walk_and_grad(lib, changes, status):
    x, target = Matrix.of(np.zeros((2, 5)), F32), copied([0, 1], np.int64)
    out = Matrix.of(np.full((2, 5), 9.0), F32)
    walk, rows = Walk(2), copied(np.zeros(2), np.float32)
    before = walk.bits()
    head, state = HeadSettings().struct(abi.address), walk.struct(abi.address)
    shape = {"num_rows": 2, "num_cols": 5, "stride": 5}
    rest = {
        "first": 0,
        "vocab": 5,
        "target": abi.address(target),
        "exact": None,
        "head": ctypes.addressof(head),
    }
    where = {"x": abi.address(x.flat)}
    status_of_walk = call(
        lib, "strop_walk_chunk", changes, **where, dtype=F32, **shape, **rest,
        walk=ctypes.addressof(state), stream=None,
    )  # fmt: skip
    assert status_of_walk == status
    assert walk.bits() == before
    status_of_grad = call(
        lib, "strop_grad_chunk", changes, **where, out=abi.address(out.flat), dtype=F32,
        out_dtype=changes.get("dtype", F32), **shape, out_stride=5, **rest, lse=abi.address(rows),
        grad=abi.address(rows), bias_grad=None, stream=None,
    )  # fmt: skip
    assert status_of_grad == status
    assert (out.values == 9).all()


@pytest.mark.parametrize("missing", ["top", "total", "at_target"])
def test_walk_without_its_state(lib, missing):
    x, target, head = (
        Matrix.of(np.zeros((1, 5)), F32),
        copied([0], np.int64),
        HeadSettings().struct(abi.address),
    )
    state = Walk(1).struct(abi.address)
    setattr(state, missing, None)
    pointers = (abi.address(target), None, ctypes.addressof(head), ctypes.addressof(state), None)
    assert lib.c.strop_walk_chunk(abi.address(x.flat), F32, 1, 5, 5, 0, 5, *pointers) == abi.ENULL
    assert (
        lib.c.strop_walk_chunk(abi.address(x.flat), F32, 1, 5, 5, 0, 5, *pointers[:3], None, None)
        == abi.ENULL
    )


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"out": None}, abi.ENULL),
        ({"lse": None}, abi.ENULL),
        ({"grad": None}, abi.ENULL),
        ({"out_stride": 4}, abi.ESHAPE),
        ({"out": "x", "out_stride": 6}, abi.ESHAPE),  # in place, but not the same rows
        ({"out_dtype": 3}, abi.EDTYPE),
        ({"dtype": BF16}, abi.EDTYPE),  # wider than x
        ({"dtype": BF16, "out_dtype": F16}, abi.EDTYPE),
        ({"out_dtype": BF16}, abi.ESHAPE),  # in place, but narrower
    ],
    ids=str,
)
def test_grad_alone(lib, changes, status):
    x, target = Matrix.of(np.full((2, 6), 9.0), F32), copied([0, 1], np.int64)
    rows, head = copied(np.ones(2), np.float32), HeadSettings().struct(abi.address)
    here = abi.address(x.flat)
    changes = {key: here if value == "x" else value for key, value in changes.items()}
    result = call(
        lib, "strop_grad_chunk", changes, x=here, out=here, dtype=F32, out_dtype=F32, num_rows=2, num_cols=5,
        stride=5, out_stride=5, first=0, vocab=5, target=abi.address(target), exact=None,
        head=ctypes.addressof(head), lse=abi.address(rows), grad=abi.address(rows), bias_grad=None,
        stream=None,
    )  # fmt: skip
    assert result == status
    assert (x.values == 9).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bad", [-1, 5, -(2**63), 2**62])
def test_a_target_outside_the_vocabulary(lib, bad, dtype):
    """The CPU refuses the call. A GPU cannot wait to look: NaN for that row alone, in every chunk."""
    x, target, walk = Matrix.of(np.zeros((2, 5)), dtype), copied([1, bad], np.int64), Walk(2)
    before = walk.bits()
    lse, grad = copied(np.log([5.0, 5.0]), np.float32), copied([1.0, 1.0], np.float32)
    if lib.name == "cpu":
        assert lib.walk(x, target, walk) == abi.ETARGET
        assert walk.bits() == before
        assert lib.grad(x, x, target, lse, grad) == abi.ETARGET
        assert (x.values == 0).all()
    else:
        assert lib.walk(x, target, walk) == abi.OK
        assert np.isnan(walk.at_target[1])
        assert walk.at_target[0] == 0
        assert np.allclose(walk.lse, np.log(5))
        assert lib.grad(x, x, target, lse, grad) == abi.OK
        assert np.allclose(x.values[1], -0.2, rtol=4e-3)


@pytest.mark.parametrize(
    ("softcap", "temperature"),
    [(-1.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (0.0, -1.0), (0.0, np.nan), (0.0, np.inf)],
)
def test_a_head_that_is_none(lib, softcap, temperature):
    x, target, walk = Matrix.of(np.ones((1, 5)), F32), copied([1], np.int64), Walk(1)
    before, head, one = walk.bits(), HeadSettings(None, softcap, temperature), copied([1.0], np.float32)
    assert lib.walk(x, target, walk, head) == abi.ESHAPE
    assert lib.grad(x, x, target, one, one, head) == abi.ESHAPE
    assert walk.bits() == before
    assert (x.values == 1).all()


def test_fp16_is_the_gpus_alone(lib):
    x, target, walk = Matrix.of(np.zeros((1, 5)), F16), copied([1], np.int64), Walk(1)
    assert lib.walk(x, target, walk) == (abi.EDTYPE if lib.name == "cpu" else abi.OK)


def test_segments_and_pairs(lib):
    three, bounds = copied(np.zeros(3), np.float32), copied([0, 3], np.int32)
    x, cu = abi.address(three), abi.address(bounds)
    for name in ("strop_segment_sum", "strop_segment_spread"):
        function = getattr(lib.c, name)
        assert function(x, -1, cu, 1, x, None) == abi.ESHAPE
        assert function(x, 3, cu, -1, x, None) == abi.ESHAPE
        assert function(x, 3, cu, 0, x, None) == abi.ESHAPE  # tokens that no segment has
        assert function(None, 3, cu, 1, x, None) == abi.ENULL
        assert function(x, 3, None, 1, x, None) == abi.ENULL
        assert function(x, 3, cu, 1, None, None) == abi.ENULL
    pairs = lib.c.strop_dpo_loss
    assert pairs(x, -1, 0, 0.1, 0.0, 0.0, x, x, None) == abi.ESHAPE
    assert pairs(x, 1, 13, 0.1, 0.0, 0.0, x, x, None) == abi.EKIND
    assert pairs(x, 1, -1, 0.1, 0.0, 0.0, x, x, None) == abi.EKIND
    for beta in (0.0, -0.1, np.inf, np.nan):
        assert pairs(x, 1, 0, beta, 0.0, 0.0, x, x, None) == abi.EKIND
    for smoothing in (-0.1, 0.5, np.nan):
        assert pairs(x, 1, 0, 0.1, smoothing, 0.0, x, x, None) == abi.EKIND
    assert pairs(x, 1, 4, 0.1, 0.0, 0.0, x, x, None) == abi.EKIND  # exo_pair has a log of the smoothing
    assert pairs(None, 1, 0, 0.1, 0.0, 0.0, x, x, None) == abi.ENULL
    assert pairs(x, 1, 0, 0.1, 0.0, 0.0, None, x, None) == abi.ENULL
    assert pairs(x, 1, 0, 0.1, 0.0, 0.0, x, None, None) == abi.ENULL


def test_statuses_in_words(lib):
    words = [lib.c.strop_error(status).decode() for status in range(-1, 8)]
    assert words[0] == words[-1]  # unknown ones
    assert len(set(words)) == 8
    assert all(words)


def test_abi_version(lib, repo):
    header = (repo / "src/strop/ops/csrc/strop_ops.h").read_text()
    assert f"#define STROP_ABI {lib.c.strop_abi_version()}\n" in header
