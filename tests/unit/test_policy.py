"""Architectures through `Policy`: log-probs of a packed batch against the model's own logits in fp64.

Tiny random models of each kind, with a large initializer range: else all sequences look alike to them, and
neither a leak between sequences nor a wrong window would show. What may stand side by side (packed) and where
the head is a plain matrix (fused) is stated per architecture; on every path the numbers must
be right.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from strop.data.batch import Batch
from strop.errors import Diverged, UserError
from strop.models import attention, policy
from strop.models.policy import PROBE_TOLERANCE, Policy

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.3, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

ARCHITECTURES = [
    ("llama", SIZES, "packed", "fused"),
    ("qwen2", SIZES, "packed", "fused"),
    ("qwen3", SIZES, "packed", "fused"),
    ("mistral", SIZES | {"sliding_window": 4}, "packed", "fused"),
    ("phi3", SIZES | {"sliding_window": 5}, "packed", "fused"),
    ("gemma2", SIZES | {"sliding_window": 4, "query_pre_attn_scalar": 8}, "padded", "fused"),
    ("gemma3_text", SIZES | {"sliding_window": 4, "query_pre_attn_scalar": 8}, "packed", "fused"),
    ("cohere", SIZES | {"logit_scale": 0.25}, "packed", "fused"),
    ("granite", SIZES | {"logits_scaling": 8.0, "residual_multiplier": 0.5}, "packed", "fused"),
    ("gpt2", GPT2, "packed", "fused"),
    ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}, None, "fused"),
    ("bloom", {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
     "padded", "fused"),
    ("mamba", {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
               "initializer_range": 0.3}, "padded", "fused"),
]  # fmt: skip


def build(kind, sizes, seed=0):
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
    lm.config.use_cache = False
    return lm


def packed_batch(lengths=(9, 1, 14, 23, 2), vocab=120, seed=3):
    """Sequences of unlike lengths, some longer than the windows above; a third of the tokens is trained."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    trained = (torch.rand(sum(lengths), generator=generator) < 0.4) & (positions > 0)
    return Batch(
        tokens_T=torch.randint(3, vocab, (sum(lengths),), generator=generator),
        positions_T=positions,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        trained_T=trained,
        rows=np.arange(len(lengths)),
        max_seqlen=max(lengths),
    )


def own_logprobs(lm, batch):
    """fp64 log-probs [T] by the model alone: each sequence by itself, its own logits, its own attention."""
    lm = lm.double()
    lm.set_attn_implementation("eager")
    out = torch.zeros(len(batch.tokens_T), dtype=torch.float64)
    edges = batch.cu_seqlens.tolist()
    with torch.no_grad():
        for a, b in zip(edges[:-1], edges[1:]):
            ids = batch.tokens_T[a:b]
            logp = torch.log_softmax(lm(input_ids=ids[None]).logits[0].double(), -1)
            out[a + 1 : b] = logp[:-1].gather(1, ids[1:, None])[:, 0]
    return out * batch.trained_T


@pytest.mark.parametrize(
    ("kind", "sizes", "layout", "head"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES]
)
def test_logprobs_equal_the_models_own(kind, sizes, layout, head):
    lm = build(kind, sizes)
    model = Policy(lm).eval()
    model.probe(CPU, torch.float32, "auto")
    if layout is not None:
        assert model.layout == layout
    assert model.head == head
    batch = packed_batch()
    ours = {}
    for chosen in {model.layout, "padded"}:
        model.set_layout(chosen, CPU)
        with torch.no_grad():
            ours[chosen] = model(batch).logp_T.double()
    expected = own_logprobs(lm, batch)
    assert float(expected.abs().max()) > 5  # the model is no uniform guesser
    for chosen, logp in ours.items():
        assert torch.allclose(logp, expected, rtol=1e-4, atol=1e-3), chosen


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_neighbour_changes_nothing(kind):
    """Bit for bit: one sequence beside different neighbours of the same lengths."""
    sizes = next(s for k, s, *_ in ARCHITECTURES if k == kind)
    model = Policy(build(kind, sizes)).eval()
    model.set_layout("packed", CPU)
    one, other = packed_batch(seed=3), packed_batch(seed=4)
    middle = slice(10, 24)
    tokens, trained = other.tokens_T.clone(), one.trained_T
    tokens[middle] = one.tokens_T[middle]
    with torch.no_grad():
        a = model(one).logp_T[middle]
        b = model(dataclasses.replace(other, tokens_T=tokens, trained_T=trained)).logp_T[middle]
    assert torch.equal(a, b)
    assert bool(a.any())


