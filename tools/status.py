"""How runs stand, from their directories alone; Slurm is asked only about jobs that may still run.

    python -m tools.status [--dir runs]                 all runs, newest first, one line each
    python -m tools.status runs/NAME [runs/NAME ...]    these in full (a bare NAME is looked up in --dir)
    python -m tools.status --pipeline NAME              a pipeline's stages as a tree (of all, below the runs)
    python -m tools.status --watch [SECONDS] [runs/NAME ...]    again and again, until all stand still

States: queued, starting, training, validating, saving, stopping (they go on by themselves); finished;
stopped (committed, not requeued), cancelled; failed, held, pending (exit code 75: the controller did not
answer, and the requeue is still to be asked for), dead (an attempt without an outcome whose owner is gone).
Of an attempt, `lost` is the time from its last commit to its end, `resume` the next attempt's start-up,
`repeated` the steps done again. effective = time in steps that count / time since the first start without
the queue.

Exit code: 0; 1 if a named run is failed, held, pending or dead, or the named pipeline failed; 78 if there is
no such run.

--json prints {"runs": [...], "pipelines": [...]}; each run has the keys
    name directory algo state detail step total_steps eta_s tokens_per_s metrics evaluation job_id
    kept_s wall_s queue_s effective_ratio next_action
    checkpoints: committed best damaged unfinished size_bytes
    attempts: attempt job_id nodes began ended state cause action steps committed_step lost_s resume_s
              repeated_steps summary
each pipeline has name directory state parts (detail, where the state is unreadable), each part of it
    name stage kind state detail job_id exit_code result step total_steps eta_s tokens_per_s cause next_action
Times are unix seconds, durations seconds, what is not known null. Keys may be added, none is renamed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from strop import similar
from strop.errors import UserError
from strop.obs import run_files, status_text
from strop.obs.status import BAD, RUNNING, Status, assess
from strop.pipeline import graph as graph_module
from strop.pipeline import standing
from strop.pipeline import text as pipeline_text
from strop.pipeline.graph import Graph
from strop.pipeline.standing import Standing
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
    hint = similar.meant_or_known(candidates[0].name, known)
    raise UserError(f"{candidates[0]}: no such run{hint} (a run's directory appears when its job starts)")


def newest_first(root: Path) -> list[Path]:
    """All runs of a directory, the one with the newest attempt first."""
    runs = [p for p in root.iterdir() if run_files.is_run(p)] if root.is_dir() else []
    return sorted(runs, key=lambda p: (p / "attempts").stat().st_mtime, reverse=True)


@dataclasses.dataclass(frozen=True)
class View:
    runs: list[Status]
    pipelines: list[tuple[Graph, dict[str, Standing]]]
    unreadable: dict[Path, str] = dataclasses.field(default_factory=dict)
    """Directories of pipelines of another version, and what is wrong with each."""

    @property
    def goes_on(self) -> bool:
        stages = [s for _, standings in self.pipelines for s in standings.values()]
        return any(r.state in (*RUNNING, "queued") for r in self.runs) or any(s.active for s in stages)


def look(options: argparse.Namespace) -> View:
    if options.pipeline is not None:
        graphs = [_pipeline(options.dir, options.pipeline)]
        return View([], [(graph, standing.look(graph)) for graph in graphs])
    if options.runs:
        return View([assess(run_files.read(path)) for path in find(options.runs, options.dir)], [])
    runs = [assess(run_files.read(path, quick=True)) for path in newest_first(options.dir)]
    pipelines, unreadable = [], {}
    for path in graph_module.find(options.dir):
        try:
            graph = graph_module.read(path)
        except UserError as error:
            unreadable[path] = str(error)
            continue
        if graph is not None:
            pipelines.append((graph, standing.look(graph)))
    return View(runs, pipelines, unreadable)


def _pipeline(root: Path, name: str) -> Graph:
    graph = graph_module.read(root / f"{name}{graph_module.SUFFIX}")
    if graph is None:
        known = [path.name[: -len(graph_module.SUFFIX)] for path in graph_module.find(root)]
        raise UserError(f"no pipeline {name} in {root}{similar.meant_or_known(name, known)}")
    return graph


def render(view: View, options: argparse.Namespace) -> RenderableType:
    trees = [pipeline_text.tree(graph, standings) for graph, standings in view.pipelines]
    for path, why in view.unreadable.items():
        trees.append(Text(f"pipeline {path.stem}  unreadable\n      {why}"))
    if options.pipeline is not None:
        return Group(*trees)
    if not view.runs and not trees:
        return Text(f"no runs in {options.dir}")
    if not options.runs:
        return Group(status_text.listing(view.runs), *(part for tree in trees for part in (Text(""), tree)))
    pages = [status_text.page(s) for s in view.runs]
    return Group(*(part for page in pages for part in (page, Text(""))))


def as_json(view: View) -> str:
    pipelines = [standing.as_dict(graph, standings) for graph, standings in view.pipelines]
    for path, why in view.unreadable.items():
        what = {"name": path.stem, "directory": str(path), "state": "unreadable", "detail": why, "parts": []}
        pipelines.append(what)
    return json.dumps({"runs": [dataclasses.asdict(s) for s in view.runs], "pipelines": pipelines})


def show(options: argparse.Namespace) -> View:
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    view = look(options)
    if options.watch is None or options.json or not sys.stdout.isatty():
        while True:
            print(as_json(view)) if options.json else _print(console, render(view, options))
            if options.watch is None or not view.goes_on:
                return view
            sys.stdout.flush()
            time.sleep(options.watch)
            view = look(options)
    with Live(render(view, options), console=console, auto_refresh=False) as live:
        while view.goes_on:
            time.sleep(options.watch)
            view = look(options)
            live.update(render(view, options), refresh=True)
    return view


def _print(console: Console, what: RenderableType) -> None:
    """Without the blanks that pad a table's last column."""
    with console.capture() as captured:
        console.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="runs/NAME")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where all runs are")
    parser.add_argument("--pipeline", metavar="NAME", help="the stages of this one")
    parser.add_argument("--json", action="store_true", help="for programs; with --watch one line a look")
    parser.add_argument("--watch", nargs="?", type=float, const=WATCH_S, metavar="SECONDS")
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words[:-1]):  # `--watch runs/NAME`: the name is no number of seconds
        if word == "--watch" and not words[i + 1].replace(".", "", 1).isdigit():
            words[i] = f"--watch={WATCH_S}"
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    view = show(options)
    failed = any(standing.overall(standings) == "failed" for _, standings in view.pipelines)
    if (options.runs and any(s.state in BAD for s in view.runs)) or (options.pipeline and failed):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
