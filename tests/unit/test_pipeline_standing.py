"""How the parts of a pipeline stand, what is submitted therefore, and how it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from strop.errors import UserError
from strop.pipeline import graph as graph_module
from strop.pipeline import jobs, standing, text
from tests.unit.pipeline_helpers import PENDING, job, planned

pytestmark = pytest.mark.usefixtures("pipeline_place")


def judged(facts: dict[str, standing.Facts]) -> dict[str, tuple[str, str, int | None]]:
    graph = planned()
    found = standing.judge(graph, {**{n: standing.Facts(False, job=PENDING) for n in graph.nodes}, **facts})
    assert [s.name for s in found.values()] == list(graph.nodes)
    return {s.name: (s.state, s.detail, s.exit_code) for s in found.values()}


def test_what_hangs_on_a_failed_part_says_so():
    never = standing.Facts(False, job=job("CANCELLED", node="(null)"))
    facts = {
        "cpt": standing.Facts(True),
        "cpt.export": standing.Facts(False, job=job("FAILED", "1:0"), words="error: no space"),
        "sft": never,
        "sft.export": standing.Facts(False, job={}),  # forgotten by Slurm
    }
    assert judged(facts) == {
        "cpt": ("done", "", None),
        "cpt.export": ("failed", "error: no space", 1),
        "sft": ("cancelled", "cpt.export failed (exit 1): error: no space", None),
        "sft.export": ("cancelled", "cpt.export failed (exit 1): error: no space", None),
    }
    graph = planned()
    standings = standing.judge(graph, facts)
    assert standing.overall(standings) == "failed"
    assert standing.first_bad(standings).name == "cpt.export"
    assert not standings["sft"].next_action  # what is to be done is said once, at the cause
    assert standings["cpt.export"].next_action.endswith("python -m tools.pipeline p.yaml")


def test_states_of_jobs():
    for facts, expected in (
        (standing.Facts(False, job=PENDING), ("waiting", "", None)),
        (standing.Facts(False, job={**PENDING, "Reason": "Resources"}), ("queued", "Resources", None)),
        (standing.Facts(False, job={**PENDING, "Reason": "JobHeldUser"}), ("held", "JobHeldUser", None)),
        (standing.Facts(False, job=job("RUNNING")), ("starting", "", None)),
        (standing.Facts(False, job=job("FAILED", "0:9")), ("failed", "FAILED", 137)),
        (standing.Facts(False, job=job("CANCELLED", "0:15")), ("cancelled", "", 143)),
        (
            standing.Facts(False, job=job("CANCELLED", node="(null)")),
            ("cancelled", "on request, before it began", 0),
        ),
        (standing.Facts(False, job=None), ("unknown", "job 1: Slurm does not answer", None)),
    ):
        assert judged({"cpt": facts})["cpt"] == expected
    assert judged({"cpt": standing.Facts(False, job={})})["cpt"][0] == "failed"
    ended = judged({"cpt": standing.Facts(False, job=job("COMPLETED"))})["cpt"]
    assert (ended[0], ended[2]) == ("failed", 0)
    assert "is not there" in ended[1]


def test_what_is_submitted():
    """What is done or under way keeps its job; what waits for something that must run again is replaced."""
    graph = planned()
    of = dict.fromkeys(graph.nodes, standing.Facts(False, job=PENDING))
    broken = standing.Facts(False, job=job("FAILED", "1:0"))
    running = standing.Facts(False, job=job("RUNNING"))

    def asked(**facts: standing.Facts) -> tuple[list[str], list[str]]:
        return jobs.to_submit(graph, standing.judge(graph, {**of, **facts}))

    assert asked() == ([], [])
    assert asked(cpt=standing.Facts(True)) == ([], [])
    assert asked(cpt=broken) == (list(graph.nodes), ["2", "3", "4"])
    assert asked(cpt=standing.Facts(True), sft=broken) == (["sft", "sft.export"], ["4"])
    with pytest.raises(UserError, match=r"sft is starting \(job 3\), but cpt.export must run first"):
        asked(cpt=broken, sft=running)
    with pytest.raises(UserError, match="Slurm does not answer"):
        asked(cpt=standing.Facts(False, job=None))


def test_a_deleted_export_is_made_again_and_nothing_else():
    """What has trained from it needs it no more; what is still to train waits for it."""
    graph = planned("name: x\nstages: {cpt: {}, sft: {}, dpo: {}}\n")
    done = dict.fromkeys(graph.nodes, standing.Facts(True))
    gone = {**done, "cpt.export": standing.Facts(False, job=job("COMPLETED"))}
    assert jobs.to_submit(graph, standing.judge(graph, gone)) == (["cpt.export"], [])
    waiting = {**gone, "sft": standing.Facts(False, job=PENDING)}
    assert jobs.to_submit(graph, standing.judge(graph, waiting)) == (
        ["cpt.export", "sft", "sft.export", "dpo", "dpo.export"],
        ["3"],
    )
    longer = {**done, "dpo": standing.Facts(False, job=job("COMPLETED"))}
    graph.nodes["dpo"].again = True
    assert jobs.to_submit(graph, standing.judge(graph, longer)) == (["dpo", "dpo.export"], [])
    shown = [s.detail for s in standing.judge(graph, gone).values() if s.bad]
    assert shown == [f"it ended with exit code 0, but {graph.nodes['cpt.export'].result} is not there"]


def stopped_without_slurm(kind: str) -> tuple[graph_module.Graph, dict[str, standing.Facts]]:
    """A pipeline on this machine whose first part was asked to end. kind: prepare, run."""
    graph = planned("name: x\nstages: {t: {algo: prepare}, cpt: {}}\n")
    graph.executor = "local"
    for node in graph.nodes.values():
        node.jobs, node.outputs = [], []
    facts = dict.fromkeys(graph.nodes, standing.Facts(False))
    if kind == "prepare":
        graph.nodes["t"].jobs = ["local-5"]
        return graph, {**facts, "t": standing.Facts(False, exit_code=143)}
    run = Path(graph.nodes["cpt"].run or "")
    (run / "attempts").mkdir(parents=True)
    record = {"attempt": 1, "began": 1.0, "launcher": "local", "job_id": None, "pid": 5, "host": "h"}
    record |= {"state": "YIELD", "action": "stop", "cause": "cancelled", "exit_code": 75, "step": 0}
    record |= {"summary": "cancelled (step 0)\nnothing is committed yet\nnot requeued: it was cancelled"}
    (run / "attempts" / "0001.json").write_text(json.dumps(record))
    graph.nodes["cpt"].jobs = ["local-5"]
    return graph, {**standing.gather(graph), "t": standing.Facts(True)}


@pytest.mark.parametrize(
    ("kind", "name", "detail"),
    [("prepare", "t", "what is finished is kept"), ("run", "cpt", "nothing committed yet")],
)
def test_who_has_stopped_it_is_told_how_it_goes_on(kind, name, detail):
    graph, facts = stopped_without_slurm(kind)
    found = standing.judge(graph, facts)
    assert found[name].state == standing.overall(found) == "stopped"
    assert re.fullmatch(rf"stopped: on request[,;] {detail}", standing.told(found[name]))
    assert found[name].next_action == "to go on: python -m tools.pipeline p.yaml --executor local"
    assert found["cpt.export"].state == "not submitted"
    assert found["cpt.export"].cause is None


def test_a_run_that_could_not_begin_without_slurm():
    """Its newest process ended with 78 and left no attempt: the old attempt's words are not its own."""
    graph, _ = stopped_without_slurm("run")
    node = graph.nodes["cpt"]
    node.jobs, node.exit_code, node.outputs = ["local-5", "local-6"], 78, [str(Path("o").absolute())]
    Path("o").write_text("strop: the code has changed since the last attempt\n")
    s = standing.look(graph)["cpt"]
    assert standing.told(s) == "failed (exit 78): strop: the code has changed since the last attempt"


def test_tree():
    """A fork, and the reason under the stage that it belongs to."""
    body = "name: x\nstages: {sft: {}, a: {algo: dpo}, b: {algo: dpo, after: sft}}\n"
    graph = planned(body)
    facts = dict.fromkeys(graph.nodes, standing.Facts(True))
    facts["a"] = standing.Facts(False, job=job("FAILED", "78:0"), words="error: row 3")
    facts["b.export"] = standing.Facts(False, job=PENDING)
    console = Console(width=200, highlight=False)
    with console.capture() as shown:
        console.print(text.tree(graph, standing.judge(graph, facts)))
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert lines == [
        "pipeline x  failed",
        "sft   done         -> runs/x-sft/export/latest",
        "├─ a  failed       job 3",
        "│        failed (exit 78): error: row 3",
        "│        next: python -m tools.logs runs/x-a --why; then python -m tools.pipeline p.yaml",
        "└─ b  waiting      job 6",
    ]
