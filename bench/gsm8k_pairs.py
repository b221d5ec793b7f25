"""Real preference pairs: a correct against an incorrect solution of the same GSM8K question.

    python bench/gsm8k_pairs.py --data example_model_solutions.jsonl --out assets/gsm8k-dpo

The file is part of github.com/openai/grade-school-math (MIT licence): for each test question the solutions
of four models, each with `is_correct`. Questions are split by their order in the file, so no question is
in both parts; of a question with several correct or incorrect solutions the first of each is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="example_model_solutions.jsonl")
    parser.add_argument("--out", type=Path, default=Path("assets/gsm8k-dpo"))
    parser.add_argument("--train", type=int, default=512, help="training pairs")
    parser.add_argument("--validation", type=int, default=128, help="held-out pairs")
    args = parser.parse_args()
    with args.data.open() as lines:
        pairs = [p for line in lines if (p := pair(json.loads(line))) is not None]
    if len(pairs) < args.train + args.validation:
        parser.error(f"{args.data} gives {len(pairs)} pairs, fewer than {args.train} + {args.validation}")
    parts = {"training": pairs[: args.train], "validation": pairs[args.train :][: args.validation]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{args.out / name}.jsonl: {len(rows)} pairs")


if __name__ == "__main__":
    main()
