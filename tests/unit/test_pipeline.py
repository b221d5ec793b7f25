"""Pipelines without jobs: the file and its mistakes, the order, the commands, and how parts stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from strop.errors import UserError
from strop.pipeline import begin, exports, inputs, jobs, local, parts, spec, standing, text
from strop.pipeline import graph as graph_module
from strop.slurm import attempts, command
from tools import pipeline as tool

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "model:\n  path: base\ndata:\n  train: rows\ntrain:\n  max_steps: 4\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    for algo in ("cpt", "sft", "dpo"):
        Path(f"configs/{algo}.yaml").write_text(CONFIG)
    return tmp_path


def load(body: str, *words: str) -> spec.Pipeline:
    Path("p.yaml").write_text(body)
    return spec.load(Path("p.yaml"), words)


def refused(body: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load(body, *words)
    return str(error.value)


# --------------------------------------------------------------------------------------------- the file


def test_defaults():
    """The stage above, its export, configs/<algo>.yaml, the stage's name as its algorithm."""
    p = load("stages:\n  texts: {algo: prepare}\n  cpt:\n  sft: {set: {max_steps: 7}}\n  dpo:\n")
    assert p.name == "p"
    assert [(s.name, s.algo, s.after, s.source, s.prepares) for s in p.stages] == [
        ("texts", "prepare", (), None, "cpt"),
        ("cpt", "cpt", ("texts",), None, None),
        ("sft", "sft", ("cpt",), "cpt", None),
        ("dpo", "dpo", ("sft",), "sft", None),
    ]
    runs = Path("runs").resolve()
    configs = [s.config for s in p.stages if s.config]
    models = [c.model.path for c in configs]
    assert models == ["base", f"{runs}/p-cpt/export/latest", f"{runs}/p-sft/export/latest"]
    assert [c.run.name for c in configs] == ["p-cpt", "p-sft", "p-dpo"]
    assert [c.train.max_steps for c in configs] == [4, 7, 4]


@pytest.mark.parametrize("name", ["pipeline", "gsm8k-pipeline"])
def test_what_the_repository_brings(monkeypatch, name):
    """Each begins with texts and ends with DPO; nobody loads data for that."""
    monkeypatch.chdir(ROOT)
    p = spec.load(Path(f"configs/{name}.yaml"))
    assert p.stages[0].prepares == "cpt"
    assert [p.stage(s).source for s in ("cpt", "sft", "dpo")] == [None, "cpt", "sft"]


def test_what_wins():
    """A stage's file < the common keys < the stage's < the command line; options of sbatch likewise."""
    body = (
        "name: a\nset: {optim.lr: 2, train: {seed: 2}}\nslurm: {partition: low, mem: 4G}\nstages:\n"
        "  sft:\n    set: {optim: {lr: 3}}\n    slurm: {mem: false, no-requeue: true, nodes: 2}\n"
        "    export: {slurm: {mem: 8G}}\n"
    )
    (stage,) = load(body, "sft.optim.eps=4", "name=b").stages
    assert (stage.config.optim.lr, stage.config.train.seed, stage.config.optim.eps) == (3, 2, 4)
    assert stage.config.run.name == "b-sft"
    assert stage.slurm == {"partition": "low", "no_requeue": True, "nodes": "2"}
    assert stage.export_slurm == {"partition": "low", "mem": "8G"}


def test_what_is_set_for_all_stages_may_be_for_some():
    """A stage's own settings are for it alone; a key that is none is told, whichever stages there are."""
    body = "set: {dpo.beta: 3, sft.neftune_alpha: 5}\nstages: {sft: {}, dpo: {}, rm: {after: sft}}\n"
    p = load(body)
    assert p.stage("dpo").config.dpo.beta == 3
    assert p.stage("sft").config.sft.neftune_alpha == 5
    assert p.stage("rm").config.dpo.beta == 0.1
    assert "only dpo knows it: this is sft" in refused("stages: {sft: {set: {dpo.beta: 3}}}\n")
    assert "unknown key dpo.betta" in refused("set: {dpo.betta: 3}\nstages: {sft: {}}\n")


