"""strop.ops as it runs on a GPU, on the CPU: the chunk loops in Python over kernels.cu through the shim."""

from __future__ import annotations

import pytest
import torch

from strop import ops
from strop.ops import head, native
from tests.shim import heads
from tests.shim.conftest import built

DTYPES = pytest.mark.parametrize("dtype", heads.NATS, ids=str)
HEADS = pytest.mark.parametrize(
    ("with_bias", "softcap", "temperature"),
    [(False, None, 1.0), (True, None, 1.0), (False, 5.0, 0.8), (True, 5.0, 1.25)],
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's name apart: its kernels, its dtypes, no CPU kernel; chunks of about 100 words."""
    library = native._checked(built("shim"), "cuda")
    monkeypatch.setattr(native, "library", lambda device: library)
    monkeypatch.setattr(native, "head_kernel", lambda dtype: "")
    monkeypatch.setitem(native.DTYPES, "cpu", native.DTYPES["cuda"])
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 13 * 100 * 2)


def run(x, w, target, coefficients, bias, softcap, temperature, needs=(True, True, True)):
    own = [None if t is None else t.clone().requires_grad_(need) for t, need in zip((x, w, bias), needs)]
    logp, _ = ops.linear_logprob(own[0], own[1], target, own[2], softcap, temperature)
    (logp * coefficients).sum().backward()
    return logp, [None if t is None else t.grad for t in own]


@DTYPES
@HEADS
@pytest.mark.parametrize("kept", [2**20, 0], ids=["one pass", "recompute"])
def test_full_gradient(monkeypatch, dtype, with_bias, softcap, temperature, kept):
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    x, w, target = heads.example(13, 64, 777, dtype)
    bias = torch.linspace(-1, 1, 777) if with_bias else None
    coefficients, settings = torch.linspace(-1, 2, 13), (bias, softcap, temperature)
    logp, grads = run(x, w, target, coefficients, *settings)
    expected, *right = heads.truth(x, w, target, coefficients, *settings)
    heads.assert_logprobs(logp, expected, dtype)
    heads.assert_gradients(grads, right, heads.plain(x, w, target, coefficients, *settings))


@DTYPES
@HEADS
def test_frozen_head(dtype, with_bias, softcap, temperature):
    x, w, target = heads.example(13, 64, 777, dtype)
    bias = torch.linspace(-1, 1, 777) if with_bias else None
    coefficients, settings = torch.linspace(-1, 2, 13), (bias, softcap, temperature)
    logp, grads = run(x, w, target, coefficients, *settings, needs=(True, False, False))
    expected, *right = heads.truth(x, w, target, coefficients, *settings)
    heads.assert_logprobs(logp, expected, dtype)
    heads.assert_gradients(grads[:1], right, heads.plain(x, w, target, coefficients, *settings))


@DTYPES
def test_linear_loss(dtype):
    x, w, target = heads.example(12, 64, 777, dtype)
    coefficients = torch.linspace(-1, 2, 12)
    own = [t.clone().requires_grad_() for t in (x, w)]
    loss, logp, _ = ops.linear_loss(
        own[0], own[1], target, lambda part, rows: (part * coefficients[rows]).sum(), [0, 4, 8, 12]
    )
    loss.backward()
    expected, *right = heads.truth(x, w, target, coefficients)
    heads.assert_logprobs(logp, expected, dtype)
    heads.assert_gradients([t.grad for t in own], right, heads.plain(x, w, target, coefficients))


@DTYPES
def test_logprob_of_logits(dtype):
    logits = torch.randn(9, 1025, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    target = torch.arange(9) * 128
    logp, _ = ops.logprob(logits, target)
    logp.sum().backward()
    wide = logits.detach().double().requires_grad_()
    expected = heads.logprobs(wide, target, None, 1.0)
    expected.sum().backward()
    assert torch.allclose(logp.detach().double(), expected.detach(), atol=2e-5)
    assert heads.error(logits.grad, wide.grad) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_a_loss_scale_inside_keeps_an_fp16_gradient(monkeypatch):
    """Of a mean over so many tokens that fp16 has no number for it: a scale that comes later is too late."""
    x, w, target = heads.example(12, 64, 777, torch.float16)
    monkeypatch.setattr(head, "KEPT_BYTES", 5 * 777 * 2)
    small, scale = 1e-7, 2.0**16
    _, _, right, _ = heads.truth(x, w, target, torch.full((12,), small * scale))
    for inside, upstream in ((scale, 1.0), (1.0, scale)):
        own = w.clone().requires_grad_()
        fn = lambda logp, rows: logp.sum() * (small * inside)  # noqa: E731, B023
        loss, *_ = ops.linear_loss(x, own, target, fn, range(13))
        (loss * upstream).backward()
        assert (heads.error(own.grad, right) < 5e-3) == (inside == scale)


def test_fp16_runs_on_the_kernels(caplog):
    """Not on the reference, which would make the tests above say nothing about fp16."""
    x, _, _ = heads.example(2, 8, 10, torch.float16)
    assert head.engine(x, x) == "chunked"
    assert not caplog.records
