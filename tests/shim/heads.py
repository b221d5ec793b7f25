"""A language model's head in fp64, and as plain PyTorch computes it: what strop.ops is compared with."""

from __future__ import annotations

import torch

NATS = {torch.float32: 2e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Mean error of a token's log-prob that is allowed; 16-bit logits are rounded."""


def example(num_tokens, hidden, vocab, dtype, device="cpu", seed=0):
    """(hidden states [N,H], weight [V,H], target [N])."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    w = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(dtype)
    target = torch.randint(vocab, (num_tokens,), generator=generator)
    return x.to(device), w.to(device), target.to(device)


def logprobs(z, target, softcap, temperature):
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, 1).gather(1, target[:, None])[:, 0]


def truth(x, w, target, coefficients, bias=None, softcap=None, temperature=1.0):
    """fp64 on the CPU: log-probs, and the gradients of their weighted sum by x, w and bias."""
    inputs = (x, w, torch.zeros(len(w)) if bias is None else bias)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    logp = logprobs(wide[0] @ wide[1].T + wide[2], target.cpu(), softcap, temperature)
    (logp * coefficients.cpu().double()).sum().backward()
    return logp.detach(), *(t.grad for t in wide)


def plain(x, w, target, coefficients, bias=None, softcap=None, temperature=1.0):
    """The gradients by x, w and bias in x's dtype; ours may err at most twice as much."""
    inputs = (x, w, torch.zeros(len(w), device=x.device) if bias is None else bias)
    own = [t.detach().clone().requires_grad_() for t in inputs]
    logp = logprobs((own[0] @ own[1].T).float() + own[2].float(), target, softcap, temperature)
    (logp * coefficients).sum().backward()
    return [t.grad for t in own]


def error(value, expected):
    """Relative, of the whole tensor."""
    return ((value.detach().cpu().double() - expected).norm() / expected.norm()).item()


def assert_logprobs(logp, expected, dtype):
    off = (logp.detach().cpu().double() - expected).abs()
    assert (logp <= 0).all()
    assert off.max() < 3 * NATS[dtype]
    assert off.mean() < NATS[dtype]


def assert_gradients(grads, right, plains):
    for own, expected, simple in zip(grads, right, plains):
        if own is not None:
            assert error(own, expected) <= 2 * error(simple, expected) + 1e-6