def test_two_stages_on_one_and_a_model_from_elsewhere():
    body = (
        "stages:\n  dpo2: {algo: dpo, after: sft2, model: sft}\n  sft: {after: []}\n"
        "  sft2: {algo: sft, model: /m}\n"
        "  dpo: {after: [sft]}\n"
    )
    p = load(body)
    assert [s.name for s in p.stages] == ["sft", "sft2", "dpo2", "dpo"]
    found = {s.name: (s.after, s.source, s.config.model.path) for s in p.stages}
    export = str(Path("runs/p-sft/export/latest").resolve())
    assert found["dpo2"] == (("sft2", "sft"), "sft", export)
    assert found["sft2"] == (("sft",), None, "/m")
    assert found["dpo"] == (("sft",), "sft", export)


def test_best_is_exported_where_there_is_one():
    body = "stages:\n  sft: {set: {checkpoint.best_metric: eval_loss}}\n  dpo: {export: {dtype: bf16}}\n"
    p = load(body)
    assert [p.export(s).name for s in p.stages] == ["best", "latest-bf16"]


MISTAKES = [
    ("stages:\n  sft: {confg: x}\n", "p.yaml:2: unknown key stages.sft.confg; did you mean config?"),
    ("nam: x\nstages: {sft: {}}\n", "p.yaml:1: unknown key nam; did you mean name?"),
    ("name: a b\nstages: {sft: {}}\n", "p.yaml:1: name is 'a b'"),
    ("name: a\n", "p.yaml: stages is missing"),
    ("stages: [sft, dpo]\n", "p.yaml: stages is ['sft', 'dpo'], expected a mapping from names to stages"),
    ("stages:\n  a.b: {}\n", "p.yaml: stages.a.b: a stage's name"),
    ("stages:\n  first: {config: x}\n", "p.yaml:2: stage first has no algo; expected prepare, cpt"),
    ("stages:\n  sft: {algo: stf}\n", "p.yaml:2: algo is 'stf'; expected prepare, cpt"),
    (
        "stages:\n  sft: {}\n  dpo: {after: [stf]}\n",
        "after: there is no stage stf; did you mean sft?",
    ),
    (
        "stages:\n  sft: {after: dpo}\n  dpo: {after: sft}\n",
        "p.yaml:2: stages hang on each other in a circle: sft -> dpo -> sft",
    ),
    ("stages:\n  sft: {set: {optim.lrr: 1}}\n", "p.yaml:2: unknown key optim.lrr; did you mean optim.lr?"),
    ("stages:\n  sft: {set: {optim.lr: x}}\n", "p.yaml:2: optim.lr is 'x', expected a number"),
    ("set: {dpo.beta: -1}\nstages: {dpo: {}}\n", "p.yaml:1: dpo.beta is -1.0; it must be greater than 0"),
    ("stages:\n  sft: {config: nosuch.yaml}\n", "no configuration file nosuch.yaml"),
    (
        "stages:\n  sft: {set: {run.name: x}}\n",
        "p.yaml:2: run.name of a stage follows from the pipeline's name",
    ),
    (
        "stages:\n  sft: {slurm: {dependency: x}}\n",
        "stages.sft.slurm.dependency: the pipeline sets",
    ),
    (
        "stages:\n  sft: {slurm: {nodes: [1]}}\n",
        "stages.sft.slurm.nodes is [1], expected one value",
    ),
    (
        "stages:\n  sft: {export: {step: last}}\n",
        "2: step is 'last'; expected best, latest or a number",
    ),
    (
        "stages:\n  sft: {export: {step: best}}\n",
        "2: step is best, which needs checkpoint.best_metric",
    ),
    (
        "stages:\n  sft: {export: {stp: 1}}\n",
        "unknown key stages.sft.export.stp; did you mean step?",
    ),
    ("stages:\n  sft: {export: {dtype: int8}}\n", "p.yaml:2: dtype is 'int8'; expected bf16, fp16, fp32"),
    ("stages:\n  t: {algo: prepare}\n", "p.yaml:2: t: no run hangs on it; say prepares: STAGE"),
    (
        "stages:\n  t: {algo: prepare, config: c}\n  sft: {}\n",
        "p.yaml:2: config: a preparation takes these from what it prepares",
    ),
    (
        "stages:\n  t: {algo: prepare}\n  sft: {model: t}\n",
        "p.yaml:3: model of sft is t, a preparation, which gives no model",
    ),
    ("stages:\n  sft: {}\n  cpt: {}\n  dpo: {after: [sft, cpt]}\n", "p.yaml:4: dpo comes after several runs"),
]


