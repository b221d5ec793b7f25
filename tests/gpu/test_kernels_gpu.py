"""strop.ops on an NVIDIA GPU, against fp64 on the CPU. The C interface's own tests run there too: tests/shim.

What only a device can show: streams, no waiting for it, memory, and the same bits again.
"""

from __future__ import annotations

import pytest
import torch

from strop import ops
from tests.shim import heads

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", heads.NATS, ids=str)


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def example(num_tokens, hidden, vocab, dtype):
    return heads.example(num_tokens, hidden, vocab, dtype, DEVICE)


# one token; not a multiple of anything; more words than a chunk has
@DTYPES
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 1000), (37, 1025), (300, 50001)])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (5.0, 0.8)])
def test_linear_logprob(dtype, num_tokens, vocab, softcap, temperature):
    x, w, target = example(num_tokens, 256, vocab, dtype)
    coefficients = torch.linspace(-1, 2, num_tokens, device=DEVICE)
    own = [t.clone().requires_grad_() for t in (x, w)]
    logp, _ = ops.linear_logprob(own[0], own[1], target, None, softcap, temperature)
    (logp * coefficients).sum().backward()
    settings = (None, softcap, temperature)
    expected, *right = heads.truth(x, w, target, coefficients, *settings)
    heads.assert_logprobs(logp, expected, dtype)
    plains = heads.plain(x, w, target, coefficients, *settings)
    heads.assert_gradients([t.grad for t in own], right, plains)


@DTYPES
def test_frozen_head(dtype):
    x, w, target = example(64, 256, 20001, dtype)
    coefficients = torch.linspace(-1, 2, 64, device=DEVICE)
    own = x.clone().requires_grad_()
    (ops.linear_logprob(own, w, target)[0] * coefficients).sum().backward()
    _, *right = heads.truth(x, w, target, coefficients)
    heads.assert_gradients([own.grad], right, heads.plain(x, w, target, coefficients))


@DTYPES
def test_linear_loss_is_the_loss_of_linear_logprob(dtype):
    x, w, target = example(96, 256, 20001, dtype)
    coefficients = torch.linspace(-1, 2, 96, device=DEVICE)
    own = [t.clone().requires_grad_() for t in (x, w)]
    loss, logp, _ = ops.linear_loss(
        own[0], own[1], target, lambda part, rows: (part * coefficients[rows]).sum(), [0, 32, 64, 96]
    )
    loss.backward()
    expected, *right = heads.truth(x, w, target, coefficients)
    heads.assert_logprobs(logp, expected, dtype)
    heads.assert_gradients([t.grad for t in own], right, heads.plain(x, w, target, coefficients))


@DTYPES
@pytest.mark.parametrize("vocab", [1000, 1025])
def test_logprob_of_logits(dtype, vocab):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(50, vocab, generator=generator) * 3).to(dtype).to(DEVICE).requires_grad_()
    target = torch.randint(vocab, (50,), generator=generator).to(DEVICE)
    logp, stats = ops.logprob(logits, target)
    logp.sum().backward()
    wide = logits.detach().cpu().double().requires_grad_()
    full = torch.log_softmax(wide, 1)
    picked = full.gather(1, target.cpu()[:, None])[:, 0]
    picked.sum().backward()
    assert torch.allclose(logp.detach().cpu().double(), picked.detach(), atol=2e-5)
    assert torch.allclose(stats.entropy.cpu().double(), -(full.exp() * full).sum(1).detach(), atol=1e-4)
    assert heads.error(logits.grad, wide.grad) < {torch.float32: 1e-5}.get(dtype, 4e-3)


