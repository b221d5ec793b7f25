"""What was submitted of a pipeline: <runs>/<name>.pipeline/graph.json, and who may submit.

    graph.json            parts in their order, each with its jobs, the newest last
    STAGE.yaml            the configuration of a run as its job gets it
    STAGE.dependants      the jobs that wait for this run (strop.slurm.dependants)
    NAME-PART-JOBID.out   the jobs' output
    STAGE.stores.json     what a preparation has made
    lock                  held while somebody submits, or runs the pipeline without Slurm

graph.json is written by rename after every submission. What a killed call has submitted without writing it
down is found again by its job's name and output (`jobs.adopt`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.errors import UserError
from strop.pipeline import parts as parts_module
from strop.pipeline.parts import Part
from strop.slurm import naming

SUFFIX = naming.PIPELINE_SUFFIX


@dataclass
class Node:
    """A part and its jobs."""

    name: str
    stage: str
    kind: str
    """prepare, run or export."""
    algo: str
    after: list[str]
    result: str
    run: Optional[str]
    step: str
    dtype: Optional[str]
    jobs: list[str] = field(default_factory=list)
    """Slurm's numbers; "local-PID" of a process on this machine."""
    outputs: list[str] = field(default_factory=list)
    """Of each job, the file."""
    exit_code: Optional[int] = None
    """Of the newest local process, once it has ended."""
    process: Optional[dict[str, Any]] = None
    """pid and start of a local process that has not ended."""
    again: bool = False
    """Its configuration was changed or extended: what it has done does not count until it has run again."""
    source: Optional[str] = None
    """Of a run: the part whose export it starts from."""
    words: list[str] = field(default_factory=list)
    """Of sbatch, with the parts that it waits for in place of their jobs; not those of one call only."""
    submitted: Optional[list[str]] = None
    """The words of its newest job; None if that is not known."""

    @property
    def outdated(self) -> bool:
        """Its newest job was submitted for something else than what is wanted now."""
        # Sorted: options may stand in another order in the file without being others.
        return self.again or (self.submitted is not None and sorted(self.submitted) != sorted(self.words))


@dataclass
class Graph:
    name: str
    directory: Path
    source: str
    """The YAML file."""
    cwd: str
    executor: str
    nodes: dict[str, Node]
    driver: Optional[dict[str, Any]] = None
    """host, pid and start of the process that runs it without Slurm."""

    def write(self) -> None:
        value = {**vars(self), "directory": str(self.directory)}
        value["nodes"] = {name: asdict(node) for name, node in self.nodes.items()}
        files.write_json(self.directory / "graph.json", value)

    def above(self, node: Node) -> list[Node]:
        """All that a part hangs on, nearest first."""
        found: dict[str, Node] = {}
        waiting = list(node.after)
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found[name] = self.nodes[name]
                waiting += self.nodes[name].after
        return list(found.values())

    def starts_from(self, node: Node) -> list[Node]:
        """The parts of the runs whose exports a run starts from, one from the other, nearest first."""
        found: list[Node] = []
        while node.source is not None:
            export = self.nodes[node.source]
            node = self.nodes[export.stage]
            found += [export, node]
        return found


def read(directory: Path) -> Optional[Graph]:
    """None if nothing was submitted yet."""
    value = files.read_json(directory / "graph.json")
    if not isinstance(value, dict):
        return None
    try:
        nodes = {name: Node(**node) for name, node in value["nodes"].items()}
        return Graph(**{**value, "directory": directory, "nodes": nodes})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{directory / 'graph.json'}: not written by this version: {error}") from error


def merged(old: Optional[Graph], new: Graph, parts: Sequence[Part]) -> Graph:
    """`new` with the nodes of `parts`, which keep what is known of their jobs."""
    for part in parts:
        dtype = part.args[part.args.index("--dtype") + 1] if "--dtype" in part.args else None
        node = Node(
            name=part.name,
            stage=part.stage,
            kind=part.kind,
            algo=part.template,
            after=list(part.after),
            result=str(part.result),
            run=None if part.run is None else str(part.run),
            step=part.step,
            dtype=dtype,
            source=part.source,
            words=parts_module.sbatch(
                new.name, new.directory, replace(part, once=()), f"afterok:{':'.join(part.after)}"
            ),
        )
        before = old.nodes.get(part.name) if old else None
        if before is not None:
            node.jobs, node.outputs, node.exit_code = before.jobs, before.outputs, before.exit_code
            node.process, node.again, node.submitted = before.process, before.again, before.submitted
        new.nodes[part.name] = node
    return new


def find(root: Path) -> list[Path]:
    """The directories of all pipelines among the runs, the newest first."""
    found = [path.parent for path in root.glob(f"*{SUFFIX}/graph.json")]
    return sorted(found, key=lambda path: (path / "graph.json").stat().st_mtime, reverse=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """UserError while somebody else submits (or runs) this pipeline."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{directory}: another call of tools.pipeline is at work on it") from None
    try:
        yield
    finally:
        os.close(descriptor)
