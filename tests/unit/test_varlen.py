"""What surrounds torch's variable-length flash attention (a GPU runs it): layouts, bounds, gradients, the
switch for a fixed order, and what a model falls back on. A stand-in for the kernel does on the CPU what its
contract says."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from strop.models import attention
from strop.models.policy import Policy, probe_batch
from strop.ops import varlen
from tests import toy

CPU = torch.device("cpu")
LENGTHS = (7, 1, 30)  # one token alone; longer and shorter than the window


def one_sequence(q, k, v, scale, left, right):
    """[L, H, D], [L, K, D] -> [L, H, D]; bounds as torch has them: keys beside a query's own, -1 for none."""
    q, k, v = (x.transpose(0, 1).double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    ahead = torch.arange(q.shape[1])[None, :] - torch.arange(q.shape[1])[:, None]
    mask = ahead <= right if right >= 0 else torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        mask &= -ahead <= left
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


def every_sequence(q, k, v, cu, causal, scale, left, right):
    edges = cu.tolist()
    pieces = [
        one_sequence(q[a:b], k[a:b], v[a:b], scale, left, 0 if causal else right)
        for a, b in zip(edges, edges[1:])
    ]
    return torch.cat(pieces).to(q.dtype)


@pytest.fixture
def kernel(monkeypatch):
    """Calls noted as (causal, left, right, the switch for a fixed order)."""
    calls = []

    def note(causal, left, right, cu, cu_k, max_q, max_k):
        assert cu is cu_k
        assert max_q == max_k == int(cu.diff().max())
        assert cu.dtype == torch.int32
        calls.append((causal, left, right, torch.are_deterministic_algorithms_enabled()))

    def forward(
        q, k, v, cu, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None,
        window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        note(causal, window_size_left, window_size_right, cu, cu_k, max_q, max_k)
        assert dropout == 0.0
        out = every_sequence(q, k, v, cu, causal, scale, window_size_left, window_size_right)
        nothing = q.new_empty(0)
        return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), nothing, nothing, nothing

    def backward(
        d_out, q, k, v, out, lse, cu, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale=None,
        window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        note(causal, window_size_left, window_size_right, cu, cu_k, max_q, max_k)
        assert d_out.is_contiguous()
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = every_sequence(*leaves, cu, causal, scale, window_size_left, window_size_right)
            return torch.autograd.grad(again, leaves, d_out)

    monkeypatch.setattr(varlen, "_FORWARD", forward)
    monkeypatch.setattr(varlen, "_BACKWARD", backward)
    monkeypatch.setattr(varlen, "attends", lambda *tensors: True)
    return calls


def inputs(num_heads=4, num_kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = ((1, num_heads, total, size), *[(1, num_kv_heads, total, size)] * 2)
    # as models hand them on: heads and tokens exchanged
    tensors = [torch.randn(s[0], s[2], s[1], s[3], generator=generator).transpose(1, 2) for s in shapes]
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return [x.detach().requires_grad_() for x in tensors], cu


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_and_gradients_are_those_of_each_sequence_alone(kernel, window, scale):
    ours, cu = inputs()
    theirs, _ = inputs()
    module = torch.nn.Module()
    settings = {"scaling": scale, "sliding_window": window, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    a, _ = attention.packed_varlen(module, *ours, None, max_length_q=max(LENGTHS), **settings)
    b, _ = attention.packed_sdpa(module, *theirs, None, **settings)
    assert a.shape == b.shape
    assert torch.allclose(a, b, atol=1e-5)
    slope = torch.linspace(-1, 1, a.numel()).view(a.shape)
    (a * slope).sum().backward()
    (b * slope).sum().backward()
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.grad, y.grad, atol=1e-5)
    bounds = (True, -1, -1) if window is None else (False, window - 1, 0)
    assert kernel == [(*bounds, False), (*bounds, True)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_operations_are_sound(kernel):
    ours, cu = inputs()
    parts = [x[0].transpose(0, 1).detach().requires_grad_() for x in ours]
    torch.library.opcheck(
        torch.ops.strop.varlen.default,
        (*parts, cu, max(LENGTHS), 0.3, 0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_settings_of_the_process_survive_an_error():
    torch.utils.deterministic.fill_uninitialized_memory = True
    seen = []

    def fail():
        with varlen._fixed_order():
            fills = torch.utils.deterministic.fill_uninitialized_memory
            seen.extend((torch.are_deterministic_algorithms_enabled(), fills))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bit_floats_on_a_gpu_alone_have_the_kernel(monkeypatch, cuda, dtype):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    names = attention.implementations(torch.device("cuda" if cuda else "cpu"), dtype)
    wide = not cuda or dtype == torch.float32
    assert names == (["strop_packed"] if wide else ["strop_varlen", "flash_attention_2", "strop_packed"])


def test_a_kernel_that_fails_is_passed_over(kernel, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    monkeypatch.setattr(varlen, "_FORWARD", failing)
    monkeypatch.setattr(
        attention, "implementations", lambda device, dtype: [attention.VARLEN, attention.NAME]
    )
    model = Policy(toy.llama(100)).eval()
    monkeypatch.setattr(model, "set_layout", lambda layout, device: set_layout(model, layout))
    with caplog.at_level(logging.INFO):
        model.probe(CPU, torch.float32, "auto")
    assert (model.layout, model.attention) == ("packed", "strop_packed")
    assert "strop_varlen is not used: FlashAttention only supports Ampere GPUs or newer." in caplog.text


def set_layout(model, layout):
    """As on a GPU."""
    model.layout = layout
    model.lm.set_attn_implementation(model.attention if layout == "packed" else "sdpa")


def test_a_model_runs_with_it(kernel, monkeypatch):
    monkeypatch.setattr(
        attention, "implementations", lambda device, dtype: [attention.VARLEN, attention.NAME]
    )
    model = Policy(toy.llama(100)).eval()
    monkeypatch.setattr(model, "set_layout", lambda layout, device: set_layout(model, layout))
    model.probe(CPU, torch.float32, "packed")
    assert (model.layout, model.attention) == ("packed", "strop_varlen")
    assert not model.shares_prompts(CPU, torch.float32)
    both = probe_batch(model.lm.config.vocab_size, CPU)
    num_layers = model.lm.config.num_hidden_layers
    kernel.clear()
    packed = model(both).logp_T
    packed.sum().backward()
    assert len(kernel) == 2 * num_layers
    set_layout(model, "padded")
    assert torch.allclose(packed, model(both).logp_T, atol=1e-4)
