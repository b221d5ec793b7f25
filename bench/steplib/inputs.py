"""Models and rows of the step benchmark, made here unless they are given.

SmolLM2-135M reads chat rows of the length of GSM8K's (a question of about 60 words, solutions of about 80);
the small model, 4 layers of 256 over a vocabulary of 32,000 words, sequences of 250 words. Rows are written
in the order in which strop's plan draws them, so that the peer, which reads them in file order, trains on the
same batches.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.data import plan

SEED = 42
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One model with its rows."""

    name: str
    model: Path
    pairs: list[Row]
    """prompt, chosen, rejected: texts, or lists of messages."""


def smollm2(model: Path, data: Path | None, num_rows: int) -> Task:
    if data is None:
        return Task("smollm2-135m", model, chat_pairs(num_rows))
    pairs = [json.loads(line) for line in data.read_text().splitlines()[:num_rows]]
    if len(pairs) < num_rows:
        raise SystemExit(f"--data: {data} has {len(pairs)} rows, {num_rows} are needed")
    return Task("smollm2-135m", model, pairs)


def chat_pairs(num_rows: int) -> list[Row]:
    """Word problems with worked solutions; the rejected one goes on for longer or stops early."""
    draw = random.Random(SEED)
    names, things = ("Ann", "Ben", "Carla", "Deepak", "Eva"), ("apples", "books", "coins", "tickets", "eggs")

    def line() -> str:
        a, b = draw.randint(2, 90), draw.randint(2, 90)
        who, what = draw.choice(names), draw.choice(things)
        return f"{who} has {a} {what} and gets {b} more, so {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {what}."

    def question() -> str:
        told = " ".join(
            f"{draw.choice(names)} buys {draw.randint(2, 90)} {draw.choice(things)} on day {day}, gives away "
            f"{draw.randint(2, 9)} of them and sells the rest to a friend."
            for day in range(draw.randint(2, 4))
        )  # fmt: skip
        return f"{told} How many {draw.choice(things)} are there in the end?"

    def answer() -> str:
        return "\n".join([*(line() for _ in range(draw.randint(2, 5))), f"A: {draw.randint(2, 500)}"])

    return [
        {
            "prompt": [{"role": "user", "content": question()}],
            "chosen": [{"role": "assistant", "content": answer()}],
            "rejected": [{"role": "assistant", "content": answer()}],
        }
        for _ in range(num_rows)
    ]


def small(folder: Path, num_rows: int) -> Task:
    """Random weights, one token a word; prompts of 50 words and completions of 200."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i + 3 for i in range(32000 - 3)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            eos_token_id=1, bos_token_id=None, pad_token_id=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    draw = random.Random(SEED)

    def text(num_words: int) -> str:
        return " ".join(f"w{draw.randrange(len(words) - 3)}" for _ in range(num_words))

    pairs = [{"prompt": text(50) + " ", "chosen": text(200), "rejected": text(200)} for _ in range(num_rows)]
    return Task("small-32k", folder / "small", pairs)


def write_rows(task: Task, algo: str, batch: int, folder: Path) -> tuple[Path, Path]:
    """(strop's file, the same rows in the order of strop's steps)."""
    rows = task.pairs
    if algo == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    steps = plan.steps_per_epoch(len(rows), batch)
    order = [int(r) for step in range(steps) for r in plan.step_rows(len(rows), batch, SEED, step)]
    ours, ordered = folder / f"{task.name}-{algo}.jsonl", folder / f"{task.name}-{algo}-ordered.jsonl"
    for path, chosen in ((ours, rows), (ordered, [rows[i] for i in order])):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return ours, ordered
