"""The tool as it is called: its text word by word, its JSON, its exit codes."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from data_helpers import tiny_tokenizer, write_jsonl

from strop.errors import EXIT_USER
from tests.unit.look_helpers import dialogue
from tools import look_at_data
from tools.command_line import run

ROWS = [
    dialogue("What is 1?", "One."),
    dialogue("What is 2?", "Two,\n\tas  ever. "),
    dialogue("What is 1?", "One."),
]

GOLDEN = """\
⟦trained⟧  context  ⏎ line break  → tab  · blank at an end

── train example 1 of 2: training.jsonl, line 1 ────────────────────────────────
row 1 of 3, T tokens, T trained
<|im_start|>user⏎
What is 1?<|im_end|>⏎
<|im_start|>assistant⏎
⟦One.<|im_end|>⏎⟧

── train example 2 of 2: training.jsonl, line 2 ────────────────────────────────
row 2 of 3, T tokens, T trained
<|im_start|>user⏎
What is 2?<|im_end|>⏎
<|im_start|>assistant⏎
⟦Two,⏎
→	as  ever.·<|im_end|>⏎⟧

── train set ───────────────────────────────────────────────────────────────────
source          read  used  dropped  tokens  trained  longest
training.jsonl     3     3        0      T       T       T

                min      mean       p50       p90       p99       max
"""
CONCERNS = """\
[warn] 1 of 3 rows (33%) are equal to an earlier one
       -> they weigh twice: take them out
       training.jsonl, line 3 = training.jsonl, line 1
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("--n", "2", ...) -> (stdout, exit code)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "error" if "VERB" in name else "false"))
    tiny_tokenizer().save_pretrained("tokenizer")
    write_jsonl(tmp_path / "training.jsonl", ROWS)
    (tmp_path / "my-sft.yaml").write_text(
        "model:\n  path: tokenizer\ndata:\n  train: training.jsonl\n  max_length: 64\n"
        "train:\n  global_batch_size: 2\n"
    )

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["look_at_data", "--config", "my-sft.yaml", *words])
        try:
            run(look_at_data.main)
            code = 0
        except SystemExit as ended:
            code = ended.code
        return capsys.readouterr(), code

    return called


def test_the_text(call):
    """The numbers of tokens depend on how the tokenizer was trained; they are held against the JSON below."""
    said, code = call("--row", "1", "--row", "training.jsonl:2", "--width", "80")
    assert code == 0
    text = re.sub(r"\d+ tokens, \d+ trained", "T tokens, T trained", said.out)
    text = re.sub(r"(jsonl     3     3        0) +\d+ +\d+ +\d+", r"\1      T       T       T", text)
    assert text.startswith(GOLDEN)
    assert CONCERNS in text
    assert text.endswith("\n1 warning, 1 note\n")
    assert "\x1b" not in text


def test_the_json(call, tmp_path):
    said, code = call("--n", "3", "--json", "-")
    record = json.loads(said.out)
    tokenizer = tiny_tokenizer()
    lengths = []
    for row, sample in zip(ROWS, record["samples"]):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert "".join(span["text"] for part in sample["parts"] for span in part["spans"]) == text
        answer = row["messages"][1]["content"] + "<|im_end|>\n"
        trained = [s for part in sample["parts"] for s in part["spans"] if s["trained"]]
        assert "".join(span["text"] for span in trained) == answer
        assert sample["trained"] == len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        assert sample["tokens"] == lengths[-1]
    train = record["sets"]["train"]
    assert (train["tokens"], train["rows"], train["sequences"]) == (sum(lengths), 3, 3)
    assert (train["lengths"]["min"], train["lengths"]["max"]) == (min(lengths), max(lengths))
    assert train["lengths"]["mean"] == pytest.approx(sum(lengths) / 3)
    assert (record["steps"]["per_epoch"], record["steps"]["total"]) == (2, 2)
    assert train["ledger"]["sources"][0]["used"] == 3
    assert [(c["name"], c["count"]) for c in record["concerns"]["train"]][-1] == ("duplicates", 1)
    # To a file, with the text on stdout as ever.
    said, code = call("--n", "3", "--json", str(tmp_path / "numbers.json"))
    assert code == 0
    assert json.loads((tmp_path / "numbers.json").read_text()) == record
    assert "train set" in said.out


def test_colours(call, monkeypatch):
    plain, _ = call("--n", "1")
    coloured, _ = call("--n", "1", "--color", "always", "--width", "100")
    lines = coloured.out.split("\n")
    assert "\x1b[32mOne.\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m\x1b[32m⏎\x1b[0m" in lines
    # less -R begins every line without colour: each line closes what it opens.
    assert all(len(re.findall(r"\x1b\[[1-9]", line)) == line.count("\x1b[0m") for line in lines)
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    assert "\x1b[32m" in call("--n", "1")[0].out
    for words, variable in ((["--no-color"], ""), ([], "1")):
        monkeypatch.setenv("NO_COLOR", variable)
        assert "⟦One.<|im_end|>⏎⟧" in call("--n", "1", *words)[0].out
    assert "\x1b" not in plain.out


def test_exit_codes(call):
    assert call("--n", "0", "--strict")[1] == 1  # the duplicate
    assert call("--n", "0", "data.split=60,20,20", "--strict", "--set", "test")[1] == EXIT_USER
    for words, message in (
        (["data.trian=x"], "unknown key data.trian"),
        (["data.train=none.jsonl"], "data.train: no such file"),
        (["--row", "training.jsonl:7"], "the train set has no line 7 of training.jsonl"),
        (["--row", "4"], "--row 4: the train set has the rows 1 to 3"),
        (["--n", "-1"], "--n -1"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: No such file or directory"),
    ):
        said, code = call(*words)
        assert (code, said.out) == (EXIT_USER, "")
        assert said.err.startswith("error: ")
        assert message in said.err


def test_a_clean_set_passes_strictly(call, tmp_path):
    write_jsonl(tmp_path / "training.jsonl", ROWS[:2])
    said, code = call("--strict")
    assert code == 0
    assert said.out.endswith("0 warnings, 1 note\n")


def test_control_characters_reach_no_terminal(call, tmp_path):
    write_jsonl(tmp_path / "training.jsonl", [dialogue("\x1b]0;owned\x07\x9b31m", "\x1b[2J"), {"\x1b[2J": 1}])
    said, code = call("data.on_bad_row=skip", "data.max_dropped_fraction=0.6")
    assert code == 0
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.out)
    assert "⟦\\x1b[2J<|im_end|>⏎⟧" in said.out
