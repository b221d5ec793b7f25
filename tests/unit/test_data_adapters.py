"""Every adapter on rows of its set's schema (content made up), the expected rows written out by hand, and
what ledger and cache make of them."""

from __future__ import annotations

import pytest
from adapter_rows import (
    GSM8K,
    HH,
    ONE_TO_ONE,
    SQUAD,
    TREES,
    adapted,
    assistant,
    helpsteer3,
    message,
    user,
)
from data_helpers import tiny_tokenizer, write_jsonl

from strop.config import Config, DataConfig
from strop.data import adapt
from strop.data.adapters import TABLE
from strop.data.ledger import BadRow
from strop.data.prepare import prepare
from strop.data.sources import Row
from strop.errors import UserError

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("name", "kind", "row", "expected"),
    ONE_TO_ONE,
    ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(ONE_TO_ONE)],
)
def test_a_row_of_each_set(name, kind, row, expected):
    assert adapted(name, kind, [row, row]) == [Row("s.jsonl", 1, expected), Row("s.jsonl", 2, expected)]


def test_every_form_of_the_table_is_tested():
    tested = {(name, kind) for name, kind, *_ in ONE_TO_ONE} | {("oasst1", "sft"), ("oasst2", "sft")}
    assert tested == {(name, kind) for name, adapter in TABLE.items() for kind in adapter.forms}


STRENGTH = "overall_preference is {}, not a whole number from -3 to 3"
FIELDS = "which the rows of {} have; its fields are {}"
NO_BEGINNING = r"chosen does not begin with '\n\nHuman:'"
NOT_IN_TURN = "in {} the turns are not Human and Assistant in turn, ending with the latter"
NOT_SHARED = "chosen and rejected differ before their last turn"
LACKING = {"context": "c", "response1": None}
OF_TYPE_BOOL = "overall_preference is of type bool, where helpsteer3 has int or float"

