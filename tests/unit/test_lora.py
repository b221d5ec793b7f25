"""Adapters on single models: which layers PEFT would choose, what a frozen head costs, what dropout draws."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import torch
from test_policy import CPU, GPT2, SIZES, build, packed_batch
from transformers.pytorch_utils import Conv1D

from strop.config import LoraConfig
from strop.data.draws import token_keys
from strop.errors import UserError
from strop.models import flops, hf, lora
from strop.models.policy import Policy

LLAMA = ("llama", SIZES)
UNTIED = ("llama", SIZES | {"tie_word_embeddings": False})


def adapted(kind=UNTIED, **config):
    """A policy with adapters whose B is not 0."""
    policy = Policy(build(*kind)).eval()
    policy.adapters = lora.Adapters(policy.lm, LoraConfig(rank=3, alpha=6.0, **config))
    policy.adapters.initialise(1)
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in policy.adapters.layers.values():
            layer.lora_B.weight.normal_(std=0.2)
    policy.set_layout("packed", CPU)
    return policy


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        (UNTIED, "all-linear"),
        (LLAMA, "all-linear"),
        (("gpt2", GPT2), "all-linear"),
        (("gemma2", SIZES | {"query_pre_attn_scalar": 8}), "all-linear"),
        (UNTIED, ["q_proj", "mlp.down_proj"]),
        (UNTIED, ["lm_head", "model.layers.1.self_attn.k_proj"]),
        (UNTIED, r".*layers\.[01]\.mlp\.(up|gate)_proj"),
        (("gpt2", GPT2), ["c_attn"]),
    ],
)
def test_the_layers_are_those_that_peft_would_choose(kind, targets):
    chosen = lora.choose(build(*kind), targets)
    theirs = peft.get_peft_model(
        build(*kind), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    )
    names = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(chosen) == names
    assert len(chosen) == len(set(chosen)) > 0


@pytest.mark.parametrize("kind", [UNTIED, ("gpt2", GPT2), ("gemma2", SIZES | {"query_pre_attn_scalar": 8})])
def test_logprobs_equal_those_of_peft_with_the_same_numbers(kind):
    """By PEFT's own unmerged forward in fp64, the head among the layers where it is not tied."""
    extra = {"targets": ["lm_head", "v_proj", "o_proj"]} if kind is UNTIED else {}
    policy = adapted(kind, **extra)
    theirs = peft.get_peft_model(
        build(*kind),
        peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=list(policy.adapters.layers), task_type="CAUSAL_LM"
        ),
    )
    theirs = theirs.double().eval()
    theirs.get_base_model().set_attn_implementation("eager")  # SDPA leaves soft caps out
    numbers = {
        f"base_model.model.{n}.lora_{x}.weight": getattr(layer, f"lora_{x}").weight.detach()
        for n, layer in policy.adapters.layers.items()
        for x in "AB"
    }
    assert not peft.set_peft_model_state_dict(theirs, numbers).unexpected_keys
    batch = packed_batch()
    edges, expected = batch.cu_seqlens.tolist(), torch.zeros(len(batch.tokens_T), dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(edges[:-1], edges[1:]):
            ids = batch.tokens_T[a:b]
            logp = torch.log_softmax(theirs(input_ids=ids[None]).logits[0], -1)
            expected[a + 1 : b] = logp[:-1].gather(1, ids[1:, None])[:, 0]
        expected *= batch.trained_T
        for layout in ("packed", "padded") if kind[0] != "gemma2" else ("padded",):
            policy.set_layout(layout, CPU)
            found = policy(batch).logp_T.double()
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), layout
        with policy.adapters.off():
            without = policy(batch).logp_T.double()
    assert float((without - expected).abs().max()) > 0.1


def head_calls(policy):
    """Which of the head's operations a training step runs, and the gradients of its matrix."""
    with torch.profiler.profile() as profile:
        out = policy(packed_batch())
        out.logp_T.sum().backward()
    return {event.name for event in profile.events() if event.name.startswith("strop::head")}


