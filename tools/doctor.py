"""Everything that can be known about a job before it waits in a queue; no GPU, nothing written or fetched.

    python -m tools.doctor --algo dpo [--config FILE] [--nodes N] [--gpus-per-node N] [--gpu-mem GIB]
                           [--rows N|all] [--preview N] [--json] [key=value ...]

Looks at the configuration, the model's directory or hub cache, tokenizer and chat template, the first rows
of the data (through the trainer's own rendering and masks; a preview shows the trained tokens in colour or
[[...]]), steps and cadences, memory of a rank, disk, the run of that name if there is one, this host's
programs, and asks `sbatch --test-only` with the environment's SBATCH_* variables.

One line a check: ok, warn (it will run, but look at it) or FAIL (the job would end with an error), with
what to do. Exit code 0, or 78 if anything FAILs. Without --algo the configuration's `algo:` or the file's
name (llama3.1-8b-dpo.yaml) decides.

--json prints {"ok": bool, "checks": [{"level", "name", "text", "advice"}], "previews": [[title, [[text,
trained], ...]], ...], "numbers": {...}}; numbers has num_params, world_size, memory_bytes (by part),
checkpoint_bytes, steps and train_rows where they are known.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from rich.console import Console
from rich.text import Text

from strop import packages
from strop.config import ALGOS
from strop.errors import EXIT_USER, UserError
from tools.command_line import command_parser, run

if TYPE_CHECKING:
    from strop.doctor.checks import Check
    from strop.doctor.examine import Answer, Question

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
PREVIEW_CHARS = 1500


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--algo", choices=ALGOS)
    parser.add_argument("--config", help="default: configs/<algo>.yaml")
    parser.add_argument("--nodes", type=int, help="default: cluster.nodes of the configuration, else 1")
    parser.add_argument("--gpus-per-node", type=int, help="default: cluster.gpus_per_node, else a CPU job")
    parser.add_argument("--gpu-mem", type=float, metavar="GIB", help="memory of one GPU")
    parser.add_argument("--rows", default="300", metavar="N|all", help="rows to look at, of each source")
    parser.add_argument("--preview", type=int, default=1, metavar="N", help="rows to show")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def question(options: argparse.Namespace) -> Question:
    from strop.doctor.examine import Question, guess_algo

    algo = options.algo or guess_algo(Path(options.config) if options.config else None)
    if algo is None:
        raise UserError(f"--algo: which algorithm? One of {', '.join(ALGOS)}")
    if options.rows != "all" and not (options.rows.isdigit() and int(options.rows) > 0):
        raise UserError(f"--rows {options.rows}: expected a number greater than 0, or all")
    return Question(
        algo=algo,
        args=(*(["--config", options.config] if options.config else []), *options.overrides),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu_mem_gib=options.gpu_mem,
        rows=None if options.rows == "all" else int(options.rows),
        previews=options.preview,
        variables=dict(os.environ),
    )


def line(check: Check) -> Text:
    advice = f"\n       -> {check.advice}" if check.advice else ""
    text = check.text.replace("\n", "\n       ")
    head = (f"[{check.level}]".ljust(7), STYLES[check.level])
    return Text.assemble(head, (f"{check.name}: ", "bold"), text, (advice, "italic"))


def preview(title: str, pieces: Sequence[tuple[str, bool]], colour: bool) -> Text:
    """Trained tokens in colour on a terminal, in [[...]] elsewhere."""
    text = Text(f"--- {title or 'example'} " + ("(trained in green)" if colour else "([[trained]])") + "\n")
    shown = 0
    for piece, trained in pieces:
        piece = piece[: max(0, PREVIEW_CHARS - shown)]
        shown += len(piece)
        if colour:
            text.append(piece, style="bold green" if trained else "dim")
        else:
            text.append(f"[[{piece}]]" if trained else piece)
    return text


def show(answer: Answer) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for check in answer.checks:
        console.print(line(check))
    for title, pieces in answer.previews:
        console.print(preview(title, pieces, console.is_terminal))
    levels = [check.level for check in answer.checks]
    console.print(
        f"{levels.count('FAIL')} FAIL, {levels.count('warn')} warn, {levels.count('ok')} ok"
        + ("" if "FAIL" in levels else ": it can be submitted")
    )


def main() -> None:
    options = parse()
    packages.check()
    # Before transformers is imported: what is not here is reported, never fetched.
    asked = dict(os.environ)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    from strop.doctor.examine import examine

    answer = examine(dataclasses.replace(question(options), variables=asked))
    failed = any(check.level == "FAIL" for check in answer.checks)
    if options.json:
        print(json.dumps({"ok": not failed, **dataclasses.asdict(answer)}))
    else:
        show(answer)
    sys.exit(EXIT_USER if failed else 0)


if __name__ == "__main__":
    run(main)
