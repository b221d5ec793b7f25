"""How runs stand, from their directories alone; Slurm is asked only about jobs that may still run.

    python -m tools.status [--dir runs]                 all runs, newest first, one line each
    python -m tools.status runs/NAME [runs/NAME ...]    these in full (a bare NAME is looked up in --dir)
    python -m tools.status --watch [SECONDS] [runs/NAME ...]    again and again, until all stand still

States: queued, starting, training, validating, saving, stopping (they go on by themselves); finished;
stopped (committed, not requeued), cancelled; failed, held, pending (exit code 75: the controller did not
answer, and the requeue is still to be asked for), dead (an attempt without an outcome whose owner is gone).
Of an attempt, `lost` is the time from its last commit to its end, `resume` the next attempt's start-up,
`repeated` the steps done again. effective = time in steps that count / time since the first start without
the queue.

Exit code: 0; 1 if a named run is failed, held, pending or dead; 78 if there is no such run.

--json prints {"runs": [...]}; each run has the keys
    name directory algo state detail step total_steps eta_s tokens_per_s metrics evaluation job_id
    kept_s wall_s queue_s effective_ratio next_action
    checkpoints: committed best damaged unfinished size_bytes
    attempts: attempt job_id nodes began ended state cause action steps committed_step lost_s resume_s
              repeated_steps summary
Times are unix seconds, durations seconds, what is not known null. Keys may be added, none is renamed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from strop.errors import UserError
from strop.obs import run_files, status_text
from strop.obs.status import BAD, RUNNING, Status, assess
from tools.command_line import command_parser, run

WATCH_S = 2.0
PIPE_WIDTH = 10_000
"""Nothing is wrapped or cut off where no terminal has a width."""


def find(names: Sequence[str], root: Path) -> list[Path]:
    """The directories of the named runs; UserError with the nearest names."""
    return [_find_one(name, root) for name in names]


def _find_one(name: str, root: Path) -> Path:
    candidates = [Path(name)] if "/" in name else [root / name, Path(name)]
    for path in candidates:
        if run_files.is_run(path):
            return path
    existing = next((p for p in candidates if p.exists()), None)
    if existing is not None:
        content = sorted(p.name for p in existing.iterdir())[:5] if existing.is_dir() else []
        holds = f"it holds {', '.join(content)}" if content else "it is empty"
        what = holds if existing.is_dir() else "it is a file"
        raise UserError(f"{existing}: not a run of strop: no attempts/ in it ({what})")
    known = [p.name for p in newest_first(candidates[0].parent)]
    close = difflib.get_close_matches(candidates[0].name, known, n=3) or known[:3]
    hint = f"; there is {', '.join(close)}" if close else ""
    raise UserError(f"{candidates[0]}: no such run{hint} (a run's directory appears when its job starts)")


def newest_first(root: Path) -> list[Path]:
    """All runs of a directory, the one with the newest attempt first."""
    runs = [p for p in root.iterdir() if run_files.is_run(p)] if root.is_dir() else []
    return sorted(runs, key=lambda p: (p / "attempts").stat().st_mtime, reverse=True)


def look(options: argparse.Namespace) -> list[Status]:
    if options.runs:
        return [assess(run_files.read(path)) for path in find(options.runs, options.dir)]
    return [assess(run_files.read(path, quick=True)) for path in newest_first(options.dir)]


def render(statuses: Sequence[Status], in_full: bool, root: Path) -> RenderableType:
    if not statuses:
        return Text(f"no runs in {root}")
    if not in_full:
        return status_text.listing(statuses)
    pages = [status_text.page(s) for s in statuses]
    return Group(*(part for page in pages for part in (page, Text(""))))


def as_json(statuses: Sequence[Status]) -> str:
    return json.dumps({"runs": [dataclasses.asdict(s) for s in statuses]})


def show(options: argparse.Namespace) -> list[Status]:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    in_full = bool(options.runs)
    statuses = look(options)
    if options.watch is None or options.json or not sys.stdout.isatty():
        while True:
            print(as_json(statuses)) if options.json else _print(
                console, render(statuses, in_full, options.dir)
            )
            if options.watch is None or not _goes_on(statuses):
                return statuses
            sys.stdout.flush()
            time.sleep(options.watch)
            statuses = look(options)
    with Live(render(statuses, in_full, options.dir), console=console, auto_refresh=False) as live:
        while _goes_on(statuses):
            time.sleep(options.watch)
            statuses = look(options)
            live.update(render(statuses, in_full, options.dir), refresh=True)
    return statuses


def _print(console: Console, what: RenderableType) -> None:
    """Without the blanks that pad a table's last column."""
    with console.capture() as captured:
        console.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _goes_on(statuses: Sequence[Status]) -> bool:
    return any(s.state in (*RUNNING, "queued") for s in statuses)


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="runs/NAME")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where all runs are")
    parser.add_argument("--json", action="store_true", help="for programs; with --watch one line a look")
    parser.add_argument("--watch", nargs="?", type=float, const=WATCH_S, metavar="SECONDS")
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words[:-1]):  # `--watch runs/NAME`: the name is no number of seconds
        if word == "--watch" and not words[i + 1].replace(".", "", 1).isdigit():
            words[i] = f"--watch={WATCH_S}"
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    statuses = show(options)
    if options.runs and any(s.state in BAD for s in statuses):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