def test_segments_and_pairs():
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([3, 0, 700, 1, 0, 1200])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(DEVICE)
    x = torch.randn(int(lengths.sum()), generator=generator).to(DEVICE).requires_grad_()
    sums = ops.segment_sum(x, cu_seqlens)
    expected = torch.stack([part.sum() for part in x.detach().cpu().double().split(lengths.tolist())])
    assert torch.allclose(sums.detach().cpu().double(), expected, rtol=1e-6, atol=1e-5)
    (sums * torch.arange(6, device=DEVICE)).sum().backward()
    assert (x.grad.cpu() == torch.arange(6.0).repeat_interleave(lengths)).all()
    ratio = torch.randn(300, 2, generator=generator).to(DEVICE).requires_grad_()
    loss = ops.dpo_loss(ratio, "sigmoid", 0.3, 0.1)
    loss.sum().backward()
    wide = ratio.detach().cpu().double().requires_grad_()
    margin = 0.3 * (wide[:, 0] - wide[:, 1])
    right = -0.9 * torch.nn.functional.logsigmoid(margin) - 0.1 * torch.nn.functional.logsigmoid(-margin)
    right.sum().backward()
    assert torch.allclose(loss.detach().cpu().double(), right.detach(), rtol=1e-5)
    assert torch.allclose(ratio.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-7)


def gradients(x, w, target):
    own = [t.clone().requires_grad_() for t in (x, w)]
    logp, stats = ops.linear_logprob(own[0], own[1], target)
    logp.square().sum().backward()
    return [logp.detach(), *stats, own[0].grad, own[1].grad]


@DTYPES
def test_same_bits_again(dtype):
    x, w, target = example(200, 256, 50001, dtype)
    first = gradients(x, w, target)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(x, w, target)))


@DTYPES
def test_rows_in_another_order(dtype):
    x, w, target = example(200, 256, 50001, dtype)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with torch.no_grad():
        logp, _ = ops.linear_logprob(x, w, target)
        moved, _ = ops.linear_logprob(x[order], w, target[order])
    assert torch.equal(logp[order], moved)


def test_nothing_waits_for_the_device():
    """A copy to the host inside forward or backward would raise here."""
    x, w, target = example(128, 256, 20001, torch.bfloat16)
    gradients(x, w, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(x, w, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    """The kernels run on the current stream: behind work that is still under way there."""
    x, w, target = example(128, 256, 20001, torch.bfloat16)
    expected = ops.linear_logprob(x, w, target)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        logp, _ = ops.linear_logprob(late, w, target)
    stream.synchronize()
    assert torch.equal(logp, expected)


def test_memory_does_not_grow_with_the_vocabulary():
    """Log-probs only: at most 256 MiB of work space where the logits would take 2 GiB."""
    x, w, target = example(8192, 128, 131072, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        ops.linear_logprob(x, w, target)
    assert torch.cuda.max_memory_allocated() - before <= 300 * 2**20


def test_a_target_outside_the_vocabulary_gives_nan_in_its_row():
    x, w, target = example(8, 64, 1000, torch.bfloat16)
    target[3] = 1000
    logp, _ = ops.linear_logprob(x, w, target)
    assert torch.isnan(logp).tolist() == [False, False, False, True, False, False, False, False]


def test_compiled_in_one_graph():
    x, w, target = example(64, 128, 5000, torch.bfloat16)
    own = [t.clone().requires_grad_() for t in (x, w)]

    @torch.compile(fullgraph=True)
    def loss(x, w, target):
        return ops.linear_logprob(x, w, target)[0].square().sum()

    loss(own[0], own[1], target).backward()
    again = gradients(x, w, target)
    assert torch.equal(own[0].grad, again[-2])
    assert torch.equal(own[1].grad, again[-1])


def test_no_tokens():
    x, w, target = example(0, 64, 1000, torch.bfloat16)
    results = gradients(x, w, target)
    assert results[0].shape == (0,)
    assert not results[-1].any()


def test_tensors_on_different_devices_are_refused():
    x, w, target = example(4, 64, 100, torch.bfloat16)
    with pytest.raises(ValueError, match="device"):
        ops.linear_logprob(x, w.cpu(), target)
    with pytest.raises(ValueError, match="device"):
        ops.linear_logprob(x, w, target.cpu())