REFUSED = [
    ("helpsteer3", helpsteer3(4), STRENGTH.format(4)),
    ("helpsteer3", helpsteer3(0.5), STRENGTH.format(0.5)),
    ("helpsteer3", helpsteer3(True), OF_TYPE_BOOL),
    (
        "helpsteer3",
        LACKING,
        "it lacks response1, " + FIELDS.format("helpsteer3", "context, response1 (null)"),
    ),
    ("gsm8k", {}, "it lacks question, " + FIELDS.format("gsm8k", "(none)")),
    ("squad", SQUAD | {"answers": {}}, "answers has no list of texts under text"),
    ("hh", HH | {"chosen": "Name a bird."}, NO_BEGINNING),
    ("hh", HH | {"chosen": "So: \n\nHuman: a\n\nAssistant: b"}, NO_BEGINNING),
    ("hh", HH | {"rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"}, NOT_IN_TURN.format("rejected")),
    ("hh", HH | {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, NOT_IN_TURN.format("chosen")),
    ("hh", HH | {"rejected": HH["rejected"].replace(" Trout.", "")}, "turn 4 of rejected is empty"),
    ("hh", HH | {"rejected": HH["rejected"].replace("Owl", "Eel")}, NOT_SHARED),
]


@pytest.mark.parametrize(("name", "row", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_row_that_does_not_fit(name, row, message):
    reason = "odd_turns" if name == "hh" else "wrong_fields"
    kind = next(iter(TABLE[name].forms))
    assert adapted(name, kind, [row]) == [BadRow("s.jsonl", 1, reason, message)]


def test_rows_that_are_sound_but_of_no_use():
    """They are no errors: a tie says nothing, and a question without an answer teaches nothing."""
    tie = BadRow(
        "s.jsonl", 1, "tie", "overall_preference is 0: neither response is the better one", wanted=True
    )
    assert adapted("helpsteer3", "preference", [helpsteer3(0)]) == [tie]
    [none] = adapted("squad", "sft", [SQUAD | {"answers": {"text": [], "answer_start": []}}])
    assert (none.reason, none.wanted) == ("no_answer", True)


@pytest.mark.parametrize("name", ["oasst1", "oasst2"])
def test_the_best_path_of_each_message_tree(name):
    first, second, third = adapted(name, "sft", TREES)
    best = [user("Name a bird."), assistant("Wren."), user("Another?"), assistant("Owl.")]
    assert first == Row("s.jsonl", 1, {"messages": best})
    assert (second.line, second.reason, second.wanted) == (11, "no_answer", True)
    assert third == Row("s.jsonl", 12, {"messages": [user("Hello."), assistant("Hi.")]})


def test_odd_message_trees():
    with pytest.raises(
        UserError, match=r"^s\.jsonl, line 14: message_tree_id t1 was there before, with others"
    ):
        adapted("oasst1", "sft", [*TREES, TREES[0]])
    bad = BadRow("s.jsonl", 7, "not_json", "x")
    rows = [
        Row("s.jsonl", 1, {"text": "x"}),
        bad,
        Row("s.jsonl", 8, message("t", "a", None, "narrator", "x")),
    ]
    lacking, kept, role = adapt.rows(rows, adapt.Use("oasst1", "sft"))
    assert (lacking.reason, lacking.message) == (
        "wrong_fields",
        "it lacks message_tree_id, by which rows belong together",
    )
    assert kept is bad
    assert (role.reason, role.wanted, role.line) == ("wrong_fields", False, 8)


# ------------------------------------------------------------------------------------- ledger and cache


def error_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def run(tmp_path):
    def run(rows, adapter, kind="preference", split="train", **settings):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        config = Config(data=DataConfig(train=str(path), adapter=adapter, **settings))
        return prepare(config, TOKENIZER, "t", tmp_path / "cache", kind, split)

    run.path = tmp_path / "a.jsonl"
    return run


def test_ties_are_counted_and_are_no_loss(run):
    """Half of the rows are ties: far above data.max_dropped_fraction, yet what was meant."""
    store, ledger = run([helpsteer3(-1), helpsteer3(0), helpsteer3(0), helpsteer3(2)], "helpsteer3")
    entry = ledger.sources[str(run.path)]
    assert (entry.read, entry.used) == (4, 2)
    assert (entry.dropped["tie"].rows, entry.dropped["tie"].examples[0]["line"]) == (2, 2)
    assert [store.row_id(row)[1] for row in range(2)] == [1, 4]
    texts = [TOKENIZER.decode(tokens) for tokens, _ in store.sequences(1)]
    assert [text.rpartition("assistant\n")[2] for text in texts] == [
        "Trout.<|im_end|>\n",
        "Wren.<|im_end|>\n",
    ]
    assert [line.split() for line in ledger.table().splitlines()][3] == ["tie", "2", "0"]
    again, ledger = run([helpsteer3(-1), helpsteer3(0), helpsteer3(0), helpsteer3(2)], "helpsteer3")
    assert again.path == store.path  # the ledger of a cache hit passes the threshold as well
    assert error_of(run, [helpsteer3(0)], "helpsteer3").startswith(
        "all 1 rows of the train set were dropped\n  1 tie"
    )


def test_an_unfit_row_meets_the_policy(run):
    rows = [HH, HH | {"chosen": "odd"}]
    assert error_of(run, rows, "hh") == (
        f"{run.path}, line 2: chosen does not begin with '\\n\\nHuman:'\n"
        "  (data.on_bad_row=skip leaves such rows out and counts them)"
    )
    assert "1 odd_turns, the first at" in error_of(run, rows, "hh", on_bad_row="skip")
    store, _ = run(rows, "hh", on_bad_row="skip", max_dropped_fraction=0.5)
    assert store.num_rows == 1


def test_a_row_without_the_adapters_fields_is_one_error(run):
    assert error_of(run, [helpsteer3(1), {"prompt": "a"}], "helpsteer3").splitlines()[0] == (
        f"{run.path}, line 2: it lacks context, which the rows of helpsteer3 have; its fields are prompt"
    )


def test_left_out_rows_are_counted_in_one_set_only(run):
    rows = [helpsteer3(n % 2, context=f"Question {n}?") for n in range(200)]
    parts = [_part(run, rows, split) for split in ("train", "validation")]
    entries = [ledger.sources[str(run.path)] for _, ledger in parts]
    assert sum(entry.used for entry in entries) == 100
    assert sum(entry.dropped["tie"].rows for entry in entries) == 100
    assert all(entry.read + entry.other_split == 200 for entry in entries)


def _part(run, rows, split):
    path = write_jsonl(run.path, rows)
    config = Config(data=DataConfig(train=str(path), adapter="helpsteer3", split="70,30,0"))
    return prepare(config, TOKENIZER, "t", run.path.parent / "cache", "preference", split)


def test_the_table_is_part_of_the_address(run, monkeypatch):
    rows = [GSM8K]
    first, _ = run(rows, "gsm8k", "sft")
    adapter = TABLE["gsm8k"]
    monkeypatch.setitem(
        TABLE, "gsm8k", type(adapter)(adapter.repository, adapter.forms, adapter.subset, None, 2)
    )
    second, _ = run(rows, "gsm8k", "sft")
    assert first.path != second.path
