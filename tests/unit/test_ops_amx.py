"""The fused head by AMX, its tiles emulated, at the edges of its blocks; and how it is chosen and named.

Against fp64, and against what this CPU does on the same bits: only the order of fp32 sums differs. That is
AVX-512, or on a CPU with AMX the instructions that are emulated. Every operand ends where a page begins that
must not be touched, and between the weight's rows there is NaN. The accuracy goals, damaged weights, repeats
and the independence of rows are test_ops.py's, with the engine "amx".
"""

from __future__ import annotations

import logging
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from strop import ops
from strop.ops import head, native
from tests import amx
from tests.shim import abi, heads

pytestmark = pytest.mark.avx512


@pytest.fixture
def switch(monkeypatch):
    """switch(): from now on the head computes as on a CPU with AMX."""
    native.has_amx.cache_clear()

    def choose():
        native.has_amx.cache_clear()
        monkeypatch.setattr(native, "library", lambda device: amx.emulated())

    yield choose
    native.has_amx.cache_clear()


def guarded(values):
    """The same in memory whose end is guarded, NaN where values is."""
    raw = abi.copied(values.contiguous().view(torch.int16).numpy(), np.int16)
    return torch.from_numpy(raw).view(torch.bfloat16)


def with_gaps(w):
    """The words' rows, 3 elements apart and not aligned; the last one ends the memory."""
    vocab, size = w.shape
    flat = torch.full((vocab * (size + 3) - 3 + 1,), torch.nan, dtype=w.dtype)
    flat[1:].as_strided(w.shape, (size + 3, 1)).copy_(w)
    return guarded(flat)[1:].as_strided(w.shape, (size + 3, 1))


def run(x, w, target, bias, softcap, temperature, frozen):
    """Log-probs and statistics; the gradients of their weighted sum."""
    own = [x.detach().requires_grad_(), w.detach().requires_grad_(not frozen)]
    if bias is not None:
        own.append(bias.clone().requires_grad_(not frozen))
    logp, stats = ops.linear_logprob(
        own[0], own[1], target, own[2] if bias is not None else None, softcap, temperature
    )
    (logp * torch.linspace(-1, 2, len(x))).sum().backward()
    return [logp.detach(), *stats], [t.grad for t in own if t.grad is not None]


# N: one, just below and just above a tile of 32 tokens. V: below, at and above a panel of 12 words; beyond
# the two panels of a product, with a panel that is not full at the end.
# H: one step, less than a block of 32 columns, whole blocks, and blocks with a rest (898 = 28 * 32 + 2).
@pytest.mark.parametrize("hidden", [2, 30, 64, 96, 576, 898])
@pytest.mark.parametrize("keep", ["nothing", "all", "frozen"])
@pytest.mark.parametrize("how", ["plain", "bias, softcap, temperature"])
def test_amx_is_this_cpus_way_in_another_order(switch, monkeypatch, hidden, keep, how):
    monkeypatch.setattr(head, "KEPT_BYTES", 0 if keep == "nothing" else 2**30)
    cases = []
    for num_tokens in (1, 31, 33):
        for vocab in (5, 12, 13, 1000):
            x, w, target = heads.example(num_tokens, hidden, vocab, torch.bfloat16, seed=vocab)
            bias = torch.linspace(-1, 1, vocab) if how != "plain" else None
            settings = (bias, 5.0, 0.8) if how != "plain" else (None, None, 1.0)
            case = (guarded(x), with_gaps(w), target, *settings)
            cases.append((case, run(*case, keep == "frozen")))
    switch()
    for case, (right, right_grads) in cases:
        x, w, target, bias, softcap, temperature = case
        assert head.engine(x, w) == "fused"
        values, grads = run(*case, keep == "frozen")
        expected, *wide = heads.truth(x, w, target, torch.linspace(-1, 2, len(x)), bias, softcap, temperature)
        assert torch.allclose(values[0].double(), expected, rtol=1e-5, atol=1e-5)
        for value, other in zip(values, right):
            assert torch.allclose(value, other, rtol=1e-5, atol=1e-5)
        assert len(grads) == len(right_grads)
        for grad, other, exact in zip(grads, right_grads, wide):
            # the same numbers, a few of them rounded the other way to bf16
            assert float((grad - other).float().norm()) <= 2**-9 * float(exact.norm())
            assert heads.error(grad, exact) <= 2**-7


def test_the_name_tells_what_multiplies(switch):
    """Bits differ, so a reference's cached log-probs of the one are not the other's."""
    example, cpu = heads.example(33, 576, 1000, torch.bfloat16), torch.device("cpu")
    own, has_amx = ops.linear_logprob(*example)[0], native.has_amx()
    assert ops.backend(cpu, torch.bfloat16).endswith("-fused-amx" if has_amx else "-fused")
    assert ops.backend(cpu, torch.float32).endswith("-fused")
    switch()
    assert ops.backend(cpu, torch.bfloat16).endswith("-fused-amx")
    assert ops.backend(cpu, torch.float32).endswith("-fused")
    assert has_amx or not torch.equal(ops.linear_logprob(*example)[0], own)


def test_a_cpu_whose_amx_cannot_be_used_is_named_once(switch, monkeypatch, caplog):
    """The fused head stays, by AVX-512: chunks of a rounded matmul would miss the promised accuracy."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    refused = SimpleNamespace(_name="libstrop_cpu.so", strop_head_uses_amx=lambda: 0)
    native.has_avx512(torch.bfloat16)
    monkeypatch.setattr(native, "library", lambda device: refused)
    for _ in range(2):
        assert native.head_kernel(torch.bfloat16) == "avx512"
    [line] = [r.message for r in caplog.records]
    assert line.startswith("this CPU has AMX, but libstrop_cpu.so was built without it")
    switch()
    assert native.head_kernel(torch.bfloat16) == "amx"
    assert len(caplog.records) == 1


def test_the_instructions_are_where_they_belong():
    """Of the usual build: products in one function, tiles configured and released by work items only."""
    lib = native.library("cpu")
    listing = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", lib._name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    where: dict[str, set[str]] = {}
    for function in listing.split("\n\n"):
        name, _, body = function.strip().partition("\n")
        name = name.partition("<")[2].partition("(")[0].removeprefix("void ")
        for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "tilerelease"):
            if instruction in body:
                where.setdefault(instruction, set()).add(name)
    for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero"):
        assert where.pop(instruction) == {"head::amx_product"}
    items = {f"head::{item}<head::Amx>" for item in ("walk_item", "grad_item", "hidden_item")}
    items |= {f"head::weight_item<head::Amx, {out}>" for out in ("float", "unsigned short")}
    assert where == {"ldtilecfg": items, "tilerelease": items}
