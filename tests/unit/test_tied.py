"""The gradient of a weight that is embedding and head at once, against autograd's own in fp64."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from strop.models import tied
from strop.models.policy import Policy
from tests.unit.test_policy import ARCHITECTURES, GPT2, SIZES, build, packed_batch

CPU = torch.device("cpu")
TIED = {"tie_word_embeddings": True}
# gemma3_text multiplies what it looks up, opt has a row for padding that is not trained, by the lookup.
KINDS = [
    ("llama", SIZES | TIED),
    ("gemma3_text", SIZES | TIED | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    ("gpt2", GPT2),
    ("opt", next(s for k, s, *_ in ARCHITECTURES if k == "opt") | {"pad_token_id": 5}),
]


def policy_of(kind, sizes, layout="packed"):
    policy = Policy(build(kind, sizes))
    policy.set_layout(layout, CPU)
    return policy


def gradients(policy, batch, dtype=torch.float32):
    policy.to(dtype).zero_grad()
    (policy(batch).logp_T * torch.linspace(-1, 2, len(batch.tokens_T), dtype=torch.float64)).sum().backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def without(monkeypatch):
    monkeypatch.setattr(tied, "apart", lambda lm: contextlib.nullcontext())


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("kind", "sizes"), KINDS, ids=[k for k, _ in KINDS])
def test_all_gradients_are_autograds(monkeypatch, kind, sizes, layout):
    policy, batch = policy_of(kind, sizes, layout), packed_batch(vocab=30)  # tokens come again
    found = gradients(policy, batch)
    embedding = policy.lm.get_input_embeddings()
    assert "weight" not in vars(embedding)
    assert not embedding.sparse
    without(monkeypatch)
    right = gradients(policy, batch, torch.float64)
    for name, grad in right.items():
        error = (found[name].double() - grad).abs().max()
        assert float(error) < 1e-4 * float(grad.abs().max()) + 1e-5, name  # of OPT's keys' biases it is 0


def test_noise_on_the_embeddings_stays(monkeypatch):
    """NEFTune's hook sees what the lookup gives."""
    policy = policy_of("llama", SIZES | TIED)
    policy.neftune_alpha = 5.0
    batch = packed_batch(vocab=30)
    batch = dataclasses.replace(batch, draw_T=torch.arange(len(batch.tokens_T), dtype=torch.int32))
    found = gradients(policy, batch)
    policy.neftune_alpha = None
    silent = gradients(policy, batch)
    policy.neftune_alpha = 5.0
    without(monkeypatch)
    right = gradients(policy, batch)
    for name, grad in right.items():
        assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name
    assert not torch.allclose(silent["lm.model.norm.weight"], right["lm.model.norm.weight"], rtol=1e-3)


def test_a_rows_tokens_are_summed_in_fp32():
    """300 tokens of one row, each below half a unit in the last place of the head's part: added one by one in
    bf16 they would vanish. A row of one token, and one of none, beside it."""
    weight = torch.ones(4, 2, dtype=torch.bfloat16, requires_grad=True)
    looked_up, multiplied = tied._Twins.apply(weight)
    tokens = torch.tensor([1] * 300 + [3])
    x = torch.nn.functional.embedding(tokens, looked_up, sparse=True)
    upstream = torch.full((301, 2), 2.0**-9, dtype=torch.bfloat16)
    upstream[300] = 0.5
    (x * upstream).sum().add((multiplied * 1.0).sum()).backward()
    assert weight.grad.layout == torch.strided
    assert weight.grad[:, 0].tolist() == [1.0, 1.5859375, 1.0, 1.5]  # 1 + 300 / 512 = 1.5859375


def test_no_second_gradient_of_the_whole_vocabulary():
    """Autograd's own would be zeroed, and added to the head's."""
    policy, batch = policy_of("llama", SIZES | TIED), packed_batch()
    out = policy(batch).logp_T.sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        out.backward()
    shape = list(policy.lm.get_input_embeddings().weight.shape)
    names = [e.name for e in profile.events() if shape in (e.input_shapes or [])]
    assert "aten::index_copy_" in names
    assert not {"aten::embedding_dense_backward", "aten::add_", "aten::add", "aten::zero_"} & set(names)


def test_gradients_of_micro_batches_add_up():
    policy = policy_of("llama", SIZES | TIED)
    batches = [packed_batch(seed=seed) for seed in (3, 4)]
    apart = [gradients(policy, batch) for batch in batches]
    policy.zero_grad()
    for batch in batches:
        factors = torch.linspace(-1, 2, len(batch.tokens_T), dtype=torch.float64)
        (policy(batch).logp_T * factors).sum().backward()
    for name, p in policy.named_parameters():
        assert torch.equal(p.grad, apart[0][name] + apart[1][name]), name


def test_one_of_the_two_alone():
    """A loss that reaches only one use of the weight."""
    for which in (0, 1):
        weight = torch.randn(5, 3, requires_grad=True)
        twins = tied._Twins.apply(weight)
        tokens = torch.tensor([[1, 4, 1]])
        uses = torch.nn.functional.embedding(tokens, twins[0], sparse=True), twins[1] * 2
        uses[which].sum().backward()
        expected = torch.tensor([[0.0], [2], [0], [0], [1]]) if which == 0 else torch.full((5, 1), 2.0)
        assert torch.equal(weight.grad, expected.expand(5, 3))


def test_who_keeps_autograds_way():
    lms = [build("llama", SIZES | {"tie_word_embeddings": False}), build("llama", SIZES | TIED)]
    lms[1].get_input_embeddings().weight.requires_grad_(False)
    for lm in lms:
        with tied.apart(lm) as twin:
            assert twin is None
    lm = build("llama", SIZES | TIED)
    embedding = lm.get_input_embeddings()
    with torch.no_grad(), tied.apart(lm) as twin:
        assert twin is None
    embedding.max_norm = 1.0  # it changes the weight as it looks up
    with tied.apart(lm) as twin:
        assert twin is None
    embedding.max_norm = None
    with contextlib.suppress(KeyError), tied.apart(lm) as twin:
        assert twin is not None
        assert embedding.weight is not embedding._parameters["weight"]
        raise KeyError
    assert embedding.weight is embedding._parameters["weight"]
    assert not embedding.sparse
