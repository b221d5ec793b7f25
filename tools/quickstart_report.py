"""What a DPO run has changed: preferences and sample answers before and after, on held-out questions.

    python -m tools.quickstart_report --run runs/NAME --base DIR --after DIR --data FILE.jsonl [--json FILE]

The pairs of the file go through both models here, once more and independently of the trainer: a pair counts
as won if the chosen answer's tokens have the higher mean log-prob. Reward accuracy and margins are the
run's own, from metrics.jsonl (a reward is beta times the log-ratio to the model before training, so both
are 0 at step 0). Samples are greedy.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from strop.errors import UserError
from tools.command_line import command_parser, run
from tools.plot import read_jsonl, read_run

NUM_SAMPLES, NEW_TOKENS, BATCH = 4, 40, 8


def render(tokenizer: Any, row: dict[str, Any], side: str) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many of them are the prompt's."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
    assert text.startswith(prompt), "the template does not render a prompt as the beginning of the dialogue"
    num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return tokenizer(text, add_special_tokens=False).input_ids, num_prompt


def mean_logprobs(model: Any, sequences: list[tuple[list[int], int]]) -> list[float]:
    """Mean log-prob of each sequence's tokens after its prompt."""
    import torch

    found = [0.0] * len(sequences)
    # Neighbours of like length share a batch, so little is padding.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = len(sequences[rows[-1]][0])
        tokens_SL = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_SL = torch.zeros_like(tokens_SL)
        for i, row in enumerate(rows):
            ids = sequences[row][0]
            tokens_SL[i, : len(ids)], mask_SL[i, : len(ids)] = torch.tensor(ids), 1
        first = min(sequences[row][1] for row in rows)  # no logits for what is prompt in all of them
        logits_SLV = model(
            input_ids=tokens_SL, attention_mask=mask_SL, logits_to_keep=longest - first + 1, use_cache=False
        ).logits[:, :-1]
        logp_SL = -torch.nn.functional.cross_entropy(
            logits_SLV.float().transpose(1, 2), tokens_SL[:, first:], reduction="none"
        )
        for i, row in enumerate(rows):
            ids, num_prompt = sequences[row]
            found[row] = logp_SL[i, num_prompt - first : len(ids) - first].mean().item()
    return found


def samples(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Greedy answers, batched with the prompts aligned at their ends."""
    tokenizer.padding_side = "left"
    prompts = [r["prompt"] for r in rows]
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = out[:, inputs["input_ids"].shape[1] :]
    return [
        tokenizer.decode(a, skip_special_tokens=True).strip()
        + ("" if model.generation_config.eos_token_id in a.tolist() else " ...")
        for a in answers
    ]


def measure(directory: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, margin and samples of the model in `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
    model.eval()
    with torch.inference_mode():
        sequences = [render(tokenizer, row, side) for side in ("chosen", "rejected") for row in rows]
        logps = mean_logprobs(model, sequences)
        chosen, rejected = logps[: len(rows)], logps[len(rows) :]
        return {
            "preference_accuracy": sum(c > r for c, r in zip(chosen, rejected)) / len(rows),
            "preference_margin": sum(c - r for c, r in zip(chosen, rejected)) / len(rows),
            "samples": samples(model, tokenizer, rows[:NUM_SAMPLES]),
        }


def run_rewards(directory: Path) -> dict[str, Any]:
    """First and last validation of the run, as it measured them."""
    names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    lines = [row for row in read_run(directory).metrics if all(name in row for name in names)]
    if not lines:
        raise UserError(f"{directory}: metrics.jsonl has no validation of a DPO run")
    keep = ("step", *names)
    return {"first": {k: lines[0][k] for k in keep}, "last": {k: lines[-1][k] for k in keep}}


def show(report: dict[str, Any]) -> None:
    """The report as tables that read well without colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=100)
    before, after, first, last = (report[k] for k in ("before", "after", "first", "last"))
    table = Table(box=box.ASCII, title=f"{report['num_pairs']} held-out pairs", title_justify="left")
    for heading, side in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_row(
        "chosen answer has the higher mean token log-prob",
        f"{before['preference_accuracy']:.0%}",
        f"{after['preference_accuracy']:.0%}",
    )
    table.add_row(
        "  by how much (nats per token)",
        f"{before['preference_margin']:+.2f}",
        f"{after['preference_margin']:+.2f}",
    )
    steps = f"(run's own, steps {first['step']} and {last['step']})"
    rows = (
        ("reward accuracy", "eval_rewards/accuracies", ".0%"),
        ("reward margin", "eval_rewards/margins", ".3f"),
        ("loss", "eval_loss", ".4f"),
    )
    for label, key, form in rows:
        table.add_row(f"{label} {steps}", format(first[key], form), format(last[key], form))
    console.print(table)
    answers = Table(
        box=box.ASCII, expand=True, title="sample answers (greedy)", title_justify="left", show_lines=True
    )
    for heading in ("question", "before", "after"):
        answers.add_column(heading, ratio=1)
    for question, old, new in zip(report["questions"], before["samples"], after["samples"]):
        answers.add_row(*(Text(cell) for cell in (question, old, new)))
    console.print(answers)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="model directory before training")
    parser.add_argument("--after", type=Path, required=True, help="exported model directory")
    parser.add_argument("--data", type=Path, required=True, help="held-out preference pairs")
    parser.add_argument("--json", type=Path, help="write the numbers and samples here as well")
    args = parser.parse_args()
    for path in (args.base, args.after, args.data):
        if not path.exists():
            raise UserError(f"{path} does not exist")
    rows = read_jsonl(args.data)
    started = time.monotonic()
    report = {
        "num_pairs": len(rows),
        "questions": [row["prompt"][-1]["content"] for row in rows[:NUM_SAMPLES]],
        **run_rewards(args.run),
        "before": measure(args.base, rows),
        "after": measure(args.after, rows),
    }
    report["seconds"] = round(time.monotonic() - started, 1)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    show(report)


if __name__ == "__main__":
    run(main)
