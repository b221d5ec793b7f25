"""bench/gsm8k_pairs.py on rows made by hand: what becomes of a question, and that none is on both sides."""

from __future__ import annotations

import json
from pathlib import Path

from bench import gsm8k_pairs


def solutions(number: int, *correct: bool) -> dict:
    row = {"question": f"test {number}?"}
    for model, is_correct in zip(gsm8k_pairs.MODELS, correct):
        row[model] = {"solution": f"{number} {model}", "is_correct": is_correct}
    return row


def test_three_sets_from_a_directory(tmp_path, monkeypatch):
    rows = [{"question": f"q{i}?\n\nmore", "answer": f"a{i}\n#### {i}"} for i in range(300)]
    tests = [solutions(0, True, True, True, True), *(solutions(i, False, True, True, False) for i in (1, 2))]
    for name, content in (("train", rows), ("example_model_solutions", tests)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--train", "1", "--validation", "1"]
    monkeypatch.setattr("sys.argv", argv)
    gsm8k_pairs.main()
    texts = {n: (tmp_path / f"o/text/{n}.txt").read_text() for n in ("training", "validation")}
    assert {n: len(text.split("\n\n")) for n, text in texts.items()} == {"training": 44, "validation": 256}
    assert texts["training"].startswith("Question: q0?\nmore\nAnswer: a0\n#### 0\n\nQuestion: q1?\n")
    sft = {n: lines(tmp_path / f"o/sft/{n}.jsonl") for n in texts}
    assert [row["messages"][0]["content"] for part in sft.values() for row in part] == [
        row["question"] for row in rows
    ]
    assert sft["validation"][0]["messages"] == [
        {"role": "user", "content": "q44?\n\nmore"},
        {"role": "assistant", "content": "a44\n#### 44"},
    ]
    (pair,) = lines(tmp_path / "o/dpo/validation.jsonl")  # question 0 has no wrong solution
    assert pair["prompt"][0]["content"] == "test 2?"
    assert pair["chosen"][0]["content"] == "2 6b_verification"
    assert pair["rejected"][0]["content"] == "2 6b_finetuning"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
