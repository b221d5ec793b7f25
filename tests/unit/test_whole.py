"""A model that computes in bf16 with its fp32 weights, beside the same with weights rounded beforehand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from strop import parallel
from strop.config import LoraConfig
from strop.models import lora, whole
from strop.models.policy import Policy, probe_batch
from strop.models.reward import RewardModel, scoring_config

BF16 = torch.bfloat16
CPU = torch.device("cpu")
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 97}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}
WHOLE = {
    "tied": LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False),
    "biases": Qwen2Config(**SIZES, **HEADS),
    "norms of heads": Qwen3Config(**SIZES, **HEADS, head_dim=16),
    "other norms": Olmo2Config(**SIZES, **HEADS),
    "layer norms": PhiConfig(**SIZES, **HEADS),
    "one matrix for q, k and v": GPTNeoXConfig(**SIZES, num_attention_heads=3),
}
LEFT = {
    "Conv1D": GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=97),
    "scaled embedding": Gemma2Config(**SIZES, **HEADS, head_dim=16),
}


def build(config) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        if p.ndim < 2:  # scales of 1 and biases of 0 would hide much
            nn.init.normal_(p, mean=float(p.detach().mean()), std=0.3)
    policy = Policy(model).eval()
    policy.set_layout("padded", CPU)
    return policy


def step(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp_T = policy(probe_batch(97, CPU)).logp_T
    logp_T.sum().backward()
    return logp_T.detach(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("kind", WHOLE)
def test_numbers_are_those_of_rounded_weights(kind, head):
    rounded, ours = build(WHOLE[kind]), build(WHOLE[kind])
    for p in rounded.parameters():
        p.data = p.data.to(BF16)
    assert whole.install(ours, BF16, CPU)
    exact = build(WHOLE[kind])
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.to(BF16))
    exact.lm.double()
    for policy in (rounded, ours, exact):
        policy.head = head
    logp, grads = step(rounded)
    found, found_grads = step(ours)
    _, exact_grads = step(exact)
    # The model's own head is torch's matmul in the one and a kernel in the other; only a matrix is rounded.
    if head == "fused" and ours.lm.get_output_embeddings().bias is None:
        assert torch.equal(found, logp)
    torch.testing.assert_close(found, logp, atol=0.02, rtol=0.02)
    assert found_grads.keys() == grads.keys()
    for name, grad in found_grads.items():
        assert grad.dtype == torch.float32
        right = exact_grads[name].double()
        error, of_rounded = ((g.double() - right).norm() for g in (grad, grads[name]))
        assert error <= 1.15 * of_rounded + 1e-3 * right.norm(), name


@pytest.mark.parametrize("kind", LEFT)
def test_other_models_are_left_as_they_are(kind):
    policy, untouched = build(LEFT[kind]), build(LEFT[kind])
    before = [set(vars(m)) for m in untouched.modules()]
    assert not whole.install(policy, BF16, CPU)
    assert [set(vars(m)) for m in policy.modules()] == before
    assert torch.equal(step(policy)[0], step(untouched)[0])


@pytest.mark.parametrize("kind", [*WHOLE, *LEFT])
def test_modules_tell_which_without_a_forward(kind):
    """As the doctor asks: on "meta", in the type that the config names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config((WHOLE | LEFT)[kind], dtype=BF16)
    assert whole.is_known(model) == (kind in WHOLE)


class GoesByItsWeight(nn.Module):
    """As a router that works in its weight's type, whatever is asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Linear(48, 48)

    def forward(self, x):
        return self.inner(x) + self.gate(x.to(self.gate.weight.dtype)).to(x.dtype)


class TakesItsWeight(GoesByItsWeight):
    def forward(self, x):
        return self.inner(x) + F.linear(x, self.gate.weight)


@pytest.mark.parametrize("kind", [GoesByItsWeight, TakesItsWeight])
def test_code_that_goes_by_the_weights_is_found(kind):
    policy = build(WHOLE["tied"])
    policy.lm.model.layers[1].mlp = kind(policy.lm.model.layers[1].mlp)
    before = [set(vars(m)) for m in policy.modules()]
    assert not whole.install(policy, BF16, CPU)
    assert [set(vars(m)) for m in policy.modules()] == before


def test_weights_need_no_values():
    policy = build(WHOLE["tied"])
    with torch.no_grad():
        for p in policy.parameters():
            p.fill_(torch.nan)
    assert whole.install(policy, BF16, CPU)


def test_frozen_weights_and_adapters_are_left():
    policy = build(WHOLE["tied"])
    policy.lm.model.norm.weight.requires_grad_(False)
    assert not whole.install(policy, BF16, CPU)
    policy = build(WHOLE["tied"])
    policy.adapters = lora.Adapters(policy.lm, LoraConfig(rank=2), BF16)
    assert not whole.install(policy, BF16, CPU)
    assert not whole.install(policy, torch.float32, CPU)


def test_fp32_needs_nothing():
    policy = build(LEFT["Conv1D"])
    before = [set(vars(m)) for m in policy.modules()]
    assert whole.install(policy, torch.float32, CPU)
    assert [set(vars(m)) for m in policy.modules()] == before


def test_a_reward_model_computes_in_bf16():
    torch.manual_seed(0)
    config = scoring_config(LlamaConfig(**SIZES, **HEADS), "model")
    model = RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).eval()
    assert whole.install(model, BF16, CPU)
    scores = model(probe_batch(97, CPU))
    assert torch.equal(scores.hidden_SH, scores.hidden_SH.to(BF16).float())
    for p in model.parameters():
        p.data = p.data.to(BF16).float()
    assert torch.equal(model(probe_batch(97, CPU)).score_S, scores.score_S)


@pytest.mark.parametrize("kind", ["tied", "biases", "layer norms"])
def test_blocks_can_be_compiled(kind):
    plain, compiled = build(WHOLE[kind]), build(WHOLE[kind])
    for policy in (plain, compiled):
        assert whole.install(policy, BF16, CPU)
    for _, _, block in parallel.transformer_blocks(compiled.lm):
        block.compile(backend="aot_eager")
    logp, grads = step(plain)
    found, found_grads = step(compiled)
    assert torch.equal(found, logp)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, atol=1e-3, rtol=0.02)
