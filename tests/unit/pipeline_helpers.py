"""Pipelines in the working directory, their jobs and their runs, without either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.errors import UserError
from strop.pipeline import begin, spec
from strop.pipeline import graph as graph_module
from strop.slurm import command

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "model:\n  path: base\ndata:\n  train: rows\ntrain:\n  max_steps: 4\n"


def load(body: str, *words: str) -> spec.Pipeline:
    Path("p.yaml").write_text(body)
    return spec.load(Path("p.yaml"), words)


def refused(body: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load(body, *words)
    return str(error.value)


THREE = "name: x\nstages: {cpt: {}, sft: {}}\n"
PENDING = {"JobId": "9", "JobState": "PENDING", "Reason": "Dependency", "NodeList": ""}


def planned(body: str = THREE) -> graph_module.Graph:
    graph, _, _ = begin.plan(load(body), "slurm", False)
    for number, node in enumerate(graph.nodes.values(), 1):
        node.jobs, node.outputs = [str(number)], [str(graph.directory / f"{number}.out")]
    return graph


def job(state: str, code: str = "0:0", node: str = "node1") -> dict[str, str]:
    return {"JobId": "1", "JobState": state, "ExitCode": code, "Reason": "None", "NodeList": node}


def begun(body: str = THREE) -> graph_module.Graph:
    """Both runs have begun, cpt has committed."""
    pipeline = load(body)
    graph, _, changed = begin.plan(pipeline, "slurm", False)
    graph.directory.mkdir(parents=True)
    begin.write(pipeline, graph, changed)
    for stage in pipeline.stages:
        run = pipeline.run(stage)
        (run / "attempts").mkdir(parents=True)
        (run / "attempts" / "0001.json").write_text(json.dumps({"state": "DONE", "attempt": 1, "began": 1.0}))
        (run / "config.yaml").write_text("algo: x\n")
        commit(run, 4)
    return graph


def commit(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(str(step))
    (folder / "COMMITTED.json").touch()
    return folder


def submitted(body: str, *words: str) -> graph_module.Graph:
    """Of a call that has written down what it has submitted, job 1 for the first part and so on."""
    pipeline = load(body, *words)
    graph, _, changed = begin.plan(pipeline, "slurm", False)
    graph.directory.mkdir(parents=True, exist_ok=True)
    for number, node in enumerate(graph.nodes.values(), 1):
        node.jobs, node.outputs, node.submitted = [str(number)], ["o"], node.words
    begin.write(pipeline, graph, changed)
    return graph


def in_queue(monkeypatch, directory: Path, jobs_there: dict[str, tuple[str, str]]) -> list[list[str]]:
    """A queue {number: (name, state)}, of somebody else's job too. What is asked of Slurm beside looking."""
    asked: list[list[str]] = []

    def slurm(words, **_):
        if words[0] == "squeue":
            named = [w[len("--name=") :].split(",") for w in words if w.startswith("--name=")]
            names = named[0] if named else None
            shown = [f"{n} {name}\n" for n, (name, _) in jobs_there.items() if not names or name in names]
            return "".join(shown)
        if words[:2] == ["scontrol", "show"]:
            name, state = jobs_there[words[-1]]
            where = "/other.pipeline" if name.endswith("-other") else directory
            return f"JobId={words[-1]} JobState={state} NodeList=n1\n   StdOut={where}/{name}.out"
        asked.append(list(words))
        return ""

    monkeypatch.setattr(command, "slurm", slurm)
    return asked
