"""A pipeline as Slurm jobs: submitted so that each waits for the success of those before it.

A part that is done gets no job, one that is under way keeps its own. The dependency names jobs that are still
to end, never one that Slurm may have forgotten. A run may go on as a successor job; what waits for it is
told by `strop.slurm.dependants`, by the job itself or, where the successor was there first, here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from strop.errors import UserError
from strop.pipeline import parts as parts_module
from strop.pipeline.graph import Graph, Node
from strop.pipeline.parts import Part
from strop.pipeline.standing import WAITING, WORKING, Standing
from strop.slurm import attempts, command, dependants, env, successor

SETTLE_S = 150.0
"""Slurm's KillWait (30 s) and UnkillableStepTimeout (60 s), and some more."""
POLL_S = 1.0
Say = Callable[[str], None]


def settle(graph: Graph, say: Say) -> None:
    """Wait for the jobs that Slurm is just ending. One that was cancelled still counts as one under way then,
    and what was made to wait for it would be cancelled with it. UserError if that takes too long."""
    deadline = time.monotonic() + SETTLE_S
    told = False
    while ending := [(number, name) for number, name, state in _queue(graph) if state == "COMPLETING"]:
        words = ", ".join(f"{name} (job {number})" for number, name in ending)
        if time.monotonic() > deadline:
            raise UserError(
                f"{words}: Slurm has not come to its end within {SETTLE_S:.0f} s; try again later"
            )
        if not told:
            say(f"waiting until Slurm has ended {words}")
            told = True
        time.sleep(POLL_S)


def adopt(graph: Graph) -> list[str]:
    """Take up jobs of this pipeline that are in the queue and not in the graph: the call that submitted them
    was killed, or a run goes on as a successor. Lines that say so."""
    lines = []
    queue = _queue(graph)
    for node in graph.nodes.values():
        living = [number for number, name, _ in queue if name == parts_module.job_name(graph.name, node.name)]
        if living and not (node.jobs and node.jobs[-1] in living):
            node.jobs.append(living[0])
            node.outputs.append(_output(graph, node.name, living[0]))
            node.again, node.submitted = False, None
            lines.append(f"{node.name}: job {living[0]} is in the queue already")
    return lines


def left_over(graph: Graph) -> tuple[list[str], list[str]]:
    """(jobs that wait for stages that are in the file no more, lines that say so). Those that have begun have
    a run to lose, and are only told of."""
    own = {parts_module.job_name(graph.name, part) for part in graph.nodes}
    numbers, lines = [], []
    for number, name, state in _queue(graph):
        if name not in own and state == "PENDING":
            numbers.append(number)
            lines.append(f"{name}: no such stage any more; job {number} is cancelled")
        elif name not in own:
            lines.append(f"{name}: no such stage any more; job {number} goes on (scancel {number} ends it)")
    return numbers, lines


def _queue(graph: Graph) -> list[tuple[str, str, str]]:
    """(number, name, state) of this pipeline's jobs that have not ended, by number; those of stages that were
    taken out of the file too."""
    text = command.slurm(["squeue", "--me", "--noheader", "--format=%i %j"])
    found = []
    for number, _, name in (line.strip().partition(" ") for line in text.splitlines()):
        if not name.startswith(parts_module.job_name(graph.name, "")):
            continue
        record = command.show_job(number)
        own = record is not None and record["JobState"] not in command.ENDED
        if own and record is not None and Path(record.get("StdOut", "")).parent == graph.directory:
            found.append((number, name, record["JobState"]))
    return sorted(found, key=lambda job: int(job[0]))


def _output(graph: Graph, part: str, number: str) -> str:
    return str(graph.directory / f"{parts_module.job_name(graph.name, part)}-{number}.out")


def to_submit(graph: Graph, standings: Mapping[str, Standing]) -> tuple[list[str], list[str]]:
    """(parts to submit, jobs to take out of the queue before): what is not done and not under way, what waits
    for such a part, and what waits in the queue with other options than are wanted now. What is done stays,
    unless a run before it goes on: an export or a store that was deleted is made again as it was. UserError
    for a part that runs already, though what it needs is not there."""
    wanted: list[str] = []
    other_than_before: set[str] = set()
    to_cancel: list[str] = []
    for node in graph.nodes.values():
        s = standings[node.name]
        # What is done needs to be done again for its model's sake only, not for the order of the stages.
        made_from = {node.stage if node.kind == "export" else node.source or ""}
        anew = made_from & other_than_before if s.state == "done" else set(node.after) & set(wanted)
        stale = s.state in WAITING and node.outdated
        if (s.state == "done" or s.active) and not anew and not stale:
            continue
        if s.state == "unknown":
            raise UserError(f"{node.name}: {s.detail}; try again when it does")
        if s.active and s.state not in WAITING:
            raise UserError(
                f"{node.name} is {s.state} (job {s.job_id}), but {', '.join(anew)} must run first"
            )
        if s.active and s.job_id is not None:
            to_cancel.append(s.job_id)
        wanted.append(node.name)
        if node.kind == "run" or other_than_before.intersection(node.after):
            other_than_before.add(node.name)
    return wanted, to_cancel