def test_a_frozen_head_has_no_gradient_of_its_matrix_computed():
    """Frozen, the forward keeps (e_y - p) W and there is no backward op at all (4NHV); with an adapter on the
    head there is one. The gradient that reaches the adapters is the same whichever way it takes."""
    policy = adapted()
    assert head_calls(policy) == {"strop::head"}
    assert policy.lm.lm_head.weight.grad is None
    grads = {n: layer.lora_B.weight.grad.clone() for n, layer in policy.adapters.layers.items()}
    policy.zero_grad()
    policy.lm.lm_head.weight.requires_grad_(True)
    assert head_calls(policy) == {"strop::head", "strop::head_backward"}
    for name, layer in policy.adapters.layers.items():
        assert torch.allclose(layer.lora_B.weight.grad, grads[name], rtol=1e-4, atol=1e-5), name
    with_head = adapted(targets=["lm_head"])
    assert head_calls(with_head) == {"strop::head", "strop::head_backward"}
    assert with_head.lm.lm_head.weight.grad is None
    assert with_head.lm.lm_head.lora_A.weight.grad.any()


def test_only_adapters_and_whole_modules_have_gradients_and_the_rest_has_the_compute_type():
    lm = build(*UNTIED)
    adapters = lora.Adapters(lm, LoraConfig(rank=2, modules_to_save=["model.norm"]), torch.bfloat16)
    for name, p in hf.distinct_state(lm).items():
        trained = name == "model.norm.weight" or hf.is_adapter(name)
        assert p.requires_grad == trained
        assert p.dtype == (torch.float32 if trained else torch.bfloat16), name
    inside = 2 * (2 * (32 + 32) * 2 + 2 * (32 + 16) * 2 + 3 * 2 * (32 + 48))  # q, o; k, v; gate, up, down
    assert lora.num_trainable(lm) == inside + 32
    assert f"trainable parameters {inside + 32:,} of " in adapters.describe(lm)
    assert "LoRA on 14 layers and model.norm" in adapters.describe(lm)


@pytest.mark.parametrize(
    ("targets", "whole", "expected"),
    [
        (["q_proj", "lm_head"], ["lm_head"], r"lora\.targets: lm_head is trained whole"),
        (["q_proj"], ["q_proj"], r"lora\.targets: model\.layers\.\d\.self_attn\.q_proj is trained whole"),
        (["q_proj"], ["model"], r"lora\.targets: model\.layers\.\d\.self_attn\.q_proj is trained whole"),
        ("all-linear", ["model"], r"lora\.modules_to_save: model leaves no layer for an adapter"),
    ],
)
def test_an_adapter_that_was_asked_for_is_made_or_refused(targets, whole, expected):
    with pytest.raises(UserError, match=expected):
        lora.Adapters(build(*UNTIED), LoraConfig(rank=2, targets=targets, modules_to_save=whole))


def test_dropout_drops_its_share_of_everything_independently():
    """Shares within five standard deviations; no layer, token or feature is like another."""
    policy = adapted(dropout=0.3)
    rows, places = np.repeat(np.arange(20), 50), np.tile(np.arange(50), 20)
    masks = {}
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
    ]
    for step in (0, 1):
        draws = torch.from_numpy(token_keys(42, step, rows, places))
        for name in names:
            layer = policy.adapters.layers[name]
            dropped = lora._mixed(draws[:, None] ^ layer.feature_I) < layer._keep_from
            masks[name, step] = dropped.double()
    for mask in masks.values():
        deviation = (0.3 * 0.7 / mask.numel()) ** 0.5
        assert abs(float(mask.mean()) - 0.3) < 5 * deviation
        assert float((mask.mean(0) - 0.3).abs().max()) < 5 * (0.21 / 1000) ** 0.5
        assert float((mask.mean(1) - 0.3).abs().max()) < 6 * (0.21 / mask.shape[1]) ** 0.5
        assert len(mask.unique(dim=0)) > 990
        centred = mask - 0.3
        pairs = centred.T @ centred / 1000 - 0.21 * torch.eye(mask.shape[1])
        assert float(pairs.abs().max()) < 6 * 0.21 / 1000**0.5
    flat = [mask[:, :32].flatten() - 0.3 for mask in masks.values()]
    for i, a in enumerate(flat):
        for b in flat[:i]:
            assert abs(float((a * b).mean())) < 5 * 0.21 / 32000**0.5