@pytest.mark.parametrize(("body", "message"), MISTAKES, ids=[m[1][:50] for m in MISTAKES])
def test_mistakes(body, message):
    assert message in refused(body)


def test_mistakes_of_the_command_line():
    body = "stages: {sft: {}}\n"
    assert refused(body, "stf.optim.lr=1") == (
        "command line: stf.optim.lr: expected name=, dir= or STAGE.KEY=; did you mean sft?"
    )
    assert refused(body, "sft.optim.lrr=1") == (
        "command line, stage sft: unknown key optim.lrr; did you mean optim.lr?"
    )


def test_a_reward_model_is_no_language_model():
    assert "dpo would start from the export of rm, a reward model" in refused("stages: {rm: {}, dpo: {}}\n")
    assert load("stages: {sft: {}, rm: {}, dpo: {after: sft}}\n").stage("dpo").source == "sft"
    assert load("stages: {rm: {}, rm-b: {algo: rm}}\n").stage("rm-b").source == "rm"


# ---------------------------------------------------------------------------------- what the stages read


def lacking(body: str, *names: str) -> str:
    p = load(body)
    with pytest.raises(UserError) as error:
        inputs.check(p, names or [stage.name for stage in p.stages])
    return str(error.value)


def model(path: str) -> None:
    Path(path).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (Path(path) / name).write_text("{}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{data.train: rows/nosuch.jsonl}", "stage dpo: data.train: no such file or directory: rows/nosuch"),
        ("{data.train: [there, rows/no]}", "stage dpo: data.train: no such file or directory: rows/no"),
        ("{data.train: /no/such}", "stage dpo: data.train: no such file or directory: /no/such"),
        ("{data.train: empty}", "stage dpo: data.train: empty has none of training.jsonl"),
        ("{data.validation: no.jsonl}", "stage dpo: data.validation: no such file or directory: no.jsonl"),
        (
            "{validation.watch: {a: no.jsonl}}",
            "stage dpo: validation.watch.a: no such file or directory: no.",
        ),
        ("{model.tokenizer: ./nosuch}", "stage dpo: model.tokenizer: no such directory: ./nosuch"),
        ("{dpo.reference: ./nosuch}", "stage dpo: dpo.reference: ./nosuch does not exist"),
        (
            "{model.chat_template: no.jinja}",
            "stage dpo: model.chat_template: neither a Jinja template nor a f",
        ),
        (
            "{data.prompt_template: no.txt}",
            "stage dpo: data.prompt_template: neither a template with {names}",
        ),
    ],
)
def test_missing_inputs_of_a_later_stage(settings, message):
    for name in ("rows", "there", "empty"):
        Path(name).mkdir()
    for name in ("rows", "there"):
        Path(f"{name}/training.jsonl").write_text("{}\n")
    model("base")
    body = "stages: {sft: {}, dpo: {}}\n"
    inputs.check(load(body), ["sft", "dpo"])
    body = f"stages: {{sft: {{}}, dpo: {{set: {settings}}}}}\n"
    assert lacking(body).startswith(message)
    inputs.check(load(body), ["sft"])  # of stages that are done nothing is needed any more