def leaking(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Causal over the whole pack: what a model that ignores the bounds does."""
    if cu_seq_lens_q is not None:
        cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    whole = {"cu_seq_lens_q": cu_seq_lens_q}
    return attention.packed_sdpa(module, query, key, value, attention_mask, scaling, **whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
def test_the_probe_tells_a_leak_from_rounding(monkeypatch, caplog, kind, dtype):
    """Honest attention stays below a third of the tolerance, leaking attention is above it threefold."""
    sizes = next(s for k, s, *_ in ARCHITECTURES if k == kind)
    model = Policy(build(kind, sizes).to(dtype)).eval()
    both = policy.probe_batch(sizes["vocab_size"], CPU)
    model.head = "logits"
    model.set_layout("padded", CPU)
    with torch.no_grad():
        truth = torch.cat([model(one).logp_T for one in policy.each_sequence(both)])
        model.set_layout("packed", CPU)
        honest = float((model(both).logp_T - truth).abs().sum() / both.trained_T.sum())
        monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaking)
        leak = float((model(both).logp_T - truth).abs().sum() / both.trained_T.sum())
    assert 3 * honest < PROBE_TOLERANCE[dtype] < leak / 3, (honest, leak)
    with caplog.at_level(logging.WARNING):
        model.probe(CPU, dtype, "auto")
    assert model.layout == "padded"
    assert "sequences side by side see each other" in caplog.text
    with pytest.raises(UserError, match=r"model\.attention: packed does not work for .* see each other"):
        model.probe(CPU, dtype, "packed")


def test_a_window_that_only_a_mask_knows_is_not_packed(caplog):
    """Qwen2-MoE hands its window to the mask alone; the probe's short sequences do not reach that far."""
    sizes = SIZES | {
        "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "layer_types": ["sliding_attention", "sliding_attention"],
    }  # fmt: skip
    model = Policy(build("qwen2_moe", sizes)).eval()
    with caplog.at_level(logging.WARNING):
        model.probe(CPU, torch.float32, "auto")
    assert model.layout == "padded"
    assert "a window of 64 tokens that only the mask knows" in caplog.text


def test_a_head_that_is_more_than_a_matrix_uses_its_own_logits(caplog):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    lm = build("llama", SIZES)
    head = Scaled(32, 120, bias=False)
    head.weight = lm.lm_head.weight
    lm.lm_head = head
    model = Policy(lm).eval()
    with caplog.at_level(logging.WARNING):
        model.probe(CPU, torch.float32, "auto")
    assert (model.head, model.layout) == ("logits", "packed")
    assert "the head is more than a matrix" in caplog.text
    batch = packed_batch()
    with torch.no_grad():
        logp = model(batch).logp_T.double()
    assert torch.allclose(logp, own_logprobs(lm, batch), rtol=1e-4, atol=1e-3)


def test_weights_that_are_no_numbers():
    lm = build("llama", SIZES)
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(Diverged, match="log-probs of LlamaForCausalLM are not finite"):
        Policy(lm).eval().probe(CPU, torch.float32, "auto")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_in_which_nothing_is_trained(layout):
    """The dummy of a rank without rows: a graph through every weight, whose gradients are zeros."""
    model = Policy(build("llama", SIZES)).eval()
    model.set_layout(layout, CPU)
    batch = packed_batch((2, 2))
    batch = dataclasses.replace(batch, trained_T=torch.zeros(4, dtype=torch.bool))
    out = model(batch)
    assert out.logp_T.tolist() == [0.0] * 4
    out.logp_T.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
