"""Which rows of a set are shown, and the text that a terminal shows of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from data_helpers import tiny_tokenizer, write_jsonl

from strop.config import Config, DataConfig
from strop.data import concerns, inspect_text, looking, samples
from strop.data.spans import Span, spans, special_mask
from strop.errors import UserError
from tests.unit.look_helpers import GOOD, dialogue, pair

# --- which rows


def test_a_row_is_found_by_whole_parts_of_its_path(tmp_path):
    """hard-training.jsonl is another file than training.jsonl, and two of that name must be told apart."""
    files = [tmp_path / name for name in ("hard-training.jsonl", "a/training.jsonl", "b/training.jsonl")]
    for i, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        write_jsonl(file, [dialogue(f"{n}?", f"{i}.") for n in range(3 if i < 2 else 5)] + [{"messages": []}])
    data = {"on_bad_row": "skip", "max_dropped_fraction": 0.5}
    config = Config(data=DataConfig(train=[str(file) for file in files[:2]], **data))
    tokenizer = tiny_tokenizer()

    def pick(config, name):
        report = looking.look(config, "sft", tokenizer, tmp_path / "cache", 1, lambda *args: None)
        return looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=[name])[0].place

    assert pick(config, "training.jsonl:3") == f"{files[1]}, line 3"
    assert pick(config, "hard-training.jsonl:3") == f"{files[0]}, line 3"
    with pytest.raises(UserError, match=f"{files[1]}, line 4 is not used"):
        pick(config, "training.jsonl:4")
    config = Config(data=DataConfig(train=[str(file) for file in files], **data))
    for line in (3, 4, 5, 6):  # used in both, used in one, not used in the other
        with pytest.raises(UserError) as raised:
            pick(config, f"training.jsonl:{line}")
        assert f"{files[1]} and {files[2]} end so: name more" in str(raised.value)
    assert pick(config, "b/training.jsonl:5") == f"{files[2]}, line 5"
    assert pick(config, f"{files[1]}:2") == f"{files[1]}, line 2"


def test_rows_by_name(look_at, tmp_path):
    rows = [GOOD[0], {"messages": []}, GOOD[1]]
    report, config = look_at("sft", {"train": rows}, on_bad_row="skip", max_dropped_fraction=0.5)
    own, tokenizer = report.looks["train"].rows, tiny_tokenizer()
    assert samples.by_name(own, "2", "train") == samples.by_name(own, "train.jsonl:3", "train") == [1]
    with pytest.raises(UserError, match="the train set has the rows 1 to 2"):
        samples.by_name(own, "3", "train")
    with pytest.raises(UserError, match=r"train.jsonl, line 2 is not used: wrong_fields: neither text"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl:2"])
    with pytest.raises(UserError, match=r"the train set has no line 9 of train.jsonl"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl:9"])
    with pytest.raises(UserError, match="expected a row's number, or SOURCE:LINE"):
        looking.pick(report, config, "sft", tokenizer, "train", n=1, rows=["train.jsonl"])
    with pytest.raises(UserError, match="the sets of this run are train"):
        looking.pick(report, config, "sft", tokenizer, "test", n=1)


def test_spread_and_longest(look_at):
    assert samples.spread(9, 3, None) == [0, 4, 8]
    assert samples.spread(2, 5, None) == [0, 1]
    assert samples.spread(5, 0, None) == []
    drawn = samples.spread(1000, 5, 7)
    assert drawn == samples.spread(1000, 5, 7) == sorted(set(drawn)) != samples.spread(1000, 5, 8)
    report, _ = look_at("sft", {"train": [dialogue("Q", "a" * n) for n in (1, 9, 5)]})
    assert samples.longest(report.looks["train"].rows, 2) == [1, 2]


def test_a_pair_shows_its_prompt_once(look_at):
    report, _ = look_at("preference", {"train": [pair("Is it? ", "Yes, it is.", "Yes, no.")]})
    sample = samples.sample(report.looks["train"].rows, 0, tiny_tokenizer())
    texts = {part.title: "".join(s.text for s in part.spans) for part in sample.parts}
    assert texts == {"prompt": "Is it? ", "chosen": "Yes, it is.</s>", "rejected": "Yes, no.</s>"}
    assert [part.trained for part in sample.parts] == [0, sample.parts[1].tokens, sample.parts[2].tokens]
    assert sample.value is None


# --- text of it

PLAIN = inspect_text.Paper(colour=False)
COLOUR = inspect_text.Paper(colour=True)


def test_what_cannot_be_seen():
    assert inspect_text.visible("  a  b \n\tc\r ") == "··a  b·⏎\n→\tc␍·"
    assert inspect_text.visible("a\x1b[31m\u200b\u00a0é🙂") == "a\\x1b[31m‹U+200B›‹U+00A0›é🙂"


def test_marks_and_colours():
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("Ask:\nOne\ntwo.</s>", add_special_tokens=False)["input_ids"])
    boundary = len(tokenizer("Ask:\n", add_special_tokens=False)["input_ids"])
    found = spans(ids, np.arange(len(ids)) >= boundary, tokenizer)
    assert inspect_text.spans_text(found, PLAIN) == "Ask:⏎\n⟦One⏎\ntwo.</s>⟧"
    text = inspect_text.spans_text(found, COLOUR)
    assert text == "Ask:⏎\n\x1b[32mOne⏎\x1b[0m\n\x1b[32mtwo.\x1b[0m\x1b[1;7;32m</s>\x1b[0m"


def test_long_spans_are_shortened():
    long = [Span("a" * 1000 + "b" * 700, False, False, 9)]
    text = inspect_text.spans_text(long, PLAIN)
    assert (
        text == "a" * 1000 + "b" * 200 + " [... 100 characters left out, --full shows them ...] " + "b" * 400
    )
    assert len(inspect_text.spans_text(long, dataclasses.replace(PLAIN, full=True))) == 1700


def test_everything_but_data_fits_the_width(look_at):
    """With what makes lines long: names, messages, numbers."""
    report, config = look_at("sft", {"train": [*GOOD * 2, {"messages": []}], "validation": GOOD[:1]})
    for width in (80, 120):
        paper = dataclasses.replace(PLAIN, width=width)
        lines = "\n".join(inspect_text.report_text(report, config, "train", paper)).split("\n")
        paths = [line for line in lines if len(line) > width and "/" in line]
        assert [line for line in lines if len(line) > width and line not in paths] == []
        assert all(len(line.split()) <= 3 for line in paths)  # a path that is too long stands alone


def test_special_mask_covers_the_vocabulary():
    tokenizer = tiny_tokenizer()
    marked = np.flatnonzero(special_mask(tokenizer)).tolist()
    assert tokenizer.convert_ids_to_tokens(marked) == ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def test_shares_in_few_digits():
    told = {0.0: "0%", 0.00034: "0.03%", 0.05: "5.0%", 0.5: "50%", 1.0: "100%"}
    assert {share: concerns.percent(share) for share in told} == told


def test_the_ledger_is_in_the_text(look_at, tmp_path: Path):
    report, config = look_at("sft", {"train": [*GOOD, {"x": 1}]})
    text = "\n".join(inspect_text.report_text(report, config, "train", PLAIN))
    row = next(line for line in text.split("\n") if "wrong_fields" in line).split()
    assert row == ["wrong_fields", "1", "0"]


def test_all_rows_of_a_line(look_at):
    """A pair is two rows where answers are judged alone."""
    report, config = look_at(
        "unpaired", {"train": [pair("Is it?", "Yes.", "No."), pair("Was it?", "So.", "Never.")]}
    )
    shown = looking.pick(report, config, "unpaired", tiny_tokenizer(), "train", n=1, rows=["train.jsonl:2"])
    assert [(sample.row, sample.value) for sample in shown] == [(3, 1.0), (4, 0.0)]
