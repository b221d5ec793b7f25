"""See what a run trains on: rows as the model gets them, what became of every row, and what looks wrong.

    python -m tools.look_at_data --config configs/sft.yaml [--n 5] [key=value ...]
    python -m tools.look_at_data --algo dpo data.train=pairs.jsonl --n 20 --color always | less -R
    python -m tools.look_at_data --algo sft --row training.jsonl:17

Prepares the data exactly as the trainer does (or finds what the trainer, tools.prepare or a former call left
in data.cache_dir; the job then finds it, too). Prints --n examples, decoded from the tokens trained on:

  trained      green; in a pipe or with --no-color ⟦between these marks⟧. The loss is taken of these tokens
  context      as it is: prompts, and the turns of others
  special      cyan: tokens such as BOS or end of turn, not text that looks like them
  ⏎ → · ‹U+›   line breaks, tabs, blanks at the ends, characters that cannot be seen

and of each set

  its ledger   rows read, used and left out, with the reason, for each source
  lengths      percentiles, a histogram, steps, how full the packed micro batches are
  concerns     BOS twice, no EOS, a prompt that is no prefix of prompt + completion, chosen == rejected,
               answers without text, answers told by their length, rows that are there twice or also in the
               training set, and more; each with how many, where, and what to do

Examples are spread evenly over the set; --seed N draws them, --longest takes the longest, --row shows one:
by its number (from 1) or as SOURCE:LINE, which also tells why a line is not used. Preference pairs show their
shared prompt once; text (cpt) shows blocks with the documents in them.

Bad rows do not stop this tool as they may stop training (data.on_bad_row, data.over_length,
data.max_dropped_fraction): all of them are counted, and a warning says that training would stop.

Without --algo the configuration's `algo:` or the file's name (my-dpo.yaml) decides. Exit code 0 (1 with
--strict and warnings); 78: your error in configuration or data; 74: storage.

--json FILE ("-": stdout, and nothing else there): {"sets": {name: {"ledger", "rows", "sequences", "tokens",
"trained_tokens", "lengths", "prompts", "trained", "histogram": [[from, up to, count], ...]}}, "steps": {...},
"concerns": {name: [{"level", "name", "text", "advice", "count", "share", "examples"}]}, "samples": [{"row",
"place", "tokens", "trained", "value", "parts": [{"title", "tokens", "trained", "spans": [{"text", "trained",
"special", "tokens"}]}]}]}. Text has "documents" beside "rows", which are its blocks.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from strop import config as config_module
from strop.errors import UserError
from strop.slurm import naming
from tools.command_line import Progress, command_parser, run, write_json

if TYPE_CHECKING:
    from strop.data.inspect_text import Paper
    from strop.data.looking import Report

PIPE_WIDTH = 100
MIN_WIDTH = 72
"""The tables need as much."""


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--algo", choices=config_module.ALGOS)
    parser.add_argument("--config", type=Path, help="default: configs/<algo>.yaml")
    parser.add_argument("--n", type=int, default=5, help="examples to show; 0: none")
    parser.add_argument("--set", default="train", help="the set that examples are taken from")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", action="append", metavar="N|SOURCE:LINE", help="show this row; repeatable")
    which.add_argument("--longest", action="store_true", help="show the longest rows")
    which.add_argument("--seed", type=int, help="draw the examples")
    parser.add_argument("--full", action="store_true", help="show long examples whole")
    parser.add_argument("--width", type=int, help="columns; default: the terminal's, or 100 in a pipe")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--no-color", dest="color", action="store_const", const="never")
    parser.add_argument("--json", metavar="FILE", help="write all numbers and examples; -: to stdout alone")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if there are warnings")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def paper(options: argparse.Namespace) -> Paper:
    from strop.data.inspect_text import Paper

    terminal = os.isatty(1)
    colour = options.color == "always" or (
        options.color == "auto" and terminal and not os.environ.get("NO_COLOR")
    )
    width = options.width or (shutil.get_terminal_size().columns if terminal else PIPE_WIDTH)
    return Paper(colour, max(MIN_WIDTH, width), options.full)


def look(options: argparse.Namespace) -> tuple[config_module.Config, Report]:
    from strop.data import looking
    from strop.data.tokenise import load_tokenizer
    from strop.doctor.examine import guess_algo

    algo = options.algo or guess_algo(options.config)
    if algo is None:
        raise UserError(f"--algo: which algorithm? One of {', '.join(config_module.ALGOS)}")
    notes: list[str] = []
    config = config_module.load(algo, options.config, options.overrides, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    kind = config_module.KINDS[algo]
    tokenizer = load_tokenizer(config.model)
    cache = config_module.cache_dir(config, naming.parent_directory(config.run.dir))
    report = looking.look(config, kind, tokenizer, cache, workers=1, progress=Progress())
    report.samples = looking.pick(
        report,
        config,
        kind,
        tokenizer,
        options.set,
        n=options.n,
        rows=options.row or (),
        longest=options.longest,
        seed=options.seed,
    )
    return config, report


def main() -> None:
    options = parse()
    if options.n < 0:
        raise UserError(f"--n {options.n}: a number of examples, 0 or more")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config, report = look(options)
    from strop.data import inspect_text, looking

    if options.json is not None:
        write_json(looking.as_json(report), options.json)
    if options.json != "-":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        for text in inspect_text.report_text(report, config, options.set, paper(options)):
            print(text)
    if options.strict and report.warnings:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
