"""A pair's prompt computed once: the store, the batch, and log-probs and gradients of models against each
sequence alone, with its own attention, in fp64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.batch import make_batch
from strop.data.store import TokenisedRow, TokenStore
from strop.models.policy import Policy
from tests.unit.test_policy import ARCHITECTURES, build

CPU = torch.device("cpu")


def pair(chosen, rejected, trained_from=(1, 1)):
    """A row of two sequences, trained from the given places on."""
    sides = zip((chosen, rejected), trained_from)
    return TokenisedRow("a", 1, [(np.array(ids), np.arange(len(ids)) >= start) for ids, start in sides])


def write(path, rows):
    return TokenStore.write(path, iter(rows), kind="preference", digest="x")


ROWS = [
    pair([1, 2, 3, 4], [1, 2, 3, 5, 6], (3, 3)),  # a prompt of three tokens
    pair([1, 2, 3, 4], [1, 2, 3, 5], (3, 2)),  # a token trained in one of them is not shared
    pair([7, 8], [9, 8]),  # nothing in common
    pair([1, 2, 3], [1, 2, 3, 4], (3, 3)),  # nothing trained in the first: each keeps a token of its own
    pair([4, 5, 9, 7], [4, 5, 6, 7], (3, 3)),  # prompts that differ: what they begin with
]


def test_spans_lengths_and_positions_by_hand(tmp_path):
    plain = write(tmp_path / "s", ROWS)
    store = plain.sharing_prompts()
    assert store.shared_R.tolist() == [3, 2, 0, 2, 2]
    assert plain.row_lengths.tolist() == [9, 8, 4, 7, 8]
    assert store.row_lengths.tolist() == [6, 6, 4, 5, 6]
    assert (plain.spans(1), store.spans(1)) == ([(9, 13), (13, 17)], [(9, 13), (15, 17)])
    assert (plain.first_positions(1), store.first_positions(1)) == ([0, 0], [0, 2])


IDS, START = st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(IDS, IDS, START, START), min_size=1, max_size=6))
def test_as_many_tokens_as_a_loop_would_share(tmp_path_factory, rows):
    store = write(tmp_path_factory.mktemp("s") / "s", [pair(a, b, (i, j)) for a, b, i, j in rows])
    expected = []
    for a, b, i, j in rows:
        n = 0
        while n < min(len(a) - 1, len(b) - 1, i, j) and a[n] == b[n]:
            n += 1
        expected.append(n)
    assert store.sharing_prompts().shared_R.tolist() == expected


def test_rows_beyond_a_chunk_of_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr("strop.data.store.CHUNK_ROWS", 2)
    assert write(tmp_path / "s", ROWS).sharing_prompts().shared_R.tolist() == [3, 2, 0, 2, 2]


def test_nothing_is_shared_with_one_sequence_a_row(tmp_path):
    row = TokenisedRow("a", 1, [(np.array([1, 2]), np.array([False, True]))])
    store = TokenStore.write(tmp_path / "s", iter([row, row]), kind="sft", digest="x").sharing_prompts()
    assert (store.shared_R.tolist(), store.spans(1)) == ([0, 0], [(2, 4)])


def test_a_batch_by_hand(tmp_path):
    """The rejected completion's first token is predicted by the prompt's last, two places before it."""
    store = write(tmp_path / "s", ROWS).sharing_prompts()
    batch = make_batch(store, [2, 0], np.arange(100.0, 136.0, dtype=np.float32))
    assert batch.tokens_T.tolist() == [7, 8, 9, 8, 1, 2, 3, 4, 5, 6]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 8, 10]
    assert batch.cu_keys.tolist() == [0, 2, 4, 8, 13]
    assert batch.previous_T[batch.trained_T].tolist() == [0, 2, 6, 6, 8]
    assert batch.ref_logp_T.tolist() == [0, 118, 0, 120, 0, 0, 0, 103, 107, 108]
    assert (batch.num_tokens, len(batch.tokens_T)) == (13, 10)


def random_pairs(seed=5):
    """Prompts and completions of unlike lengths, some beyond the windows of the models."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt, chosen, rejected in ((9, 3, 8), (1, 6, 2), (14, 1, 1), (3, 12, 10)):
        first = draw.integers(3, 120, prompt)
        sides = [np.concatenate([first, draw.integers(3, 120, n)]) for n in (chosen, rejected)]
        sides[1][prompt] = (sides[0][prompt] + 1) % 120
        rows.append(pair(*sides, (prompt, prompt)))
    return rows


def gradients(model, logp, weights):
    model.zero_grad()
    (logp * weights).sum().backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2", "gemma3_text"])
def test_logprobs_and_gradients_equal_each_sequence_alone(kind, tmp_path):
    """fp32, shared, within 1e-6 of fp32 with the prompt twice, and both near fp64 by the model alone."""
    sizes = next(s for k, s, *_ in ARCHITECTURES if k == kind)
    lm = build(kind, sizes)
    policy = Policy(lm).eval()
    policy.probe(CPU, torch.float32, "packed")
    assert policy.shares_prompts(CPU, torch.float32)
    plain = write(tmp_path / "s", random_pairs())
    found = []
    for store in (plain, plain.sharing_prompts()):
        batch = make_batch(store, np.arange(store.num_rows))
        logp = policy(batch).logp_T[batch.trained_T]
        weights = torch.linspace(-1, 1, len(logp))
        found.append((logp.detach().double(), gradients(lm, logp, weights)))
    (twice, grads_twice), (once, grads_once) = found
    lm.double().set_attn_implementation("eager")
    sequences = [seq for row in range(plain.num_rows) for seq in plain.sequences(row)]
    pieces = []
    for tokens, trained in sequences:
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logp = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        pieces.append(logp[torch.from_numpy(trained[1:].copy())])
    truth = torch.cat(pieces)
    grads_truth = gradients(lm, truth, weights.double())
    scale = float(truth.detach().abs().max())
    assert float((once - twice).abs().max()) < 1e-6 * scale + 1e-6
    assert torch.allclose(once, truth.detach(), rtol=1e-5, atol=1e-5 * scale)
    for name, expected in grads_truth.items():
        size = float(expected.abs().max())
        assert float((grads_once[name] - grads_twice[name]).abs().max()) <= 1e-5 * size, name
        assert float((grads_once[name] - expected).abs().max()) <= 1e-4 * size, name


def test_a_model_that_does_not_follow_the_keys_is_found_out(monkeypatch):
    """An attention that ignores cu_seq_lens_k leaves the rejected completion without its prompt."""
    policy = Policy(build("llama", next(s for k, s, *_ in ARCHITECTURES if k == "llama"))).eval()
    policy.set_layout("padded", CPU)
    assert not policy.shares_prompts(CPU, torch.float32)
    policy.set_layout("packed", CPU)
    assert policy.shares_prompts(CPU, torch.float32)
    from transformers import AttentionInterface

    from strop.models import attention

    def without_keys(*args, cu_seq_lens_k=None, **kwargs):
        return attention.packed_sdpa(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, without_keys)
    assert not policy.shares_prompts(CPU, torch.float32)


def test_store_fields_are_replaced_together(tmp_path):
    """The plan packs what is computed: lengths and spans agree row by row."""
    store = write(tmp_path / "s", ROWS).sharing_prompts()
    for row in range(store.num_rows):
        assert sum(end - begin for begin, end in store.spans(row)) == store.row_lengths[row]
    assert dataclasses.replace(store, shared_R=None).spans(0) == [(0, 4), (4, 9)]
