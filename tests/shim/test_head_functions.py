"""strop_cpu.h's head through the C interface, by AVX-512 and by AMX with emulated tiles: what it says to bad
input, and that the products of the backward keep to the memory that the header names."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from strop.ops import native
from tests import amx
from tests.shim import abi
from tests.shim.abi import BF16, F32, address
from tests.shim.conftest import built

pytestmark = pytest.mark.avx512
WORDS = {
    abi.EDTYPE: "this dtype has no kernel here",
    abi.ESHAPE: "a size, stride, offset or parameter of the head does not fit",
    abi.ETARGET: "a target is outside the vocabulary",
    abi.ENULL: "a pointer that is needed is null",
}


@pytest.fixture(scope="module", params=["cpu", "amx"])
def lib(request):
    """This machine's library, and that with AMX emulated."""
    return amx.emulated() if request.param == "amx" else native._checked(built("cpu"), "cpu")


def bf16(values):
    return abi.copied(abi.encode(values, BF16), np.uint16)


def arguments():
    """A good call of each function, by name in order; N 3, H 6, V 14 of 40 words."""
    out = {name: abi.guarded(14 * 32 * 32, np.uint16) for name in ("packed", "out", "exps")}
    floats = {name: abi.guarded(32 * 32, np.float32) for name in ("tops", "partial", "sums")}
    three, target = abi.copied(np.ones(3), np.float32), abi.copied([0, 1, 2], np.int64)
    head = native.Head(None, 0.0, 1.0)
    walk = native.Walk(*[address(three)] * 5)
    size = {"num_rows": 3, "hidden_size": 6, "stride": 6}
    words = {"first": 12, "num_words": 14, "vocab": 40, "target": address(target)}
    weight, packed, some = bf16(np.ones((40, 6))), address(out["packed"]), address(out["out"])
    rows = {"lse": address(three), "grad": address(three), "out": some}
    both = {"packed": packed, "weight": address(weight), "dtype": BF16}
    both |= {"weight_dtype": BF16, **size, **words, "head": head}
    kept = {"exps": address(out["exps"]), "tops": address(floats["tops"])}
    calls = {
        "strop_head_pack": {"hidden": address(weight), "dtype": BF16, **size, "packed": packed},
        "strop_head_walk": {**both, "walk": walk, **kept, "partial": address(floats["partial"])},
        "strop_head_grad": {**both, **rows},
        "strop_head_grad_kept": {
            **kept, "dtype": BF16, "num_rows": 3, **words, "inv_temperature": 1.0, **rows
        },
        "strop_head_turn": {"hidden": address(weight), **size, "turned": some},
        "strop_head_d_weight": {
            "d_words": packed, "turned": packed, "num_rows": 3, "hidden_size": 6, "num_words": 14,
            "weight_dtype": BF16, "d_weight": some,
        },
        "strop_head_d_hidden": {
            "d_words": packed, "weight": address(weight), "weight_dtype": BF16, **size, "num_words": 14,
            "scratch": some, "d_hidden": address(floats["sums"]),
        },
    }  # fmt: skip
    written = [*out.values(), *floats.values(), three]
    return calls, written, (weight, target, head, walk)


BAD = {
    "dtype": [(9, abi.EDTYPE), (abi.F16, abi.EDTYPE), (-1, abi.EDTYPE)],
    "weight_dtype": [(9, abi.EDTYPE), (abi.F16, abi.EDTYPE), (-1, abi.EDTYPE)],
    "num_rows": [(-1, abi.ESHAPE)],
    "hidden_size": [(0, abi.ESHAPE), (-2, abi.ESHAPE), (5, abi.ESHAPE)],
    "stride": [(5, abi.ESHAPE), (-6, abi.ESHAPE)],
    "first": [(-12, abi.ESHAPE), (5, abi.ESHAPE), (36, abi.ESHAPE)],
    "num_words": [(-1, abi.ESHAPE)],
    "vocab": [(25, abi.ESHAPE), (2**40, abi.ESHAPE)],
    "inv_temperature": [(0.0, abi.ESHAPE), (float("nan"), abi.ESHAPE)],
}
MAY_BE_NULL = {("strop_head_walk", "exps"), ("strop_head_walk", "tops"), ("strop_head_grad_kept", "target")}


@pytest.mark.parametrize("name", arguments()[0])
def test_bad_input_is_refused_in_words_and_nothing_is_written(lib, name):
    calls, written, alive = arguments()
    good = calls[name]
    outside = abi.copied([0, 40, 1], np.int64)
    bad = [(key, value, status) for key in good for value, status in BAD.get(key, [])]
    if "target" in good:
        bad.append(("target", address(outside), abi.ETARGET))
    signature = native.CPU_SIGNATURES[name]
    for key, kind in zip(good, signature):
        is_pointer = kind not in (ctypes.c_int, ctypes.c_int64, ctypes.c_float)
        if is_pointer and (name, key) not in MAY_BE_NULL:
            bad.append((key, None, abi.ENULL))
    before = [array.tobytes() for array in written]
    for key, value, status in bad:
        result = getattr(lib, name)(*{**good, key: value}.values())
        assert (key, value, result) == (key, value, status)
        assert lib.strop_error(result).decode() == WORDS[status]
    assert [array.tobytes() for array in written] == before
    assert getattr(lib, name)(*good.values()) == abi.OK
    assert [array.tobytes() for array in written] != before
    assert alive