def test_keys_of_tokens():
    """Seed, step, row and place all matter, and a token's key does not depend on its neighbours."""
    keys = [
        tuple(token_keys(seed, step, np.array([row, row]), np.array([0, place])).tolist())
        for seed in (0, 1, 2**63 - 1) for step in (0, 1) for row in (0, 7, 2**40) for place in (1, 2)
    ]  # fmt: skip
    assert len({second for _, second in keys}) == len(keys)
    assert len({first for first, _ in keys}) == len(keys) / 2


def test_a_layer_that_sees_other_tokens_refuses_dropout():
    policy = adapted(dropout=0.5)
    layer = policy.adapters.layers["model.layers.0.mlp.up_proj"]
    policy.adapters.draw(torch.zeros(1, 7, dtype=torch.int32))
    assert layer(torch.ones(1, 7, 32)).shape == (1, 7, 48)
    with pytest.raises(UserError, match=r"lora.dropout: model.layers.0.mlp.up_proj does not see the batch's"):
        layer(torch.ones(4, 32))
    policy.adapters.draw(None)
    assert layer(torch.ones(4, 32)).shape == (4, 48)


def test_conv1d_is_a_linear_layer_turned():
    layer = Conv1D(5, 3)
    assert lora.features(layer) == (3, 5)
    wrapped = lora.LoraLinear(layer, "x", LoraConfig(rank=2, alpha=2.0), lora._Now())
    with torch.no_grad():
        wrapped.lora_A.weight.fill_(1.0)
        wrapped.lora_B.weight.copy_(torch.arange(10.0).view(5, 2))
        x = torch.tensor([[1.0, 2.0, 4.0]])
        expected = layer(x) + 7 * torch.tensor([1.0, 5.0, 9.0, 13.0, 17.0])  # A x = (7, 7), s = 1
        assert torch.allclose(wrapped(x), expected)


def test_operations_of_a_token_with_frozen_weights(tmp_path):
    """4 for a frozen weight, 6 for a trained one; as in test_flops, a head of its own is multiplied once."""
    from strop.data.store import TokenisedRow, TokenStore

    sides = [(np.arange(n), np.arange(n) > 0) for n in (2, 6)]
    rows = iter([TokenisedRow("a", 1, sides)])
    store = TokenStore.write(tmp_path / "s", rows, kind="preference", digest="x")
    policy = adapted()
    trained = lora.num_trainable(policy.lm)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 5 * 32 + 120 * 32
    assert flops.per_token(policy.lm, store) == 4 * matrices + 6 * trained + 6 * 2 * 32 * 5


def test_a_batch_shares_keys_between_a_pair_and_its_shared_prompt(tmp_path):
    """Token by token: the same key at the same position of the row's sequences, packed either way."""
    from strop.data.batch import make_batch
    from strop.data.store import TokenisedRow, TokenStore

    prompt = np.array([5, 6, 7, 8])
    sides = [(np.append(prompt, end), np.arange(4 + len(end)) >= 4) for end in ([9, 10, 11], [12, 13])]
    rows = [TokenisedRow("a", i, sides) for i in range(3)]
    store = TokenStore.write(tmp_path / "s", iter(rows), kind="preference", digest="x")
    twice = make_batch(store, np.array([2, 0]), draw=(42, 3))
    once = make_batch(store.sharing_prompts(), np.array([0, 2]), draw=(42, 3))
    by_place = {}
    for batch, order, sizes in ((twice, (2, 0), (7, 6)), (once, (0, 2), (7, 2))):
        at = 0
        for row in order:
            for size in sizes:
                for key, place in zip(batch.draw_T[at : at + size], batch.positions_T[at : at + size]):
                    assert by_place.setdefault((row, int(place)), int(key)) == int(key)
                at += size
        assert at == len(batch.draw_T)
    assert len(set(by_place.values())) == 14
    assert make_batch(store, np.array([0])).draw_T is None
    dummy = make_batch(store, np.array([], dtype=np.int64), draw=(42, 3))
    assert dummy.draw_T.shape == dummy.tokens_T.shape
    assert dataclasses.replace(dummy, draw_T=None).to("cpu").draw_T is None
