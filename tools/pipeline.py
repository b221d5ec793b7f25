"""Several runs as one graph of jobs: prepare -> CPT -> SFT -> RM or DPO, each export the next one's model.

    python -m tools.pipeline configs/pipeline.yaml [name=X] [STAGE.KEY=VALUE ...]
    python -m tools.pipeline configs/pipeline.yaml --dry-run      the tree and the sbatch commands
    python -m tools.pipeline configs/pipeline.yaml --wait         follow it to its end
    python -m tools.pipeline configs/pipeline.yaml --executor local       without Slurm, one after the other
    python -m tools.pipeline configs/pipeline.yaml --cancel
    python -m tools.status --pipeline NAME                        how it stands

All configurations are checked, and Slurm is asked whether it would take every job, before the first one is
submitted. A job waits for those before it (afterok) through their requeues and successors; when one fails for
good, Slurm cancels what hangs on it. The same call again goes on: what is done stays, what is under way is
left alone, the rest is submitted again. The runs are runs/NAME-STAGE, the state is runs/NAME.pipeline.

With --wait the exit code is 0 once all is done, else that of the stage that failed; Ctrl-C ends the watching
and not the jobs. Without Slurm, Ctrl-C lets the run under way commit and ends.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.live import Live

from strop.errors import EXIT_YIELD, UserError
from strop.pipeline import begin, inputs, jobs, local, spec, standing, text
from strop.pipeline import graph as graph_module
from strop.pipeline.graph import Graph
from strop.pipeline.parts import Part
from strop.pipeline.standing import Standing
from strop.slurm import command
from tools.command_line import command_parser, run

WATCH_S = 2.0
INTERRUPTED = 130


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser((__doc__ or "") + "\nThe file:\n" + (spec.__doc__ or "").partition("\n\n")[2])
    parser.add_argument("file", type=Path, help="pipeline.yaml")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--dry-run", action="store_true", help="print the graph and its commands, do nothing")
    parser.add_argument(
        "--wait", action="store_true", help="show the tree until all is done or something fails"
    )
    parser.add_argument("--cancel", action="store_true", help="take all its jobs out of the queue")
    parser.add_argument(
        "--allow-config-change", action="store_true", help="go on with runs whose configuration has changed"
    )
    parser.add_argument("words", nargs="*", metavar="STAGE.KEY=VALUE")
    return parser.parse_intermixed_args(argv)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    options = parse()
    if options.cancel:
        cancel(spec.directory(options.file, options.words))
        return
    pipeline = spec.load(options.file, options.words)
    if options.dry_run:
        graph, found, _ = begin.plan(pipeline, options.executor, options.allow_config_change)
        standings = standing.look(graph)
        begin.refuse_conflicts(graph, standings)
        inputs.check(pipeline, {graph.nodes[name].stage for name in jobs.to_submit(graph, standings)[0]})
        Console(highlight=False, soft_wrap=True).print(text.tree(graph, standings))
        say("\n".join(["", *jobs.planned(graph, found, standings)]))
        return
    if options.executor == "slurm" and shutil.which("sbatch") is None:
        raise UserError("sbatch: no such program here; --executor local runs it on this machine")
    try:
        with graph_module.locked(pipeline.directory):
            graph, exit_code = advance(pipeline, options)
    except command.SlurmError as error:
        raise UserError(f"{error}\nwhat was submitted before stays; the same call goes on") from error
    sys.exit(watch(graph) if options.wait and options.executor == "slurm" else exit_code)


def advance(pipeline: spec.Pipeline, options: argparse.Namespace) -> tuple[Graph, int]:
    """Submit what is to be submitted; without Slurm, run it. (the graph, an exit code)"""
    graph, found, changed = begin.plan(pipeline, options.executor, options.allow_config_change)
    if options.executor == "slurm":
        jobs.settle(graph, say)
        for line in jobs.adopt(graph):
            say(line)
    standings = standing.look(graph)
    begin.refuse_conflicts(graph, standings)
    begin.refuse_running(standings, everything=options.executor == "local")
    if options.executor == "local":
        inputs.check(pipeline, {s.stage for s in standings.values() if s.state != "done"})
        begin.write(pipeline, graph, changed)
        return graph, run_here(graph, found)
    wanted, to_cancel = jobs.to_submit(graph, standings)
    inputs.check(pipeline, {graph.nodes[name].stage for name in wanted})
    begin.write(pipeline, graph, changed)
    without_stage, lines = jobs.left_over(graph)
    for line in [*lines, *jobs.unchanged(graph, standings)]:
        say(line)
    jobs.check(graph, found, wanted)
    if without_stage or to_cancel:
        command.slurm(["scancel", *without_stage, *to_cancel])
    jobs.submit(graph, found, standings, wanted, say)
    if wanted and not options.wait:
        say(f"to see how it stands: python -m tools.status --pipeline {graph.name}")
    elif not options.wait:
        Console(highlight=False, soft_wrap=True).print(text.tree(graph, standing.look(graph)))
    return graph, 0


def run_here(graph: Graph, found: Sequence[Part]) -> int:
    try:
        exit_code = local.run(graph, found, say)
    except local.Interrupted:
        say("interrupted; the same call goes on")
        return INTERRUPTED
    return finish(graph, standing.look(graph)) or exit_code


def watch(graph: Graph) -> int:
    """Until nothing of it goes on. Ctrl-C: 130, and the jobs stay."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        if sys.stdout.isatty():
            with Live(console=console, auto_refresh=False) as live:
                for standings in _looks(graph):
                    live.update(text.tree(graph, standings), refresh=True)
        else:
            shown: dict[str, str] = {}
            for standings in _looks(graph):
                for name, s in standings.items():
                    if shown.get(name) != s.state:
                        say(f"{name}: {s.state}" + (f" ({s.detail})" if s.detail and not s.bad else ""))
                    shown[name] = s.state
    except KeyboardInterrupt:
        say(f"the jobs go on; python -m tools.status --pipeline {graph.name} shows them, --cancel ends them")
        return INTERRUPTED
    return finish(graph, standings)


def _looks(graph: Graph) -> Iterator[dict[str, Standing]]:
    while True:
        standings = standing.look(graph)
        yield standings
        if not any(s.active or s.state == "unknown" for s in standings.values()):
            return
        time.sleep(WATCH_S)


def finish(graph: Graph, standings: dict[str, Standing]) -> int:
    """Say how it ended. 0 if all is done, else the exit code of the first part that failed."""
    Console(highlight=False, soft_wrap=True).print(text.tree(graph, standings))
    failed = standing.first_bad(standings)
    if failed is None:
        return 0 if standing.overall(standings) == "done" else EXIT_YIELD
    print(f"{failed.name} {standing.told(failed)}\nnext: {failed.next_action}", file=sys.stderr)
    return failed.exit_code or 1


def cancel(directory: Path) -> None:
    graph = graph_module.read(directory)
    if graph is None:
        raise UserError(f"{directory}: nothing of it was submitted")
    if graph.executor == "local":
        pid = local.cancel(graph)
        say(f"asked process {pid} to stop: a run commits first" if pid else "nothing of it runs")
        return
    numbers = jobs.cancel(graph)
    say(f"cancelled: {', '.join(numbers)}" if numbers else "nothing of it is in the queue")


if __name__ == "__main__":
    run(main)
