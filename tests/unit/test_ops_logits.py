"""Log-probabilities of given logits, sums of segments, what computes, and bad arguments by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop import ops
from strop.ops import functional, native, reference
from tests.unit.ops_engines import example


def test_bad_arguments_are_named():
    x, w, target = example(3, 16, 50)
    meta = torch.empty(50, 16, device="meta")
    for bad, message in (
        ((x[0], w, target), r"hidden \(16,\) and weight \(50, 16\) must be \[N,H\] and \[V,H\]"),
        ((x, w[:, :8], target), r"hidden \(3, 16\) and weight \(50, 8\) must be"),
        ((x, w[:0], target), r"weight \(0, 16\) has no words"),
        ((x, w, target[:2]), r"target \(2,\) must be \[3\]"),
        ((x, w, target.int()), "target must be torch.int64, not torch.int32"),
        ((x.double(), w, target), "hidden is torch.float64 but weight is torch.float32"),
        ((x.long(), w.long(), target), "must be floating-point, not torch.int64"),
        ((x, meta, target), "all tensors must be on one device: hidden on cpu, weight on meta"),
        ((x, w, target, torch.zeros(49)), r"bias \(49,\) of torch.float32 must be floating-point \[50\]"),
        ((x, w, target - 50), r"targets must be in \[0, 50\), not -"),
        ((x, w, target + 50), r"targets must be in \[0, 50\), not "),
        ((x, w, target, None, 0.0), "softcap must be above 0, not 0"),
        ((x, w, target, None, None, 0.0), "temperature must be above 0, not 0"),
        ((x, w, target, None, None, float("nan")), "temperature must be above 0, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_logprob(*bad)
    with pytest.raises(ValueError, match=r"logits \(3,\) must be \[N,V\]"):
        ops.logprob(torch.zeros(3), target)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 2\)"):
        ops.logprob(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"x must be \[T\], not \(2, 2\)"):
        ops.segment_sum(torch.zeros(2, 2), torch.tensor([0, 2]))
    for edges in ([0, 2], [1, 3], [0, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 3, not"):
            ops.segment_sum(torch.zeros(3), torch.tensor(edges))
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        ops.segment_sum(torch.zeros(3), torch.tensor([0, 2, 1, 3]))
    for edges in (torch.zeros(0, dtype=torch.int32), torch.tensor([0.0, 3.0])):
        with pytest.raises(ValueError, match="cu_seqlens must be integers"):
            ops.segment_sum(torch.zeros(3), edges)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_of_given_logits(monkeypatch, backend, dtype):
    """V: one column, and around the block of 512 that a kernel works on."""
    if backend == "reference":
        monkeypatch.setattr(native, "takes", lambda x, what: False)
    for num_tokens, vocab in [(0, 7), (1, 1), (9, 77), (3, 511), (3, 512), (4, 1300)]:
        x, w, target = example(num_tokens, 16, vocab)
        logits = (x @ w.T).to(dtype).requires_grad_()
        wide = logits.detach().double().requires_grad_()
        logp, stats = ops.logprob(logits, target)
        right = torch.log_softmax(wide, 1)
        expected = right.gather(1, target[:, None])[:, 0]
        assert not (logp > 0).any()
        assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(stats.entropy.double(), -(right.exp() * right).sum(1), rtol=1e-5, atol=1e-5)
        assert torch.allclose(stats.mean_logit.double(), wide.mean(1), atol=1e-5)
        highest = wide.gather(1, target[:, None])[:, 0] >= wide.amax(1)  # in bf16 there are ties
        if dtype == torch.float32 or backend == "native":
            assert stats.correct.tolist() == highest.double().tolist()
        coefficients = torch.linspace(-1, 1, num_tokens)
        (logp * coefficients).sum().backward()
        (expected * coefficients).sum().backward()
        assert torch.allclose(logits.grad.double(), wide.grad, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_logprob_of_columns_that_are_not_contiguous():
    x, w, target = example(9, 16, 77)
    logits = (w @ x.T).T
    expected = torch.log_softmax(logits.double(), 1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ops.logprob(logits, target)[0].double(), expected, atol=1e-5)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_segment_sum(lengths):
    """Empty segments too; each element's gradient is what comes from above to its sum."""
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.arange(sum(lengths), dtype=torch.float32).mul(0.37).requires_grad_()
    sums = ops.segment_sum(x, edges)
    parts = [x.detach()[a:b].double().sum() for a, b in zip(edges[:-1], edges[1:])]
    assert torch.allclose(sums.double(), torch.stack(parts), rtol=1e-6)
    assert torch.allclose(reference.segment_sum(x.detach(), edges), sums, rtol=1e-6)
    above = torch.arange(1.0, len(lengths) + 1)
    sums.backward(above)
    assert x.grad.tolist() == above.repeat_interleave(torch.tensor(lengths)).tolist()


def test_what_computes_is_named():
    """The name goes into the key of cached reference log-probs."""
    name = functional.backend(torch.device("cpu"), torch.float32)
    assert name.startswith("native-")
    assert functional.backend(torch.device("cpu"), torch.float16) == "reference"
    assert functional.backend(torch.device("meta"), torch.float32) == "reference"