def test_missing_models():
    body = "stages: {sft: {model: ./nosuch}}\n"
    assert lacking(body) == "stage sft: model.path: ./nosuch does not exist"
    Path("half").mkdir()
    assert lacking("stages: {sft: {model: half}}\n").startswith(
        "stage sft: model.path: half has no config.json"
    )
    body = "stages: {sft: {}, rm: {}, dpo: {after: sft, set: {dpo.reference: ./nosuch}}}\n"
    assert lacking(body, "dpo") == "stage dpo: dpo.reference: ./nosuch does not exist"


def test_texts_and_stores_are_found_as_the_job_finds_them():
    """Text files are for cpt alone; a preparation reads what its run is configured with."""
    Path("texts").mkdir()
    Path("texts/a.md").write_text("a")
    body = "stages: {t: {algo: prepare}, cpt: {set: {data.train: texts}}}\n"
    inputs.check(load(body), ["t", "cpt"])
    assert lacking(body.replace("texts}", "texts/b.md}"), "t").startswith(
        "stage cpt: data.train: no such file"
    )
    assert "has none of" in lacking("stages: {sft: {set: {data.train: texts}}}\n")


def test_what_an_earlier_stage_makes_need_not_be_there():
    """Its exports, its other files, the stores of a preparation; but not those of a stage beside it."""
    body = (
        "stages:\n  t: {algo: prepare}\n  cpt: {}\n  sft: {}\n"
        "  dpo: {set: {dpo.reference: runs/p-cpt/export/latest, data.train: runs/.cache/text-1/x.jsonl}}\n"
    )
    inputs.check(load(body), ["dpo"])
    beside = (
        "stages:\n  sft: {}\n  a: {algo: sft}\n  b: {algo: sft, after: sft, model: runs/p-a/export/latest}\n"
    )
    told = lacking(beside, "b").splitlines()
    assert told[0].startswith("stage b: model.path: runs/p-a/export/latest does not exist")
    assert told[1] == "  stage a makes it: name it in `after` (or in `model`)"


# ------------------------------------------------------------------------------------------- the commands

WHOLE = """\
name: whole
slurm: {partition: gpu, time: "08:00:00"}
stages:
  texts: {algo: prepare, slurm: {cpus-per-task: 32}}
  cpt: {set: {cluster.nodes: 2, cluster.gpus_per_node: 8}}
  rows: {algo: prepare, prepares: sft, after: []}
  sft: {after: [cpt, rows], slurm: {nodes: 4}}
  dpo: {export: {dtype: bf16, slurm: {mem: 32G}}}
"""


def test_dry_run(monkeypatch, capsys):
    Path("p.yaml").write_text(WHOLE)
    monkeypatch.setattr("sys.argv", ["pipeline", "p.yaml", "--dry-run"])
    monkeypatch.setattr(command, "slurm", lambda *a, **k: pytest.fail("asked Slurm"))
    tool.main()
    shown = capsys.readouterr().out.replace(str(Path.cwd()), "HERE").replace(str(ROOT), "ROOT")
    assert shown == (ROOT / "tests/golden/pipeline_dry_run.txt").read_text()
    assert not Path("runs").exists()


def test_dry_run_without_slurm(monkeypatch, capsys):
    Path("p.yaml").write_text("name: x\nstages: {cpt: {}}\n")
    monkeypatch.setattr("sys.argv", ["pipeline", "p.yaml", "--dry-run", "--executor", "local"])
    tool.main()
    here = Path.cwd()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "",
        "# cpt",
        f"bash {ROOT}/sbatch/lib.sh cpt --config {here}/runs/x.pipeline/cpt.yaml",
        "# cpt.export",
        f"python -m tools.convert_dcp_to_hf --run {here}/runs/x-cpt --step latest "
        f"--out {here}/runs/x-cpt/export/latest --finished --update",
    ]


def test_templates_of_the_tools_differ_in_the_tool_only():
    """Both find the body as the trainers' templates find theirs."""
    tails = [
        (ROOT / f"sbatch/{name}.sh").read_text().partition("set -euo pipefail")[2].replace(tool_name, "TOOL")
        for name, tool_name in (("prepare", "tools.prepare"), ("convert", "tools.convert_dcp_to_hf"))
    ]
    assert tails[0] == tails[1]
    assert "TOOL" in tails[0]


