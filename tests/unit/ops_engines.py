"""The engines of linear_logprob that this machine has, and the truth in fp64.

The engines: "fused" and "chunked" native kernels, "amx" (fused, with AMX's tiles emulated), "wide" (chunked
with fp32 logits of 16-bit matrices, as on a GPU; here an fp32 matmul stands for its matmul), and "reference";
all must agree with the same truth.
"""

from __future__ import annotations

import torch

from strop.ops import head, native, reference
from tests import amx

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "softcap": 2.0, "temperature": 0.7},
    "temperature": {"temperature": 8.0},
}
ENGINES = {
    torch.float32: ["reference", "chunked"],
    torch.bfloat16: ["reference", "chunked", "wide"],
}
for _dtype, _names in ENGINES.items():
    if native.head_kernel(_dtype):
        _names.append("fused")
if native.head_kernel(torch.bfloat16):
    ENGINES[torch.bfloat16].append("amx")
FUSED = ("fused", "amx")
CASES = [(dtype, name) for dtype, names in ENGINES.items() for name in names]


def choose(monkeypatch, engine, keep="all"):
    """From now on linear_logprob computes like that, in the narrowest chunks."""
    if engine == "wide":
        monkeypatch.setattr(head, "_is_wide", lambda hidden: True)
        monkeypatch.setattr(
            head, "_multiply", lambda hidden, words: hidden.float() @ words.to(hidden.dtype).float().t()
        )
    if engine == "amx":
        monkeypatch.setattr(native, "library", lambda device: amx.emulated())
    name = {"wide": "chunked", "amx": "fused"}.get(engine, engine)
    monkeypatch.setattr(head, "engine", lambda hidden, weight: name)
    monkeypatch.setattr(head, "KEPT_BYTES", 2**40 if keep == "all" else -1)
    monkeypatch.setattr(head, "CPU_WORDS", 24)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1024)


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


def options(kind, vocab):
    given = dict(HEADS[kind])
    if given.pop("bias", False):
        given["bias"] = torch.linspace(-1, 1, vocab)
    return given


def plain_and_compiled(loss, x, w):
    """Value and gradients by x and w of loss(x, w), as it is and by torch.compile without a graph break."""
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    return results