def test_kept_exponentials_without_their_tops_are_refused(lib):
    good = arguments()[0]["strop_head_walk"]
    assert lib.strop_head_walk(*{**good, "tops": None}.values()) == abi.ENULL


# H, N, words: one; a rest of every block (32 columns, 32 tokens, 32 words, 12 and 24 rows); more words than
# are summed in registers (480 by AMX, 1,024 by AVX-512), and an odd number of them.
@pytest.mark.parametrize(
    ("size", "num_rows", "num_words"), [(2, 1, 1), (30, 31, 13), (34, 33, 25), (14, 161, 1037), (50, 7, 482)]
)
@pytest.mark.parametrize("of_weight", [BF16, F32])
def test_products_keep_to_their_memory(lib, size, num_rows, num_words, of_weight):
    """Arrays as large as strop_cpu.h says, each before a guarded page; rows apart, with NaN between them.
    A weight in fp32 lies a quarter of a bf16 step off: it is rounded to the same."""
    stride, padded, columns = size + 3, -num_rows // 32 * -32, -size // 12 * -12
    generator = np.random.default_rng(0)
    hidden, weight, d_words = (
        abi.decode(abi.encode(generator.standard_normal(shape), BF16), BF16)
        for shape in ((num_rows, size), (num_words, size), (num_words, num_rows))
    )

    def apart(values, dtype=BF16):
        matrix = abi.Matrix.of(values, dtype, stride)
        inside = matrix.raw.copy()
        matrix.flat[:] = np.nan if dtype == F32 else 0x7FC0
        matrix.raw[...] = inside
        return matrix.flat

    x, w = apart(hidden), apart(weight * (1 + 2.0**-10 * (of_weight == F32)), of_weight)
    d = bf16(np.pad(d_words, ((0, 0), (0, padded - num_rows))))
    turned = abi.guarded(padded * (-size // 32 * -32), np.uint16)
    scratch = abi.guarded((columns + padded) * (num_words + 1), np.uint16)
    d_weight, d_hidden = (
        abi.guarded(num_words * size, abi.STORAGE[of_weight]),
        abi.copied(np.ones((columns, padded)), np.float32),
    )
    at = address
    assert lib.strop_head_turn(at(x), num_rows, size, stride, at(turned)) == abi.OK
    shape = (num_rows, size, num_words, of_weight)
    assert lib.strop_head_d_weight(at(d), at(turned), *shape, at(d_weight)) == abi.OK
    shape = (of_weight, num_rows, size, stride, num_words)
    assert lib.strop_head_d_hidden(at(d), at(w), *shape, at(scratch), at(d_hidden)) == abi.OK
    right = d_words @ hidden
    found = abi.decode(d_weight, of_weight).reshape(num_words, size)
    assert np.abs(found - right).max() <= (1e-5 if of_weight == F32 else 2.0**-8) * np.abs(right).max()
    right = 1 + (d_words.T @ weight).T  # added to the ones that were there
    found = d_hidden[:size, :num_rows].astype(np.float64)
    assert np.abs(found - right).max() <= 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("of_weight", [BF16, F32])
def test_a_packed_tile_and_the_weight_end_where_they_end(lib, of_weight):
    """The walk and its gradient on operands before guarded pages, against numpy's fp64."""
    for num_rows, size, vocab in ((1, 2, 1), (5, 34, 25), (33, 30, 13)):
        generator = np.random.default_rng(vocab)
        hidden, weight = (
            abi.decode(abi.encode(generator.standard_normal(shape), BF16), BF16)
            for shape in ((num_rows, size), (vocab, size))
        )
        padded = -num_rows // 32 * -32
        x, packed = bf16(hidden), abi.guarded(padded * size, np.uint16)
        w = abi.copied(weight * (1 + 2.0**-10), np.float32) if of_weight == F32 else bf16(weight)
        target = abi.copied(np.arange(num_rows) % vocab, np.int64)
        state, partial = abi.Walk(num_rows), abi.guarded(4 * padded, np.float32)
        head, walk = (
            native.Head(None, 0.0, 1.0),
            native.Walk(
                *map(address, (state.top, state.total, state.weighted, state.plain, state.at_target))
            ),
        )
        assert lib.strop_head_pack(address(x), BF16, num_rows, size, size, address(packed)) == abi.OK
        shape = (
            address(packed),
            address(w),
            BF16,
            of_weight,
            num_rows,
            size,
            size,
            0,
            vocab,
            vocab,
            address(target),
            head,
        )
        assert lib.strop_head_walk(*shape, walk, None, None, address(partial)) == abi.OK
        z = hidden @ weight.T
        lse = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
        assert np.abs(state.lse - lse).max() <= 1e-5
        assert np.abs(state.at_target - z[np.arange(num_rows), target]).max() <= 1e-5
        out = abi.guarded(vocab * padded, np.uint16)
        lse32, ones = abi.copied(lse, np.float32), abi.copied(np.ones(num_rows), np.float32)
        assert lib.strop_head_grad(*shape, address(lse32), address(ones), address(out)) == abi.OK
        right = -np.exp(z - lse[:, None])
        right[np.arange(num_rows), target] += 1
        found = abi.decode(out, BF16).reshape(vocab, padded)
        assert np.abs(found[:, :num_rows] - right.T).max() <= 2.0**-8
        assert not found[:, num_rows:].any()
