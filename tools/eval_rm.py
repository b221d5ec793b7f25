"""How well a reward model agrees with people's preferences, on held-out pairs.

    python -m tools.eval_rm --model DIR --data FILE [FILE ...] [--json OUT] [--by FIELD] [--max-length N]
                            [--batch-tokens N] [--dtype fp32|bf16|fp16] [--chat-template FILE]
                            [--split NAME] [--subset NAME]

    python -m tools.convert_dcp_to_hf --run runs/my-rm --step best
    python -m tools.eval_rm --model runs/my-rm/export/step-000100 --data heldout.jsonl

DIR is any Hugging Face sequence classifier of one label (or a hub name): an export of --algo rm, or a reward
model of others. FILE holds the rows of DPO and RM (prompt, chosen, rejected; JSONL, JSON, Parquet, a
directory with validation.jsonl, a hub name), rendered with the tokenizer's chat template as in training. Of a
hub set --split is scored, by default the validation split that strop knows of it, and of --subset, if given.

What it tells:
  accuracy      share of the pairs whose chosen completion scores higher, with a 95 % interval (Wilson). A
                tie is not right; ties are counted.
  margin        score of the chosen less that of the rejected completion.
  calibration   the model's own confidence, sigmoid of the margin's size, against the share that is right,
                in bins; the error is their mean distance. A well calibrated model that is 80 % sure is
                right in 80 % of the cases.
  correlation   Pearson's and Spearman's, where rows have human ratings: chosen_rating and rejected_rating
                (also with hyphens), chosen_score and rejected_score, score_chosen and score_rejected
                (UltraFeedback); of the margins with their difference, or with the field `margin` (a
                strength of preference), and of the single scores with the single ratings.
  categories    the same for each value of --by FIELD; by default of category, source or subset, where rows
                have one.
  rows          what became of every row: used, or left out and why (as in a run's ledger).

--json writes all of it to a file (- for standard output, and the text to standard error). --max-length
defaults to 4096 tokens, or to what the model was made for. --dtype defaults to fp32 on a CPU and to bf16 on a
GPU. Exit code 0; 78: your error (the message names option, file or row).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError
from tools.command_line import Progress, command_parser, run, write_json


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--json", metavar="OUT", help="file to write, or -")
    parser.add_argument("--by", metavar="FIELD", help="field of the rows to group by")
    parser.add_argument("--max-length", type=int, metavar="N", help="longer pairs are left out and counted")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N", help="most tokens in a forward"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja chat template, or a file of one")
    parser.add_argument("--split", metavar="NAME", help="of hub sets")
    parser.add_argument("--subset", metavar="NAME", help="of hub sets: configuration name")
    options = parser.parse_args(argv)
    for name in ("max_length", "batch_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be greater than 0")
    if options.json and not Path(options.json).absolute().parent.is_dir():  # before hours go into scores
        raise UserError(f"--json {options.json}: there is no directory {Path(options.json).parent}")
    return options


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(report, as text). Raises UserError."""
    import numpy as np
    import torch
    from transformers.utils.logging import disable_progress_bar

    from strop.config import DataConfig, ModelConfig
    from strop.data.render import chat_template
    from strop.data.tokenise import load_tokenizer
    from strop.eval import agreement, rewards, text
    from strop.parallel import DTYPES

    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    model = rewards.load_model(options.model, DTYPES[dtype], device)
    tokenizer = load_tokenizer(ModelConfig(path=options.model, chat_template=options.chat_template))
    pairs, ledger, by = rewards.read_pairs(
        options.data,
        tokenizer,
        chat_template(options.chat_template, tokenizer),
        options.max_length or rewards.longest(model),
        options.by,
        DataConfig(hub_validation_split=options.split, hub_subset=options.subset),
    )
    print(ledger.table(), file=sys.stderr)
    progress = Progress()
    scores = rewards.score_pairs(
        model, pairs, options.batch_tokens, lambda done, total: progress("sequences scored", done, total)
    )
    report = {
        "model": options.model,
        "data": options.data,
        "dtype": dtype,
        **agreement.report(
            scores,
            np.array([pair.ratings for pair in pairs]),
            np.array([pair.human_margin for pair in pairs]),
            [pair.category for pair in pairs],
        ),
        "by": by,
        "rows": ledger.as_json(),
    }
    return report, text.describe(report, by)


def main() -> None:
    options = parse()
    try:
        report, text = evaluate(options)
    except UserError as error:
        from strop.eval.rewards import for_the_tool

        raise UserError(for_the_tool(str(error))) from error
    print(text, file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json:
        write_json(report, options.json)


if __name__ == "__main__":
    run(main)
