"""strop.ops against fp64 formulas written out: log_softmax of whole logits, and autograd through it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop import ops
from strop.ops import reference


def example(num_tokens, hidden, vocab, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens + 7 * vocab)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    w = (torch.randn(vocab, hidden, generator=generator) * scale).to(dtype)
    target = torch.randint(vocab, (num_tokens,), generator=generator)
    return x, w, target


def truth(x, w, target, bias=None, softcap=None, temperature=1.0):
    """fp64 (log-probs with gradient, entropy, correct, mean logit)."""
    z = x @ w.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = torch.log_softmax(z, dim=1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, target[:, None])[:, 0], entropy, (z.argmax(1) == target).double(), z.mean(1)


# V: below, at and above the narrowest chunk of 256, not a multiple of it, many chunks; N: none, one, some
@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 511, 512, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize(
    ("with_bias", "softcap", "temperature"),
    [(False, None, 1.0), (True, None, 1.0), (False, 3.0, 1.0), (True, 2.0, 0.7), (False, None, 8.0)],
)
def test_linear_logprob_and_its_gradient(monkeypatch, vocab, num_tokens, with_bias, softcap, temperature):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1024)  # the narrowest chunks
    x, w, target = example(num_tokens, 16, vocab)
    bias = torch.linspace(-1, 1, vocab) if with_bias else None
    own = [v.clone().requires_grad_() if v is not None else None for v in (x, w, bias)]
    wide = [v.double().requires_grad_() if v is not None else None for v in (x, w, bias)]
    logp, stats = ops.linear_logprob(own[0], own[1], target, own[2], softcap, temperature)
    expected, *expected_stats = truth(wide[0], wide[1], target, wide[2], softcap, temperature)
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-5)
    for value, right in zip(stats, expected_stats):
        assert torch.allclose(value.double(), right, rtol=1e-5, atol=1e-5)
        assert not value.requires_grad
    coefficients = torch.linspace(-2, 3, num_tokens)
    (logp * coefficients).sum().backward()
    (expected * coefficients.double()).sum().backward()
    for a, b in zip(own, wide):
        if a is not None:
            assert torch.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_linear_logprob_with_a_frozen_side(frozen):
    """A frozen head (LoRA), or frozen hidden states: the other gradient is what it was."""
    x, w, target = example(5, 16, 300)
    full = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    ops.linear_logprob(*full, target)[0].sum().backward()
    part = [x.clone(), w.clone()]
    part[1 - frozen].requires_grad_()
    ops.linear_logprob(*part, target)[0].sum().backward()
    assert part[frozen].grad is None
    assert torch.equal(part[1 - frozen].grad, full[1 - frozen].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_linear_logprob_is_never_above_0_in_16_bits(dtype, scale):
    """Large logits whose target dominates: where an exact numerator would stand above a rounded sum."""
    x, w, _ = example(64, 64, 1000, dtype, scale)
    target = (x.float() @ w.float().T).argmax(1)  # certain tokens are where it happens
    logp, stats = ops.linear_logprob(x, w, target)
    assert float(logp.max()) <= 0.0
    assert float(stats.entropy.min()) > -1e-3
    rounded = truth(x.double(), w.double(), target)[0]
    # a logit of size z is rounded by z / 2^8 (bf16): two of them stand in a log-prob
    largest = float((x.double() @ w.double().T).abs().max())
    assert torch.allclose(logp.double(), rounded, rtol=0, atol=2 * largest / 2**8)


def test_linear_logprob_of_huge_logits_is_finite():
    x, w, target = example(4, 16, 600, scale=1e4)
    logp, stats = ops.linear_logprob(x, w, target)
    expected = truth(x.double(), w.double(), target)
    assert torch.allclose(logp.double(), expected[0], rtol=1e-5)
    assert torch.allclose(stats.entropy.double(), expected[1], atol=2e-2)


@pytest.mark.parametrize("num_tokens", [1, 5, 4096, 10**7])
def test_chunks_cover_the_vocabulary_once(num_tokens):
    for vocab in (1, 255, 256, 257, 128256):
        chunks = reference._chunks(num_tokens, vocab)
        assert [i for start, end in chunks for i in (start, end)][::2] == [
            0,
            *[end for _, end in chunks[:-1]],
        ]
        assert chunks[-1][1] == vocab
        assert all(start < end for start, end in chunks)


def test_bad_arguments_are_named():
    x, w, target = example(3, 16, 50)
    for bad, message in (
        ((x[0], w, target), r"hidden \(16,\) and weight \(50, 16\) must be \[N,H\] and \[V,H\]"),
        ((x, w[:, :8], target), r"hidden \(3, 16\) and weight \(50, 8\) must be"),
        ((x, w, target[:2]), r"target \(2,\) must be \[3\]"),
        ((x.double(), w, target), "hidden is torch.float64 but weight is torch.float32"),
        ((x, w, target - 50), r"targets must be in \[0, 50\), not -"),
        ((x, w, target + 50), r"targets must be in \[0, 50\), not "),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_logprob(*bad)
    with pytest.raises(ValueError, match="temperature must be above 0, not 0"):
        ops.linear_logprob(x, w, target, temperature=0.0)
    with pytest.raises(ValueError, match=r"x must be \[T\], not \(2, 2\)"):
        ops.segment_sum(torch.zeros(2, 2), torch.tensor([0, 2]))
    for edges in ([0, 2], [1, 3], [0, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 3, not"):
            ops.segment_sum(torch.zeros(3), torch.tensor(edges))


def test_logprob_of_given_logits():
    x, w, target = example(9, 16, 77)
    logits = (x @ w.T).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    logp, stats = ops.logprob(logits, target)
    right = torch.log_softmax(wide, 1)
    expected = right.gather(1, target[:, None])[:, 0]
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(stats.entropy.double(), -(right.exp() * right).sum(1), rtol=1e-5)
    assert torch.allclose(stats.mean_logit.double(), wide.mean(1), atol=1e-5)
    assert stats.correct.tolist() == (wide.argmax(1) == target).double().tolist()
    logp.sum().backward()
    expected.sum().backward()
    assert torch.allclose(logits.grad.double(), wide.grad, atol=1e-6)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_segment_sum(lengths):
    """Empty segments too; each element's gradient is what comes from above to its sum."""
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.arange(sum(lengths), dtype=torch.float32).mul(0.37).requires_grad_()
    sums = ops.segment_sum(x, edges)
    parts = [x.detach()[a:b].double().sum() for a, b in zip(edges[:-1], edges[1:])]
    assert torch.allclose(sums.double(), torch.stack(parts), rtol=1e-6)
    above = torch.arange(1.0, len(lengths) + 1)
    sums.backward(above)
    assert x.grad.tolist() == above.repeat_interleave(torch.tensor(lengths)).tolist()
