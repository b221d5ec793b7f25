"""Rows with a label for KTO, pairs taken apart, and prompts with the completions of other rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from data_helpers import CHATML, tiny_tokenizer

from strop.config import KtoConfig
from strop.data import labels
from strop.data.batch import make_batch
from strop.data.ledger import BadRow
from strop.data.mismatched import Mismatched
from strop.data.render import Renderer
from strop.data.sources import Row
from strop.data.store import TokenisedRow, TokenStore
from strop.data.tokenise import Tokeniser
from strop.errors import UserError

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "How many apples?"}


def rows(fields, kind="unpaired"):
    renderer = Renderer(kind, TOKENIZER, CHATML)
    return list(Tokeniser(TOKENIZER, 1000)(renderer.rows(Row("a.jsonl", 3, fields))))


def answer(text):
    return [{"role": "assistant", "content": text}]


def assert_equal_sequences(a, b):
    assert len(a.sequences) == len(b.sequences) == 1
    for x, y in zip(a.sequences[0], b.sequences[0]):
        assert x.tolist() == y.tolist()


@pytest.mark.parametrize("label", [True, False, 1, 0, 1.0, 0.0])
@pytest.mark.parametrize(
    "fields",
    [{"prompt": "a b", "completion": " c"}, {"prompt": [USER], "completion": answer("84")}],
    ids=["text", "messages"],
)
def test_a_row_is_tokenised_as_for_sft_and_brings_its_label(fields, label):
    [row] = rows({**fields, "label": label})
    assert row.value == float(label)
    [sft] = rows(fields, "sft")
    assert math.isnan(sft.value)
    assert_equal_sequences(row, sft)


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "wrong_fields",
         "it has the fields prompt, completion; needed: prompt, completion and label (true or false), or"),
        ({"prompt": "a", "completion": "b", "label": None}, "wrong_fields", "it has the fields prompt, comp"),
        ({"prompt": "a", "completion": "b", "label": "true"}, "wrong_fields",
         "label is 'true'; it must be true or false (or 1 or 0)"),
        ({"prompt": "a", "completion": "b", "label": 2}, "wrong_fields", "label is 2; it must be true or"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "wrong_fields", "label is 0.5; it must be true"),
        ({"prompt": "a", "completion": "b", "label": [True]}, "wrong_fields", "label is [True]; it must be"),
        ({"completion": "b", "label": True}, "wrong_fields", "it has the fields completion, label; needed:"),
        ({"prompt": "a", "chosen": "b"}, "wrong_fields", "it has the fields prompt, chosen; needed: chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_pair", "chosen and rejected are the same"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(fields, reason, message):
    [bad] = rows(fields)
    assert isinstance(bad, BadRow)
    assert (bad.source, bad.line, bad.reason) == ("a.jsonl", 3, reason)
    assert bad.message.startswith(message)


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "a b", "chosen": " c", "rejected": " d e"},
        {"prompt": [USER], "chosen": answer("84"), "rejected": answer("I do not know")},
        {"chosen": [USER, *answer("84")], "rejected": [USER, *answer("I do not know")]},
    ],
    ids=["text", "messages", "no prompt"],
)
def test_a_pair_is_taken_apart(pair):
    good, bad = rows(pair)
    assert (good.value, bad.value) == (1.0, 0.0)
    for half, side in ((good, "chosen"), (bad, "rejected")):
        assert (half.source, half.line) == ("a.jsonl", 3)
        turns = pair[side][-1:] if isinstance(pair[side], list) else pair[side]
        [alone] = rows({"prompt": pair.get("prompt", [USER]), "completion": turns}, "sft")
        assert_equal_sequences(half, alone)


def store_of(tmp_path, *parts):
    """Rows of so many tokens of prompt and completion; tokens count up over the whole store."""
    made, at = [], 0
    for line, (prompt, completion) in enumerate(parts, start=1):
        tokens = np.arange(at, at + prompt + completion, dtype=np.int32)
        at += len(tokens)
        made.append(
            TokenisedRow("a", line, [(tokens, np.arange(len(tokens)) >= prompt)], value=float(line % 2))
        )
    return TokenStore.write(tmp_path / "s", iter(made), kind="unpaired", digest="x")


def test_prompts_with_the_completions_of_others(tmp_path):
    """Five rows are turned by two; a sequence ends at six tokens. By hand."""
    store = store_of(tmp_path, (1, 1), (2, 3), (1, 4), (4, 2), (3, 1))
    # tokens: 0 | 1    2 3 | 4 5 6    7 | 8 9 10 11    12 13 14 15 | 16 17    18 19 20 | 21
    expected = [
        ([0], [8, 9, 10, 11]),
        ([2, 3], [16, 17]),
        ([7], [21]),
        ([12, 13, 14, 15], [1]),
        ([18, 19, 20], [4, 5, 6]),
    ]
    view = Mismatched(store, 6, "train")
    assert view.num_rows == 5
    assert view.row_lengths.tolist() == [len(a) + len(b) for a, b in expected] == [5, 4, 2, 5, 6]
    for row, (prompt, completion) in enumerate(expected):
        [(tokens, trained)] = view.sequences(row)
        assert tokens.tolist() == prompt + completion
        assert trained.tolist() == [False] * len(prompt) + [True] * len(completion)
    short = Mismatched(store, 5, "train")
    assert short.sequences(4)[0][0].tolist() == [18, 19, 20, 4, 5]
    assert short.digest != view.digest
    ref = np.arange(22, dtype=np.float32)
    batch = make_batch(view, np.array([4, 1]), ref)
    assert batch.tokens_T.tolist() == [18, 19, 20, 4, 5, 6, 2, 3, 16, 17]
    assert batch.ref_logp_T.tolist() == [0, 0, 0, 19, 20, 21, 0, 0, 7, 8]
    assert batch.value_R.tolist() == [1.0, 0.0]
    assert make_batch(view, np.array([], dtype=np.int64), ref).is_dummy


def test_prompt_lengths_over_the_edge_of_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("strop.data.mismatched.CHUNK_ROWS", 2)
    parts = [(1, 1), (2, 3), (1, 4), (4, 2), (3, 1)]
    view = Mismatched(store_of(tmp_path, *parts), 100, "train")
    assert view.row_lengths.tolist() == [parts[i][0] + parts[(i + 2) % 5][1] for i in range(5)]


def test_two_rows_swap_completions_and_one_is_refused(tmp_path):
    two = Mismatched(store_of(tmp_path, (1, 1), (1, 2)), 9, "train")
    assert [two.sequences(row)[0][0].tolist() for row in (0, 1)] == [[0, 3, 4], [2, 1]]
    one = store_of(tmp_path / "one", (1, 1))
    with pytest.raises(UserError, match="the validation set has one usable row, and"):
        Mismatched(one, 9, "validation")


def test_labels_out_of_balance_are_told():
    """TRL's bounds, of equation 8 in the paper: 90 good and 30 bad rows want an undesirable_weight of 2.25 to
    3 or a desirable_weight of 0.33 to 0.44."""
    assert labels.imbalance(40, 40, KtoConfig()) is None
    assert labels.imbalance(40, 30, KtoConfig()) is None
    assert labels.imbalance(90, 30, KtoConfig(undesirable_weight=2.5)) is None
    assert "desirable_weight between 0.33 and 0.44, or kto.undesirable_weight between 2.25 and 3.00" in (
        labels.imbalance(90, 30, KtoConfig())
    )
    assert labels.imbalance(7, 0, KtoConfig()).startswith("all 7 rows are desirable: ")
    assert labels.imbalance(0, 7, KtoConfig()).startswith("all 7 rows are undesirable: ")
