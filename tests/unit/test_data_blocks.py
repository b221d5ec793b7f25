"""Blocks of continued pretraining, and blends of them: every token once, by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data import corpus, plan
from strop.data.batch import make_batch
from strop.data.blocks import Blocks, Part
from strop.data.corpus import Corpus, Range

DOCS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def make(lengths, shard=7):
    """A corpus in memory whose token is its own place, in shards that cut documents."""
    total = sum(lengths)
    tokens = np.arange(total, dtype=np.int32)
    return Corpus(
        path=None,
        digest="d",
        tokenizer="t",
        shards=tuple(tokens[i : i + shard] for i in range(0, total, shard)),
        shard_tokens=shard,
        offsets=np.cumsum([0, *lengths]),
        rows=np.array([[0, line] for line in range(1, len(lengths) + 1)]),
        sources=("a.txt",),
        ranges=(Range("train", "a.txt", 0, len(lengths)),),
    )


@settings(deadline=None)
@given(lengths=DOCS, length=st.integers(2, 20), cross=st.booleans(), cut=st.integers(0, 12))
def test_every_token_is_predicted_once_from_its_own_document(lengths, length, cross, cut):
    """But the first of a document (of everything, where attention crosses). Two parts of one corpus."""
    made = make(lengths)
    cut = min(cut, len(lengths) - 1)
    ranges = [(0, cut), (cut, len(lengths))] if cut else [(0, len(lengths))]
    blocks = Blocks(tuple(Part(made, a, b) for a, b in ranges), length, cross)
    starts = [0, int(made.offsets[cut])] if cross else made.offsets[:-1].tolist()
    predicted = Counter()
    for row in range(blocks.num_rows):
        sequences = blocks.sequences(row)
        assert sum(len(tokens) for tokens, _ in sequences) == blocks.row_lengths[row] <= length
        for tokens, trained in sequences:
            assert not trained[0]
            assert tokens.tolist() == list(range(tokens[0], tokens[0] + len(tokens)))
            predicted.update(tokens[trained].tolist())
            if not cross:  # all of one document
                documents = np.searchsorted(made.offsets, [tokens[0], tokens[-1]], side="right")
                assert documents[0] == documents[1]
        source, line = blocks.row_id(row)
        assert (source, made.offsets[line] > sequences[0][0][0] >= made.offsets[line - 1]) == ("a.txt", True)
    assert predicted == Counter(set(range(sum(lengths))) - set(starts))


def test_blocks_by_hand():
    """Documents of 3, 1, 6 and 2 tokens in blocks of 5: four predicted places each. A document that goes on
    has the token before as context; one that begins at the last place of a block is alone there."""
    blocks = Blocks((Part(make([3, 1, 6, 2]), 0, 4),), 5, False)
    got = [[tokens.tolist() for tokens, _ in blocks.sequences(row)] for row in range(3)]
    assert got == [[[0, 1, 2], [3]], [[4, 5, 6, 7]], [[7, 8, 9], [10, 11]]]
    assert blocks.row_lengths.tolist() == [4, 4, 5]
    crossing = Blocks(blocks.parts, 5, True)
    got = [[tokens.tolist() for tokens, _ in crossing.sequences(row)] for row in range(3)]
    assert got == [[[0, 1, 2, 3]], [[3, 4, 5, 6, 7]], [[7, 8, 9, 10, 11]]]
    batch = make_batch(blocks, np.array([0, 2]))
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert batch.trained_T.tolist() == [False, True, True, False, False, True, True, False, True]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 2**40),
    batch=st.integers(1, 50),
)
@settings(max_examples=50, deadline=None)
def test_a_blend_keeps_its_shares_and_visits_every_row(sizes, data, seed, batch):
    """Whatever the batch size: an epoch holds each source by its weight to within one row, and a source's
    rows come in whole passes, none twice before all have come once."""
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    total, begins = sum(sizes), np.cumsum([0, *sizes])
    counts = plan.blend_counts(sizes, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights):
        assert abs(count - total * weight / sum(weights)) < 1
    steps = plan.steps_per_epoch(total, batch)
    seen = Counter()
    for epoch in range(5):
        rows = np.concatenate(
            [
                plan.blend(plan.step_rows(total, batch, seed, step), sizes, weights, seed, epoch)
                for step in range(epoch * steps, (epoch + 1) * steps)
            ]
        )
        source = np.searchsorted(begins, rows, side="right") - 1
        assert np.bincount(source, minlength=len(sizes)).tolist() == counts
        seen.update(rows.tolist())
        for begin, end in zip(begins[:-1], begins[1:]):
            times = [seen[row] for row in range(begin, end)]
            assert max(times) - min(times) <= 1


def test_a_blend_without_weights_is_the_plain_order():
    """Weights equal to the sizes give every row once an epoch, in an order that depends on seed and epoch."""
    sizes = [5, 7]
    rows = [plan.blend(np.arange(12), sizes, sizes, 3, epoch).tolist() for epoch in (0, 1, 0)]
    assert [sorted(r) for r in rows] == [list(range(12))] * 3
    assert rows[0] == rows[2] != rows[1]


def test_opening_is_quick_and_damage_is_named(tmp_path):
    """10^8 tokens of 200,000 documents, files with holes: under 0.1 s."""
    import time

    from strop.errors import UserError

    lengths = np.full(200_000, 500)
    corpus.write_index(
        tmp_path,
        lengths=lengths,
        rows=np.zeros((len(lengths), 2)),
        sources=["a"],
        ranges=[Range("train", "a", 0, len(lengths))],
        digest="d",
        tokenizer="t",
    )
    for i, begin in enumerate(range(0, 10**8, corpus.SHARD_TOKENS)):
        with open(tmp_path / corpus.shard_name(i), "wb") as file:
            file.truncate(4 * min(corpus.SHARD_TOKENS, 10**8 - begin))
    Corpus.open(tmp_path)
    begin = time.perf_counter()
    made = Corpus.open(tmp_path)
    assert time.perf_counter() - begin < 0.1
    assert made.document(199_999).shape == (500,)
    with open(tmp_path / corpus.shard_name(1), "ab") as file:
        file.truncate(8)
    with pytest.raises(UserError, match=r"tokens-00001\.bin is damaged"):
        Corpus.open(tmp_path)
