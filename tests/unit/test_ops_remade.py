"""Outputs of norms that a backward makes again, and calls that go past PyTorch's dispatcher: the same bits as
keeping everything and calling the registered operations."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from strop.ops import layers, linear, remade

pytestmark = pytest.mark.avx512
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _without_amx(monkeypatch):
    """A CPU with AMX computes the same; there the linear kernels are only not chosen."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def leaves(seed: int = 0) -> list[Tensor]:
    """x [5, 8], the norm's weight [8] and two matrices [6, 8]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 8), (8,), (6, 8), (6, 8))
    return [torch.randn(s, generator=generator).to(BF16).requires_grad_() for s in shapes]


def two_layers(x: Tensor, scale: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = layers.rms_norm(x, scale, 1e-6)
    return (linear.linear(y, first) * linear.linear(y, second)).sum()


def gradients(inputs: list[Tensor]) -> list[Tensor]:
    return [t.grad for t in inputs]


def test_gradients_are_those_of_a_kept_output(monkeypatch):
    remaking, keeping = leaves(), leaves()
    two_layers(*remaking).backward()
    monkeypatch.setattr(remade, "note", lambda *args: None)
    two_layers(*keeping).backward()
    for a, b in zip(gradients(remaking), gradients(keeping)):
        assert torch.equal(a, b)


def test_the_output_dies_after_its_last_layer_and_its_source_after_the_backward():
    x, scale, first, second = leaves()
    before = x * 2
    y = layers.rms_norm(before, scale, 1e-6)
    output, source = StorageWeakRef(y.untyped_storage()), StorageWeakRef(before.untyped_storage())
    out = linear.linear(y, first).sum() + linear.linear(y, second).sum()
    del y, before
    gc.collect()
    assert output.expired()
    assert not source.expired()
    out.backward()
    gc.collect()
    assert source.expired(), "the graph itself, which lives as long as `out`, holds no tensors any more"


def test_a_second_backward_through_the_same_graph():
    inputs = leaves()
    out = two_layers(*inputs)
    out.backward(retain_graph=True)
    once = [g.clone() for g in gradients(inputs)]
    out.backward()
    for a, b in zip(gradients(inputs), once):
        assert torch.equal(a, 2 * b)


def test_an_output_changed_in_place_is_kept():
    x, scale, first, _ = leaves()
    y = layers.rms_norm(x, scale, 1e-6)
    with torch.no_grad():
        changed = y.mul_(3)
    assert remade.source_of(changed) is None
    linear.linear(changed, first).sum().backward()
    exact = torch.ones(5, 6, dtype=BF16).t().double() @ changed.detach().double()
    assert torch.allclose(first.grad.double(), exact, rtol=2**-8)


def test_a_weight_that_is_freed_before_the_backward_is_not_needed():
    """As fully_shard frees those of another block."""
    x, scale, first, second = leaves()
    wanted = leaves()
    two_layers(*wanted).backward()
    gathered = scale.detach().clone()
    y = layers.rms_norm(x.detach(), gathered, 1e-6)
    out = (linear.linear(y, first) * linear.linear(y, second)).sum()
    gathered.untyped_storage().resize_(0)
    out.backward()
    assert torch.equal(first.grad, wanted[2].grad)
    assert torch.equal(second.grad, wanted[3].grad)


def test_no_weight_to_train_keeps_nothing():
    x, scale, first, _ = leaves()
    y = layers.rms_norm(x, scale, 1e-6)
    linear.linear(y, first.detach()).sum().backward()
    assert x.grad is not None
    assert first.grad is None


def everything(x: Tensor, scale: Tensor, first: Tensor, second: Tensor) -> Tensor:
    y = layers.rms_norm(x, scale, 1e-6)
    gate, up = linear.linear(y, first), linear.linear(y, second)
    down = layers.silu_mul_linear(gate, up, first.t().contiguous())
    heads = layers.rotate(down.view(1, 1, 5, 8), *torch.ones(2, 1, 5, 8, dtype=BF16).mul(0.5).unbind(0))
    return heads.sum() + layers.silu_mul(gate, up).sum()


def test_watched_and_unwatched_calls_give_the_same_bits():
    direct, watched = leaves(), leaves()
    a = everything(*direct)
    a.backward()
    with torch.profiler.profile() as profile:
        b = everything(*watched)
        b.backward()
    assert torch.equal(a, b)
    for x, y in zip(gradients(direct), gradients(watched)):
        assert torch.equal(x, y)
    seen = {event.key for event in profile.key_averages()}
    assert {"strop::rms_norm", "strop::linear", "strop::silu_mul_linear", "strop::rotate"} <= seen


def test_a_dispatch_mode_sees_the_operations():
    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Names():
        two_layers(*leaves()).backward()
    assert {"strop::rms_norm", "strop::linear", "strop::linear_d_weight"} <= seen


def test_no_second_derivative_is_claimed():
    x, _, first, _ = leaves()
    (dx,) = torch.autograd.grad(linear.linear(x, first).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
