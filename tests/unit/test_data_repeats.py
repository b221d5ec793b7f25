"""Rows that are there twice, and prompts in training and validation, against dictionaries of all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_helpers import tiny_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.config import Config, DataConfig, SftConfig
from strop.data import looking, repeats, units
from strop.data.blocks import Blocks
from strop.data.ledger import Ledger
from strop.data.prepare import prepare
from strop.data.repeats import Contents
from strop.data.sets import Maker
from strop.data.store import TokenisedRow, TokenStore

TOKENIZER = tiny_tokenizer()


def made(tmp_path, name, rows, kind="sft", **sft):
    data = DataConfig(train=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    config = Config(data=data, sft=SftConfig(**sft))
    return prepare(config, TOKENIZER, "t", tmp_path / "cache", kind)[0]


def written(folder, name, rows, kind="sft"):
    """A store of rows that are lists of (tokens, length of the prompt)."""
    tokenised = (
        TokenisedRow("a", i, [(np.array(ids), np.arange(len(ids)) >= max(n, 1)) for ids, n in sequences])
        for i, sequences in enumerate(rows)
    )
    return TokenStore.write(folder / name, tokenised, kind=kind, digest=name)


def qa(prompt, completion="84"):
    return {"prompt": f"{prompt}?", "completion": f" {completion}"}


def leaked(train, other):
    """([(row, training row) that are equal], [the same of prompts alone])."""
    found = repeats.leakage(Contents.of(train), Contents.of(other))
    return tuple(one.pairs(10**6) for one in found)


def doubled(store):
    return tuple(one.pairs(10**6) for one in repeats.within(Contents.of(store)))


def test_the_ledger_of_a_set(tmp_path):
    train = made(tmp_path, "train", [qa("one"), qa("two"), qa("two", "7"), qa("three")])
    val = made(tmp_path, "val", [qa("three"), qa("four"), qa("two", "9"), qa("one two")])
    assert leaked(train, val) == ([(0, 3)], [(2, 1)])
    ledger = Ledger("validation")
    repeats.find_overlap(ledger, str(val.path), str(train.path))
    assert ledger.overlap is not None
    assert {k: v for k, v in ledger.overlap.items() if k != "sets"} == {
        "rows": 1,
        "prompts": 1,
        "of": 4,
        "examples": [
            f"{tmp_path}/val.jsonl, line 1 is {tmp_path}/train.jsonl, line 4",
            f"{tmp_path}/val.jsonl, line 3 has the prompt of {tmp_path}/train.jsonl, line 2",
        ],
    }
    assert "warning: 1 of 4 rows are training rows, too, and 1 others have a prompt of one" in ledger.table()
    assert ledger.as_json()["overlap"] == ledger.overlap
    # told before: told again, and looked for anew where a set is another one, or an older ledger told
    for known, prompts in (
        ({**ledger.overlap, "prompts": 99}, 99),
        ({"sets": ["a", "b"]}, 1),
        ({"stores": ledger.overlap["sets"], "prompts": 2}, 1),
    ):
        again = Ledger("validation")
        repeats.find_overlap(again, str(val.path), str(train.path), known)
        assert again.overlap is not None
        assert again.overlap["prompts"] == prompts
    none = Ledger("validation")
    repeats.find_overlap(none, str(made(tmp_path, "other", [qa("five")]).path), str(train.path))
    assert none.overlap is not None
    assert (none.overlap["rows"], none.overlap["prompts"]) == (0, 0)
    assert "warning" not in none.table()


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_the_ledger_and_the_look_tell_the_same(tmp_path, kind):
    """A training set with doubles; of validation three rows are training rows (two of them the same), two
    others have a prompt of training, one has one of its own, and one has none but is a training row."""

    def row(prompt, answer):
        if kind == "sft":
            return {"prompt": prompt, "completion": answer}
        return {"prompt": prompt, "chosen": answer, "rejected": f"not {answer}"}

    asked = [(f"What is {i}?", f" {i}") for i in range(6)]
    train = [*asked, asked[1], ("What is 2?", " two"), asked[1], ("", "alone")]
    val = [asked[3], ("What is 4?", " four"), ("New?", " Yes"), asked[3], asked[5], ("What is 0?", " none")]
    val.append(("", "alone"))
    for name, rows in (("train", train), ("validation", val)):
        write_jsonl(tmp_path / f"{name}.jsonl", [row(*one) for one in rows])
    data = DataConfig(
        train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "validation.jsonl"), max_length=64
    )
    config = Config(data=data)

    report = looking.look(config, kind, TOKENIZER, tmp_path / "a", 1, lambda what, done, total: None)
    own, other = ({c.name: c.count for c in report.concerns[name]} for name in ("train", "validation"))

    maker = Maker(config, kind, TOKENIZER, "t", tmp_path / "b")
    (train_place, _), (place, ledger) = (maker.prepare(name) for name in maker.names())
    repeats.find_overlap(ledger, place, train_place)
    assert ledger.overlap is not None
    assert ledger.overlap["rows"] == other["leakage"] == 4
    assert ledger.overlap["prompts"] == other["leaked_prompts"] == 2
    assert ledger.overlap["of"] == report.looks["validation"].num_rows == 7
    assert (own["duplicates"], own["repeated_prompts"], other["duplicates"]) == (2, 1, 1)


def test_an_equal_row_need_not_be_the_first_with_its_prompt(tmp_path):
    train = made(tmp_path, "train", [qa("two", "7"), qa("two", "84")])
    val = made(tmp_path, "val", [qa("two", "84")])
    assert leaked(train, val) == ([(0, 1)], [])


def test_pairs_go_by_their_prompt(tmp_path):
    rows = [{"prompt": f"{word}?", "chosen": " a", "rejected": " b"} for word in ("one", "two", "three")]
    train = made(tmp_path, "train", rows[:2], "preference")
    others = [{**row, "rejected": " c"} for row in rows]
    assert leaked(train, made(tmp_path, "val", others, "preference")) == ([], [(0, 0), (1, 1)])


def test_halves_of_a_pair_are_told_apart(tmp_path):
    """The same tokens one after another, with another boundary, are another row; swapped halves too."""
    train = written(tmp_path, "a", [[([1, 2], 1), ([3, 4, 5], 1)]], "preference")
    rows = [[([1, 2, 3], 1), ([4, 5], 1)], [([3, 4, 5], 1), ([1, 2], 1)], [([1, 2], 1), ([3, 4, 5], 1)]]
    assert leaked(train, written(tmp_path, "b", rows, "preference")) == ([(2, 0)], [])
    a, b, c = (np.array(ids, dtype=np.int32) for ids in ([1, 2], [3], [2, 3]))
    assert repeats.digest([a, b]) != repeats.digest([a[:1], c])


def test_without_a_prompt_a_row_counts_as_a_whole(tmp_path):
    """Plain texts, and everything trained: BOS or nothing comes first in all of them alike."""
    texts = [{"prompt": "", "completion": f"text {i}"} for i in range(4)]
    assert leaked(made(tmp_path, "a", texts[:3]), made(tmp_path, "b", texts[2:])) == ([(0, 2)], [])
    whole = [
        made(tmp_path, n, r, train_on="everything")
        for n, r in (("c", [qa("x")]), ("d", [qa("x", "7"), qa("x")]))
    ]
    assert leaked(*whole) == ([(1, 0)], [])


def test_documents_of_text(tmp_path):
    """By their text, wherever blocks are cut, and over the parts that a set of text is made of."""
    texts = [{"text": f"Document {i} speaks of {i} things."} for i in range(5)]
    for name, rows in (("one", [*texts[:3], texts[1]]), ("two", [texts[3], texts[0]])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    write_jsonl(tmp_path / "val.jsonl", [texts[4], texts[3], texts[2]])
    data = DataConfig(
        train=[str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")],  # type: ignore[arg-type]
        validation=str(tmp_path / "val.jsonl"),
        max_length=8,
    )
    config = Config(data=data)
    config = dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, exact_duplicates=False))
    maker = Maker(config, "text", TOKENIZER, "t", tmp_path / "cache")
    train, val = (
        Blocks.open(maker.prepare(name)[0], 8, cross_documents=False) for name in ("train", "validation")
    )
    assert doubled(train) == ([(3, 1), (5, 0)], [])
    assert leaked(train, val) == ([(1, 4), (2, 2)], [])


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, 1)), min_size=1, max_size=40
)


def by_dictionaries(train, other):
    """The two lists of `leaked`, or for the same list of `doubled`; rows: (prompt, completion)."""
    within = train is other
    same, prompts = [], []
    for i, (prompt, completion) in enumerate(other):
        known = train[:i] if within else train
        if (prompt, completion) in known:
            same.append((i, known.index((prompt, completion))))
        elif len(prompt) > 1 and any(p == prompt for p, _ in known):
            prompts.append((i, [p for p, _ in known].index(prompt)))
    return same, prompts


@pytest.mark.parametrize("weights", ["random", "ones"])
@settings(max_examples=60, deadline=None)
@given(train=ROWS, val=ROWS, chunk=st.integers(1, 7))
def test_against_dictionaries(tmp_path_factory, weights, train, val, chunk):
    """Prompts of 1 to 4 of three tokens: many are equal, many are the beginning of another. With weights of 1
    the tokens' order makes no difference to a hash, so that different rows have equal ones."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "CHUNK_TOKENS", chunk)
        patch.setattr(repeats, "CHUNK_ROWS", chunk)
        if weights == "ones":
            patch.setattr(repeats, "_weights", lambda length: np.ones(length, dtype=np.uint64))
        stores = [
            written(folder, name, [[([*p, 5 + c], len(p))] for p, c in rows])
            for name, rows in (("train", train), ("val", val))
        ]
        assert leaked(*stores) == by_dictionaries(train, val)
        assert doubled(stores[0]) == by_dictionaries(train, train)