def test_ranks_without_slurm():
    assert parts.local_ranks({}) == 1
    assert parts.local_ranks({"nodes": "2", "gpus_per_node": "4"}) == 8
    assert parts.local_ranks({"nodes": "2", "ntasks_per_node": "3", "gpus_per_node": "4"}) == 6


# ----------------------------------------------------------------------------------------- how parts stand

THREE = "name: x\nstages: {cpt: {}, sft: {}}\n"
PENDING = {"JobId": "9", "JobState": "PENDING", "Reason": "Dependency", "NodeList": ""}


def planned(body: str = THREE) -> graph_module.Graph:
    graph, _, _ = begin.plan(load(body), "slurm", False)
    for number, node in enumerate(graph.nodes.values(), 1):
        node.jobs, node.outputs = [str(number)], [str(graph.directory / f"{number}.out")]
    return graph


def judged(facts: dict[str, standing.Facts]) -> dict[str, tuple[str, str, int | None]]:
    graph = planned()
    found = standing.judge(graph, {**{n: standing.Facts(False, job=PENDING) for n in graph.nodes}, **facts})
    assert [s.name for s in found.values()] == list(graph.nodes)
    return {s.name: (s.state, s.detail, s.exit_code) for s in found.values()}


def job(state: str, code: str = "0:0", node: str = "node1") -> dict[str, str]:
    return {"JobId": "1", "JobState": state, "ExitCode": code, "Reason": "None", "NodeList": node}


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


# -------------------------------------------------------------------------------- a second call, a change


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


def test_a_changed_stage_is_refused_unless_asked():
    begun()
    changed = load(THREE, "sft.optim.lr=0.5")
    with pytest.raises(UserError, match=r"stage sft: .*\n  optim.lr: 1e-06 -> 0.5"):
        begin.plan(changed, "slurm", False)
    graph, found, again = begin.plan(changed, "slurm", True)
    assert (again, graph.nodes["sft"].again, graph.nodes["cpt"].again) == ({"sft"}, True, False)
    assert found[2].args[-1] == "run.allow_config_change=true"
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


def test_an_export_is_done_when_it_is_of_the_checkpoint_that_is_wanted():
    run, out = Path("run"), Path("out")
    out.mkdir()
    first = commit(run, 2)
    assert not exports.is_done(out, run, "latest", None)
    exports.mark(out, first, None)
    assert exports.is_done(out, run, "latest", None)
    assert not exports.is_done(out, run, "latest", "bf16")
    assert attempts.find_checkpoint(run, "best") is None
    assert exports.is_done(out, run, "best", None)  # without the checkpoint, what was exported stands
    (run / "checkpoints" / "BEST.json").write_text('{"step": 2}')
    commit(run, 4)
    assert not exports.is_done(out, run, "latest", None)
    assert exports.is_done(out, run, "best", None)
    assert exports.is_done(out, run, "2", None)
    (first / "manifest.json").write_text("written anew")
    assert not exports.is_done(out, run, "best", None)


def test_stores_are_those_of_the_configuration(tmp_path):
    config, store, record = Path("c.yaml"), Path("store"), Path("r.json")
    config.write_text("a")
    store.mkdir()
    sha = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    record.write_text(json.dumps({"config": str(config), "config_sha256": sha, "stores": [str(store)]}))
    assert standing.stores_are_there(record)
    config.write_text("b")
    assert not standing.stores_are_there(record)
    config.write_text("a")
    store.rmdir()
    assert not standing.stores_are_there(record)
    assert not standing.stores_are_there(Path("nosuch.json"))


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


def test_help_names_every_key():
    told = spec.__doc__ or ""
    for key in {*spec.TOP, *spec.STAGE, *spec.EXPORT} - {"after"}:
        assert re.search(rf"\b{key}:", told), key


def test_nothing_to_cancel():
    assert local.cancel(planned()) is None