def unchanged(graph: Graph, standings: Mapping[str, Standing]) -> list[str]:
    """Lines about the jobs that have begun already with other options than are wanted now."""
    return [
        f"{node.name}: job {standings[node.name].job_id} has begun and goes on as it was submitted"
        for node in graph.nodes.values()
        if standings[node.name].state in WORKING and node.outdated
    ]


def check(graph: Graph, parts: Sequence[Part], wanted: Sequence[str]) -> None:
    """Ask Slurm whether it would take each job, before the first is submitted. UserError."""
    for part in parts:
        if part.name in wanted:
            words = parts_module.sbatch(graph.name, graph.directory, part, "")
            words = [words[0], "--test-only", *words[2:]]
            try:
                command.slurm(words, with_stderr=True)
            except command.NoController:
                raise
            except command.SlurmError as error:
                told = str(error)[len(" ".join(words)) + 2 :].replace("sbatch: error: ", "")
                why = "; ".join(line.strip() for line in told.splitlines() if line.strip())
                raise UserError(
                    f"stage {part.stage}: sbatch refuses the job of {part.name}: {why}"
                ) from error


def submit(
    graph: Graph, parts: Sequence[Part], standings: Mapping[str, Standing], wanted: Sequence[str], say: Say
) -> None:
    """Submit the parts in their order; after each one the graph is written."""
    for part in parts:
        if part.name not in wanted:
            continue
        node = graph.nodes[part.name]
        before = [
            graph.nodes[name] for name in part.after if name in wanted or standings[name].state != "done"
        ]
        words = parts_module.sbatch(graph.name, graph.directory, part, _dependency(before, standings))
        variables = env.all_variables()
        if part.kind == "run":
            variables["STROP_DEPENDANTS"] = str(_dependants(graph, node))
            _dependants(graph, node).unlink(missing_ok=True)
        number = command.slurm(words, variables=variables).strip().split(";")[0]
        node.jobs.append(number)
        node.outputs.append(_output(graph, node.name, number))
        node.again, node.exit_code, node.process = False, None, None
        node.submitted = node.words
        graph.write()
        for other in before:
            if other.kind == "run":
                _wait_for_successor_too(graph, other, number)
        after = (
            f" after {', '.join(f'{n.name} ({_current(n, standings)})' for n in before)}" if before else ""
        )
        say(f"{part.name}: job {number}{after}")


def _current(node: Node, standings: Mapping[str, Standing]) -> str:
    """The job that is to succeed: the newest submitted, or the one that a run goes on in."""
    s = standings.get(node.name)
    return s.job_id if s is not None and s.active and s.job_id else node.jobs[-1]


def _dependency(before: Sequence[Node], standings: Mapping[str, Standing]) -> str:
    numbers = [_current(node, standings) for node in before]
    return f"afterok:{':'.join(numbers)}" if numbers else ""


def _dependants(graph: Graph, node: Node) -> Path:
    return graph.directory / f"{node.stage}.dependants"


def _wait_for_successor_too(graph: Graph, run: Node, number: str) -> None:
    """`number` waits for a run that may have begun: its successor may be there already."""
    dependants.add(_dependants(graph, run), number)
    assert run.run is not None
    newest = (attempts.read_all(Path(run.run)) or [{}])[-1]
    behind = newest.get("successor")
    if behind and newest.get("state") == "X" and successor.waiting(behind):
        dependants.follow([number], newest["target"], behind)


def planned(graph: Graph, parts: Sequence[Part], standings: Mapping[str, Standing]) -> list[str]:
    """The commands of `submit`, with names in place of numbers that are not known yet."""
    wanted, _ = to_submit(graph, standings)
    lines = []
    for part in parts:
        if part.name not in wanted:
            lines.append(f"# {part.name}: {standings[part.name].state}")
            continue
        names = [f"<{n}>" if n in wanted else _current(graph.nodes[n], standings) for n in part.after
                 if n in wanted or standings[n].state != "done"]  # fmt: skip
        dependency = f"afterok:{':'.join(names)}" if names else ""
        lines.append(f"# {part.name}")
        if graph.executor == "local":
            lines.append(parts_module.shown(parts_module.local_command(part, "python")))
            continue
        lines.append(parts_module.shown(parts_module.sbatch(graph.name, graph.directory, part, dependency)))
    return lines


def cancel(graph: Graph) -> list[str]:
    """Take all jobs of the pipeline out of the queue, the last ones first. Their numbers."""
    numbers = [number for number, _, _ in reversed(_queue(graph))]
    if numbers:
        command.slurm(["scancel", *numbers])
    return numbers
