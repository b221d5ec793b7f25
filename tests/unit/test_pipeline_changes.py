"""A second call of a pipeline whose stages were changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.errors import UserError
from strop.pipeline import begin, jobs, parts, standing
from tests.unit.pipeline_helpers import PENDING, THREE, begun, job, load, submitted

pytestmark = pytest.mark.usefixtures("pipeline_place")


def test_a_changed_stage_is_refused_unless_asked():
    begun()
    changed = load(THREE, "sft.optim.lr=0.5")
    with pytest.raises(UserError, match=r"stage sft: .*\n  optim.lr: 1e-06 -> 0.5"):
        begin.plan(changed, "slurm", False)
    graph, found, again = begin.plan(changed, "slurm", True)
    assert (again, graph.nodes["sft"].again, graph.nodes["cpt"].again) == ({"sft"}, True, False)
    assert parts.local_command(found[2], "python")[-1] == "run.allow_config_change=true"
    graph, _, again = begin.plan(load(THREE, "sft.log.every=2"), "slurm", False)  # trains the same
    assert (again, graph.nodes["sft"].again) == ({"sft"}, False)


def test_only_the_last_stage_can_be_extended():
    """Another stage has begun with what the earlier one has given."""
    begun()
    graph, _, _ = begin.plan(load(THREE, "sft.max_steps=9"), "slurm", False)
    begin.refuse_conflicts(graph, standing.judge(graph, dict.fromkeys(graph.nodes, standing.Facts(True))))
    assert graph.nodes["sft"].again
    graph, _, _ = begin.plan(load(THREE, "cpt.max_steps=9"), "slurm", False)
    facts = {name: standing.Facts(not node.again) for name, node in graph.nodes.items()}
    with pytest.raises(UserError, match="cpt has to train, but sft has trained from its former export"):
        begin.refuse_conflicts(graph, standing.judge(graph, facts))
    graph, _, _ = begin.plan(load(THREE, "cpt.max_steps=3"), "slurm", False)
    assert not graph.nodes["cpt"].again  # it has come further already


def test_a_stage_that_waits_may_be_changed_freely():
    """Its job reads the new configuration when it begins, so nothing of it has to be done once more."""
    submitted(THREE)
    graph, _, changed = begin.plan(load(THREE, "sft.optim.lr=0.5", "sft.max_steps=9"), "slurm", False)
    assert (changed, graph.nodes["sft"].again) == ({"sft"}, False)
    facts = dict.fromkeys(graph.nodes, standing.Facts(False, job=PENDING))
    assert jobs.to_submit(graph, standing.judge(graph, facts)) == ([], [])
    # One that has begun is another matter; and what an older version wrote down does not stay.
    graph.nodes["sft"].again = True
    graph.write()
    graph, _, _ = begin.plan(load(THREE), "slurm", False)
    assert not graph.nodes["sft"].again


def test_changed_options_of_a_job_that_waits():
    """It is submitted again with them, and what waits for it; one that runs goes on, and that is said."""
    submitted(THREE)
    body = "name: x\nstages: {cpt: {}, sft: {slurm: {mem: 8G}, export: {dtype: bf16}}}\n"
    graph, _, _ = begin.plan(load(body), "slurm", False)
    of = dict.fromkeys(graph.nodes, standing.Facts(False, job=PENDING))
    waiting = standing.judge(graph, of)
    assert jobs.to_submit(graph, waiting) == (["sft", "sft.export"], ["3", "4"])
    assert jobs.unchanged(graph, waiting) == []
    runs = standing.judge(graph, {**of, "sft": standing.Facts(False, job=job("RUNNING"))})
    assert jobs.to_submit(graph, runs) == (["sft.export"], ["4"])
    assert jobs.unchanged(graph, runs) == ["sft: job 3 has begun and goes on as it was submitted"]
    # A word for one call only is no change of what waits.
    graph, _, _ = begin.plan(load(THREE), "slurm", True)
    assert jobs.to_submit(graph, standing.judge(graph, of)) == ([], [])


def test_who_comes_after_a_stage_need_not_start_from_it():
    """dpo2 waits for dpo and starts from sft: dpo may be trained further, sft may not."""
    body = "name: x\nstages: {sft: {}, dpo: {}, dpo2: {algo: dpo, after: dpo, model: sft}}\n"
    begun(body)
    graph, _, _ = begin.plan(load(body, "dpo.max_steps=9"), "slurm", False)
    facts = {name: standing.Facts(not node.again) for name, node in graph.nodes.items()}
    found = standing.judge(graph, facts)
    begin.refuse_conflicts(graph, found)
    assert jobs.to_submit(graph, found) == (["dpo", "dpo.export"], [])
    graph, _, _ = begin.plan(load(body, "sft.max_steps=9"), "slurm", False)
    facts = {name: standing.Facts(not node.again) for name, node in graph.nodes.items()}
    with pytest.raises(UserError, match="sft has to train, but dpo has trained from its former export"):
        begin.refuse_conflicts(graph, standing.judge(graph, facts))


def test_runs_of_somebody_else_are_left_alone(monkeypatch):
    begun()
    for path in Path("runs/x.pipeline").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="x-cpt exists already, and not as a stage of this pipeline"):
        begin.plan(load(THREE), "slurm", False)


def test_relative_paths_mean_the_same(monkeypatch):
    begun()
    pipeline = load(THREE)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(UserError, match="relative paths mean something else"):
        begin.plan(pipeline, "slurm", False)
