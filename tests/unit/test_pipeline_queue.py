"""The jobs of a pipeline in Slurm's queue, and what is written down of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.errors import UserError
from strop.pipeline import begin, jobs, local, standing
from strop.pipeline import graph as graph_module
from strop.slurm import command
from tests.unit.pipeline_helpers import PENDING, THREE, in_queue, load, planned, submitted
from tools import pipeline as tool
from tools import status as status_tool

pytestmark = pytest.mark.usefixtures("pipeline_place")


def test_jobs_that_are_just_ending_are_waited_for(monkeypatch):
    """Cancelled a moment ago: neither taken up again nor waited for by the new ones."""
    graph = planned()
    states = ["COMPLETING", "COMPLETING", "CANCELLED"]

    def slurm(words, **_):
        if words[0] == "squeue":
            return "1 x-cpt\n" if states else ""
        text = f"JobId=1 JobState={states.pop(0)} NodeList=n1\n   StdOut={graph.directory}/x-cpt-1.out"
        return text

    monkeypatch.setattr(command, "slurm", slurm)
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    said: list[str] = []
    jobs.settle(graph, said.append)
    assert (said, states) == (["waiting until Slurm has ended x-cpt (job 1)"], [])
    states[:] = ["COMPLETING"] * 3
    monkeypatch.setattr(jobs, "SETTLE_S", -1.0)
    with pytest.raises(UserError, match=r"x-cpt \(job 1\): Slurm has not come to its end"):
        jobs.settle(graph, said.append)


def test_jobs_of_stages_that_were_taken_out(monkeypatch):
    """Cancelled while they wait; one that runs is told of; others' jobs of a like name are left alone."""
    graph = planned()
    there = {
        "1": ("x-cpt", "RUNNING"),
        "2": ("x-gone", "RUNNING"),
        "3": ("x-gone.export", "PENDING"),
        "4": ("x-other", "PENDING"),
    }
    asked = in_queue(monkeypatch, graph.directory, there)
    assert jobs.left_over(graph) == (
        ["3"],
        [
            "x-gone: no such stage any more; job 2 goes on (scancel 2 ends it)",
            "x-gone.export: no such stage any more; job 3 is cancelled",
        ],
    )
    assert jobs.cancel(graph) == ["3", "2", "1"]
    assert asked == [["scancel", "3", "2", "1"]]


def test_what_waited_for_a_stage_that_was_taken_out():
    """Its job would be cancelled with what it waits for."""
    submitted("name: x\nstages: {cpt: {}, sft: {}, dpo: {}}\n")
    graph, _, _ = begin.plan(load("name: x\nstages: {cpt: {}, dpo: {}}\n"), "slurm", False)
    of = dict.fromkeys(graph.nodes, standing.Facts(False, job=PENDING))
    assert jobs.to_submit(graph, standing.judge(graph, of)) == (["dpo", "dpo.export"], ["5", "6"])


def test_one_call_at_a_time():
    directory = Path("x.pipeline")
    busy = pytest.raises(UserError, match="another call")
    with graph_module.locked(directory), busy, graph_module.locked(directory):
        pass
    with graph_module.locked(directory):
        pass


def test_the_graph_comes_back_as_it_was_written():
    graph = planned()
    graph.directory.mkdir(parents=True)
    graph.write()
    again = graph_module.read(graph.directory)
    assert vars(again) == vars(graph)
    assert graph_module.read(Path("nosuch")) is None
    assert [node.name for node in graph.above(graph.nodes["sft.export"])] == ["sft", "cpt.export", "cpt"]


def test_a_graph_of_another_version_hides_nothing(capsys):
    """Neither the others, nor from a program."""
    submitted(THREE)
    other = Path("runs/old.pipeline")
    other.mkdir()
    (other / "graph.json").write_text('{"name": "old", "parts": []}')
    for words in ([], ["--json"]):
        options = status_tool.parse(["--dir", str(Path("runs").resolve()), *words])
        status_tool.show(options)
        out = capsys.readouterr().out
        if words:
            found = {p["name"]: p["state"] for p in json.loads(out)["pipelines"]}
            assert found == {"x": found["x"], "old": "unreadable"}
            assert found["x"] != "unreadable"
        else:
            assert "pipeline old  unreadable\n      " in out
            assert "graph.json: not written by this version" in out
            assert "pipeline x  " in out


def test_cancel_needs_no_file_without_mistakes(monkeypatch, capsys):
    """A stage is misspelt, or its configuration is gone: the jobs can be cancelled all the same."""
    graph = submitted(THREE)
    Path("p.yaml").write_text("name: x\nstages: {cpt: {confg: y}, stf: {config: gone.yaml}}\n")
    asked = in_queue(monkeypatch, graph.directory, {"3": ("x-sft", "PENDING")})
    monkeypatch.setattr("sys.argv", ["pipeline", "p.yaml", "--cancel", "cpt.optim.lrr=1"])
    tool.main()
    assert (asked, capsys.readouterr().out) == ([["scancel", "3"]], "cancelled: 3\n")
    monkeypatch.setattr("sys.argv", ["pipeline", "p.yaml", "--cancel", "name=y"])
    with pytest.raises(UserError, match=r"runs/y.pipeline: nothing of it was submitted"):
        tool.main()


def test_nothing_to_cancel():
    assert local.cancel(planned()) is None
