"""What a pipeline submits, and what it runs without Slurm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from strop import config
from strop.errors import UserError
from strop.pipeline import begin, parts
from strop.slurm import command
from tests.unit.pipeline_helpers import CONFIG, ROOT, load
from tools import pipeline as tool

pytestmark = pytest.mark.usefixtures("pipeline_place")

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


CHAIN = "stages: {cpt: {}, sft: {}, rows: {algo: prepare, prepares: dpo}, dpo: {}}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["path=base"]),
        (["cpt.model.revision=r"], ["path=base", "revision=r"]),
        (["cpt.model.tokenizer=t", "cpt.model.revision=r"], ["path=base", "tokenizer=t", "revision=r"]),
        # The export of sft has its own tokenizer; of the hub's commit of the first model it knows nothing.
        (["sft.model.tokenizer=t", "cpt.model.revision=r"], ["path=base", "tokenizer=t"]),
        (["cpt.model.tokenizer=t", "sft.model.tokenizer=u"], ["path=base", "tokenizer=u"]),
        (["cpt.model.chat_template={{a}}", "sft.model.tokenizer=u"], ["path=base", "tokenizer=u"]),
        (["sft.model.chat_template={{b}}"], ["path=base", 'chat_template="{{b}}"']),
        (
            ["cpt.model.chat_template={{a}}", "sft.model.chat_template={{b}}", "cpt.model.tokenizer=t"],
            ["path=base", "tokenizer=t", 'chat_template="{{b}}"'],
        ),
    ],
)
def test_a_preparation_has_the_tokenizer_that_the_run_will_find(words, expected):
    """The last one on the way that is set, with the template that is set with it or behind it."""
    pipeline = load(CHAIN, *words)
    (part,) = [p for p in parts.of(pipeline) if p.kind == "prepare"]
    assert [w.removeprefix("model.") for w in part.args if w.startswith("model.")] == expected


def test_a_template_of_several_lines_reaches_the_preparation():
    template = "a {{ x }}\n  b: '{% y %}' # c\n\n"
    Path("configs/sft.yaml").write_text(
        CONFIG.replace("model:", f"model:\n  chat_template: {json.dumps(template)}")
    )
    (part,) = [p for p in parts.of(load(CHAIN)) if p.kind == "prepare"]
    words = [w for w in part.args if w.startswith("model.")]
    assert config.load("dpo", Path("configs/dpo.yaml"), words).model.chat_template == template


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


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"gpus_per_node": "a100:4"}, 4),
        ({"gpus_per_node": "a100:4,h100:2", "nodes": "2"}, 12),
        ({"gpus_per_node": "0", "nodes": "2"}, 2),  # no GPUs: one rank a node
        ({"nodes": "2-4"}, 2),  # what Slurm promises
        ({"nodes": "2", "gpus": "8"}, 8),
        ({"gres": "gpu:4"}, 4),
        ({"gres": "scratch:1,gpu:a100:2", "nodes": "3"}, 6),
        ({"gres": "gpu"}, 1),
        ({"gres": "scratch:1"}, 1),
        ({"ntasks": "1"}, 1),
    ],
)
def test_ranks_of_the_options_as_sbatch_reads_them(options, ranks):
    assert parts.local_ranks(options) == ranks


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("ntasks: 4", "slurm.ntasks is '4': it does not tell the ranks of a run; say ntasks_per_node"),
        ("gpus_per_task: 1", "slurm.gpus_per_task is '1': it does not tell"),
        ("nodes: 2k", "slurm.nodes is '2k'; how many ranks"),
        ("ntasks_per_node: x", "slurm.ntasks_per_node is 'x'; how many"),
        ("gpus_per_node: 'a:b:c'", "slurm.gpus_per_node is 'a:b:c', expected a number of GPUs, such as 4"),
    ],
)
def test_options_that_do_not_tell_the_ranks_without_slurm(option, message):
    """Of a run; preparations and exports have no ranks."""
    body = f"stages: {{t: {{algo: prepare, slurm: {{ntasks: 4}}}}, sft: {{slurm: {{{option}}}}}}}"
    with pytest.raises(UserError, match=rf"^stage sft: {re.escape(message)}"):
        begin.plan(load(body), "local", False)
    begin.plan(load(body), "slurm", False)
