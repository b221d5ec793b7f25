"""GSM8K as training data: text, questions with answers, and correct against incorrect solutions.

    python bench/gsm8k_pairs.py --data grade-school-math/grade_school_math/data --out assets/gsm8k
    python bench/gsm8k_pairs.py --data example_model_solutions.jsonl --out assets/gsm8k-dpo     the pairs

The data are those of github.com/openai/grade-school-math (MIT licence). From a directory with train.jsonl and
example_model_solutions.jsonl come three sets, each with a training and a validation part:

    OUT/text/*.txt      question and answer of each training question as plain text, one paragraph each
    OUT/sft/*.jsonl     the same as a user's and an assistant's turn
    OUT/dpo/*.jsonl     preference pairs: for each test question the file has the solutions of four models,
                        each with `is_correct`; of several correct or incorrect ones the first is taken

Rows are split by their order in the files, so no question is in both parts of a set, and the pairs' questions
(GSM8K's test set) are in neither of the other sets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
VALIDATION_QUESTIONS = 256


def pair(row: dict[str, Any]) -> dict[str, Any] | None:
    """A preference row in message form; None if all solutions are right or all are wrong."""
    solutions = [row[model] for model in MODELS]
    right = [s["solution"] for s in solutions if s["is_correct"]]
    wrong = [s["solution"] for s in solutions if not s["is_correct"]]
    if not right or not wrong:
        return None
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "chosen": [{"role": "assistant", "content": right[0]}],
        "rejected": [{"role": "assistant", "content": wrong[0]}],
    }


def paragraph(row: dict[str, str]) -> str:
    """One document: an empty line would end it."""
    lines = f"Question: {row['question']}\nAnswer: {row['answer']}".splitlines()
    return "\n".join(line for line in lines if line.strip())


def turns(row: dict[str, str]) -> dict[str, Any]:
    """A conversation of one question."""
    question = {"role": "user", "content": row["question"]}
    return {"messages": [question, {"role": "assistant", "content": row["answer"]}]}


def read(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def write(folder: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory, or the file of solutions")
    parser.add_argument("--out", type=Path, help="default: assets/gsm8k, of the pairs alone assets/gsm8k-dpo")
    parser.add_argument("--train", type=int, default=512, help="training pairs")
    parser.add_argument("--validation", type=int, default=128, help="held-out pairs")
    args = parser.parse_args()
    whole = args.data.is_dir()
    file = args.data / "example_model_solutions.jsonl" if whole else args.data
    pairs = [p for row in read(file) if (p := pair(row)) is not None]
    if len(pairs) < args.train + args.validation:
        parser.error(f"{file} gives {len(pairs)} pairs, fewer than {args.train} + {args.validation}")
    parts = {"training": pairs[: args.train], "validation": pairs[args.train :][: args.validation]}
    if not whole:
        write(args.out or Path("assets/gsm8k-dpo"), parts)
        return
    out = args.out or Path("assets/gsm8k")
    write(out / "dpo", parts)
    rows = read(args.data / "train.jsonl")
    halves = {"training": rows[:-VALIDATION_QUESTIONS], "validation": rows[-VALIDATION_QUESTIONS:]}
    write(out / "sft", {name: [turns(row) for row in half] for name, half in halves.items()})
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, half in halves.items():
        (out / "text" / f"{name}.txt").write_text("\n\n".join(map(paragraph, half)) + "\n")
        print(f"{out / 'text' / name}.txt: {len(half)} paragraphs")


if __name__ == "__main__":
    main()
