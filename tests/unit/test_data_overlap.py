"""Prompts that stand in training and validation, against a dictionary of all of them."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import tiny_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.config import Config, DataConfig, SftConfig
from strop.data import overlap, sets
from strop.data.ledger import Ledger
from strop.data.overlap import leakage
from strop.data.prepare import prepare
from strop.data.store import TokenisedRow, TokenStore

TOKENIZER = tiny_tokenizer()


def made(tmp_path, name, rows, kind="sft", **sft):
    data = DataConfig(train=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    config = Config(data=data, sft=SftConfig(**sft))
    return prepare(config, TOKENIZER, "t", tmp_path / "cache", kind)[0]


def qa(prompt, completion="84"):
    return {"prompt": f"{prompt}?", "completion": f" {completion}"}


def test_equal_prompts_and_equal_rows(tmp_path):
    train = made(tmp_path, "train", [qa("one"), qa("two"), qa("two", "7"), qa("three")])
    val = made(tmp_path, "val", [qa("three"), qa("four"), qa("two", "9"), qa("one two")])
    assert leakage(train, val) == [(3, 0), (1, 2)]
    ledger = Ledger("validation")
    sets.find_overlap(ledger, str(val.path), str(train.path))
    assert ledger.overlap is not None
    assert {k: v for k, v in ledger.overlap.items() if k != "stores"} == {
        "prompts": 2,
        "rows": 1,
        "of": 4,
        "examples": [
            f"{tmp_path}/val.jsonl, line 1 has the prompt of {tmp_path}/train.jsonl, line 4",
            f"{tmp_path}/val.jsonl, line 3 has the prompt of {tmp_path}/train.jsonl, line 2",
        ],
    }
    assert "warning: 2 of 4 rows have a prompt of the training set (1 are equal as a whole)" in ledger.table()
    assert ledger.as_json()["overlap"] == ledger.overlap
    # told before: told again, and looked for anew where a store is another one
    for known, prompts in (({**ledger.overlap, "prompts": 99}, 99), ({"stores": ["a", "b"]}, 2)):
        again = Ledger("validation")
        sets.find_overlap(again, str(val.path), str(train.path), known)
        assert again.overlap is not None
        assert again.overlap["prompts"] == prompts
    none = Ledger("validation")
    sets.find_overlap(none, str(made(tmp_path, "other", [qa("five")]).path), str(train.path))
    assert none.overlap is not None
    assert none.overlap["prompts"] == 0
    assert "warning" not in none.table()


def test_an_equal_row_need_not_be_the_first_with_its_prompt(tmp_path):
    train = made(tmp_path, "train", [qa("two", "7"), qa("two", "84")])
    val = made(tmp_path, "val", [qa("two", "84")])
    assert leakage(train, val) == [(0, 0)]
    found = overlap.record(train, val)
    assert (found["prompts"], found["rows"]) == (1, 1)


def test_pairs_go_by_their_prompt(tmp_path):
    rows = [{"prompt": f"{word}?", "chosen": " a", "rejected": " b"} for word in ("one", "two", "three")]
    train = made(tmp_path, "train", rows[:2], "preference")
    others = [{**row, "rejected": " c"} for row in rows]
    assert leakage(train, made(tmp_path, "val", others, "preference")) == [(0, 0), (1, 1)]


def test_without_a_prompt_a_row_counts_as_a_whole(tmp_path):
    """Plain texts, and everything trained: BOS or nothing comes first in all of them alike."""
    texts = [{"prompt": "", "completion": f"text {i}"} for i in range(4)]
    assert leakage(made(tmp_path, "a", texts[:3]), made(tmp_path, "b", texts[2:])) == [(2, 0)]
    whole = [
        made(tmp_path, n, r, train_on="everything")
        for n, r in (("c", [qa("x")]), ("d", [qa("x", "7"), qa("x")]))
    ]
    assert leakage(*whole) == [(0, 1)]


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 1)), min_size=1, max_size=40
)


@settings(max_examples=100, deadline=None)
@given(train=ROWS, val=ROWS, chunk=st.integers(1, 7))
def test_against_a_dictionary(tmp_path_factory, train, val, chunk):
    """Prompts of 1 to 4 of three tokens: many are equal, many are the beginning of another."""
    folder = tmp_path_factory.mktemp("stores")

    def write(name, rows):
        made = (
            TokenisedRow("a", i, [(np.array([*p, 5 + c]), np.arange(len(p) + 1) == len(p))])
            for i, (p, c) in enumerate(rows)
        )
        return TokenStore.write(folder / name, made, kind="sft", digest=name)

    def key(row):
        prompt, completion = row
        return tuple(prompt) if len(prompt) > 1 else (*prompt, 5 + completion)

    first = {}
    for i, row in enumerate(train):
        first.setdefault(key(row), i)
    expected = [(first[key(row)], i) for i, row in enumerate(val) if key(row) in first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_TOKENS", chunk)
        stores = write("train", train), write("val", val)
        assert leakage(*stores) == expected
        same = [(train.index(row), i) for i, row in enumerate(val) if row in train]
        assert overlap.equal_rows(*stores) == same


def test_equal_hashes_of_other_prompts_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "_weights", lambda length: np.ones(length, dtype=np.uint64))
    train = made(tmp_path, "train", [{"prompt": "1 2", "completion": "x"}])
    val = made(tmp_path, "val", [{"prompt": "2 1", "completion": "x"}, {"prompt": "1 2", "completion": "y"}])
    assert leakage(train, val) == [(0, 1)]
