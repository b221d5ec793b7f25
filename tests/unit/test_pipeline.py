"""Pipelines: the file, its defaults and its mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from strop.pipeline import file, spec
from tests.unit.pipeline_helpers import ROOT, load, refused

pytestmark = pytest.mark.usefixtures("pipeline_place")


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
    shared = "dpo.beta: 3, sft.neftune_alpha: 5, train.shared_prefix: true"
    p = load(f"set: {{{shared}}}\nstages: {{sft: {{}}, dpo: {{}}, rm: {{after: sft}}}}\n")
    prefixes = [p.stage(name).config.train.shared_prefix for name in ("sft", "dpo", "rm")]
    assert prefixes == [None, True, True]
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
    ("stages:\n  sft: {export: {step: [1]}}\n", "p.yaml:2: step is [1]; expected best, latest or a number"),
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
    (
        "stages:\n  sft: {}\n  dpo: {set: {model: {path: /x}}}\n",
        "p.yaml:3: model.path: stage dpo starts from the export of sft; to start from another model,",
    ),
    (
        "stages:\n  sft: {}\n  dpo: {set: {model.revision: r}}\n",
        "p.yaml:3: model.revision: stage dpo starts from the export of sft",
    ),
    (
        "stages:\n  sft: {model: /y, set: {model.path: /x}}\n",
        "p.yaml:2: model.path: stage sft starts from /y",
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
    assert refused("stages: {sft: {}, dpo: {}}", "dpo.model.path=/x").startswith(
        "command line, stage dpo: model.path: stage dpo starts from the export of sft; "
    )
    assert load("stages: {sft: {}}", "sft.model.path=/x").stages[0].config.model.path == "/x"
    body_of_all = "set: {model.path: /x}\nstages: {sft: {}, dpo: {}}"
    assert load(body_of_all).stages[1].config.model.path.endswith("runs/p-sft/export/latest")
    assert refused(body, "sft.optim.lrr=1") == (
        "command line, stage sft: unknown key optim.lrr; did you mean optim.lr?"
    )


def test_a_reward_model_is_no_language_model():
    assert "dpo would start from the export of rm, a reward model" in refused("stages: {rm: {}, dpo: {}}\n")
    assert load("stages: {sft: {}, rm: {}, dpo: {after: sft}}\n").stage("dpo").source == "sft"
    assert load("stages: {rm: {}, rm-b: {algo: rm}}\n").stage("rm-b").source == "rm"


def test_help_names_every_key():
    told = spec.__doc__ or ""
    for key in {*file.TOP, *file.STAGE, *file.EXPORT} - {"after"}:
        assert re.search(rf"\b{key}:", told), key
