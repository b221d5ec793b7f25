"""What `models.fused` exchanges in a model, module by module, and what torch.compile and hooks see of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from strop.models import attention, fused
from strop.ops import native

pytestmark = pytest.mark.avx512
BF16 = torch.bfloat16


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    """The rotary function is a module's: other tests get it back as it was. Linear layers as without AMX."""
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", getattr(own, "__wrapped__", own))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    torch._dynamo.reset()


@pytest.fixture
def called(monkeypatch):
    """Names of the C functions called from here on."""
    names: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (names.append(name), call(name, *rest))[1])
    return names


class Gated(nn.Module):
    def __init__(self, act_fn, size=8, inner=12):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(inner, size, bias=False), act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    def __init__(self, added):
        super().__init__()
        self.weight, self.eps, self.added = nn.Parameter(random(8, seed=1)), 1e-6, added

    def forward(self, x):
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.added + self.weight) * normalised.to(x.dtype)


class CountsFromOne(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class Odd(nn.Module):
    """An MLP with the parts of a gated one, put together in another way."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def test_what_only_looks_alike_keeps_its_own_code():
    norm, mlp = CountsFromOne(8), Odd()
    x = random(2, 8)
    before = norm(x), mlp(x[:, :4])
    fused.install(nn.Sequential(norm, mlp))
    assert "forward" not in vars(norm)
    assert "forward" not in vars(mlp)
    assert torch.equal(norm(x), before[0])
    assert torch.equal(mlp(x[:, :4]), before[1])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_of_one_class_may_differ(order):
    x = random(1, 3, 8)
    for pair in ([Gated(nn.SiLU()), Gated(nn.GELU())], [Norm(0.0), Norm(1.0)]):
        wanted = [module(x) for module in pair]
        fused.install(nn.Sequential(*(pair[i] for i in order)))
        assert ["forward" in vars(module) for module in pair] == [True, False]
        for module, right in zip(pair, wanted, strict=True):
            torch.testing.assert_close(module(x), right)


def test_a_forward_that_somebody_has_set_stays():
    linear, norm = nn.Linear(8, 8), Norm(0.0)
    linear.forward = norm.forward = lambda x: x + 1
    fused.install(nn.Sequential(linear, norm))
    assert torch.equal(norm(linear(torch.zeros(8))), torch.full((8,), 2.0))


def test_trials_draw_no_random_numbers_and_run_no_hooks():
    model = nn.Sequential(Gated(nn.SiLU()), Norm(0.0))
    for module in model:
        module.register_forward_hook(lambda *_: pytest.fail("a trial is no forward"))
    state = torch.get_rng_state()
    fused.install(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all("forward" in vars(module) for module in model)


HOOKS = {
    "register_forward_hook": lambda module, args, out: 2 * out,
    "register_forward_pre_hook": lambda module, args: (2 * args[0],),
    "register_full_backward_hook": lambda module, d_in, d_out: (2 * d_in[0],),
    "register_full_backward_pre_hook": lambda module, d_out: (2 * d_out[0],),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["down_proj", "act_fn", "gate_proj"])
def test_hooks_of_parts_run(kind, part):
    def run(module):
        getattr(getattr(module, part), kind)(HOOKS[kind])
        x = random(1, 3, 8).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in module.parameters())]

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Gated(nn.SiLU()))
    fused.install(models[1])
    for found, wanted in zip(run(models[1]), run(models[0]), strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_own_forward_of_the_last_part_runs():
    model = Gated(nn.SiLU())
    fused.install(model)
    model.down_proj.forward = lambda x: x.sum(-1)
    assert model(random(1, 3, 8)).shape == (1, 3)


# ---- Roundings


def test_llamas_rotary_embedding_is_as_exact_in_bf16():
    q, k = random(1, 4, 50, 64), random(1, 2, 50, 64, seed=1)
    angles = random(1, 50, 32, seed=2).repeat(1, 1, 2)
    inputs = [x.to(BF16) for x in (q, k, angles.cos(), angles.sin())]
    own = modeling_llama.apply_rotary_pos_emb
    exact = own(*(x.double() for x in inputs))
    fused._install_rotary(modeling_llama)
    assert modeling_llama.apply_rotary_pos_emb is not own
    for ours, theirs, right in zip(
        modeling_llama.apply_rotary_pos_emb(*inputs), own(*inputs), exact, strict=True
    ):
        assert distance(ours, right) <= 1.05 * distance(theirs, right)


@pytest.mark.parametrize(("kind", "exchanged"), [(modeling_llama.LlamaRMSNorm, True), (Olmo2RMSNorm, False)])
def test_norms_are_as_exact_in_bf16(kind, exchanged):
    """Llama's rounds the normalised row before the weight, as the kernel does; Olmo's rounds once."""
    plain, ours = kind(96).to(BF16), kind(96).to(BF16)
    x = random(1, 50, 96, dtype=BF16)
    for norm in (plain, ours):
        norm.weight.data.copy_(random(96, seed=1))
    fused.install(nn.Sequential(ours))
    assert ("forward" in vars(ours)) == exchanged
    wide = x.double()
    exact = plain.weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert distance(ours(x), exact) <= 1.05 * distance(plain(x), exact)


# ---- Attention


def test_values_of_another_size_than_queries_go_to_torch(called):
    """DeepSeek's: the key has the rotary part beside what the value has."""
    config = DeepseekV2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=97, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=attention.NAME)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    tokens = torch.randint(0, 97, (1, 8))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    logits = model(tokens, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False).logits
    assert "strop_attend" not in called
    model.set_attn_implementation("eager")
    for part in (slice(0, 3), slice(3, 8)):
        alone = model(tokens[:, part], use_cache=False).logits
        torch.testing.assert_close(logits[:, part], alone, atol=2e-2, rtol=2e-2)


# ---- torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_compiling_finds_no_break_and_calls_the_kernels(dtype, called):
    torch.manual_seed(0)
    model = nn.Sequential(Norm(0.0), Gated(nn.SiLU()), nn.Linear(8, 4)).to(dtype)
    x = random(1, 3, 8, dtype=dtype)
    fused.install(model)
    wanted = model(x)
    expected = called.copy()
    called.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    assert called == expected != []


def test_install_adds_no_breaks_to_a_block():
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, vocab_size=97, head_dim=16,
        num_attention_heads=3, num_key_value_heads=1, attn_implementation=attention.NAME,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    x, positions = random(1, 8, 48, dtype=BF16), torch.arange(8)[None]
    cu = torch.tensor([0, 8], dtype=torch.int32)

    def num_graphs():
        torch._dynamo.reset()
        angles = model.model.rotary_emb(x, positions)
        return torch._dynamo.explain(model.model.layers[0])(
            x, position_embeddings=angles, cu_seq_lens_q=cu, cu_seq_lens_k=cu
        ).graph_count

    before = num_graphs()
    fused.install(model)
    assert num_graphs() <= before
