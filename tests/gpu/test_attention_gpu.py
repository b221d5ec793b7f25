"""Packed attention on an NVIDIA GPU, against fp64 on the CPU: what the stand-in of tests/unit/test_varlen.py
promises of torch's kernel."""

from __future__ import annotations

import pytest
import torch

from strop.models import attention, policy
from strop.models.policy import Policy
from strop.ops import varlen
from tests import toy
from tests.unit.test_varlen import LENGTHS, every_sequence

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def inputs(dtype, size=64, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, size) for heads in (4, 2, 2)]
    tensors = [torch.randn(s, generator=generator).to(DEVICE, dtype).transpose(1, 2) for s in shapes]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    return [x.detach().requires_grad_() for x in tensors], cu


def slope_of(out):
    return torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 5])
def test_values_and_gradients(dtype, size, window):
    tensors, cu = inputs(dtype, size)
    assert varlen.attends(*tensors)
    out = varlen.attention(*tensors, cu, max(LENGTHS), None, window)
    out.backward(slope_of(out))
    wide = [x.detach().cpu().double()[0].transpose(0, 1).requires_grad_() for x in tensors]
    left = -1 if window is None else window - 1
    expected = every_sequence(*wide, cu.cpu(), window is None, size**-0.5, left, 0)
    expected.backward(slope_of(out)[0].cpu().double())
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    assert (out[0].cpu().double() - expected).norm() < tolerance * expected.norm()
    for x, right in zip(tensors, wide):
        found = x.grad[0].transpose(0, 1).cpu().double()
        assert (found - right.grad).norm() < tolerance * right.grad.norm()


def test_same_bits_again_and_no_waiting():
    """Long enough for several blocks of keys to add to one query's gradient."""
    tensors, cu = inputs(torch.bfloat16, lengths=(2000, 3000, 700))

    def gradients():
        for x in tensors:
            x.grad = None
        out = varlen.attention(*tensors, cu, 3000)
        out.backward(slope_of(out))
        return [x.grad for x in tensors]

    first = gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [gradients() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for grads in again for a, b in zip(first, grads))


def test_a_model_takes_it_and_its_forward_does_not_wait():
    model = Policy(toy.llama(512)).eval().to(DEVICE, torch.bfloat16)
    model.probe(DEVICE, torch.bfloat16, "packed")
    assert (model.layout, model.attention) == ("packed", attention.VARLEN)
    batch = policy.probe_batch(512, DEVICE)
    known = batch.trained_T.nonzero()[:, 0]
    batch = policy.dataclasses.replace(batch, known_N=known)
    model(batch).logp_T.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).logp_T.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
