"""What goes to sbatch, pinned by a golden file; and that the templates ask for the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from strop import submission
from strop.errors import UserError
from tools import submit as tool

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "model:\n  path: model\ndata:\n  train: pairs.jsonl\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my config.yaml").write_text(CONFIG)


def printed(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["submit", *words])
    tool.main()
    return capsys.readouterr().out


def test_dry_run(capsys, monkeypatch):
    text = printed(
        capsys, monkeypatch, "--algo", "dpo", "--nodes", "2", "--config", "my config.yaml", "--partition=gpu",
        "--account=science", "--time=08:00:00", "--gpus-per-node=8", "--slurm=mem=0", "--dry-run",
        "optim.lr=1e-6", "--name", "first",
    )  # fmt: skip
    golden = (ROOT / "tests/golden/submit_dpo.sbatch").read_text()
    assert text == golden.replace("ROOT", str(ROOT))
    assert list(Path().iterdir()) == [Path("my config.yaml")]  # nothing was written


def test_nodes_of_the_configuration(capsys, monkeypatch):
    Path("c.yaml").write_text(CONFIG + "cluster: {nodes: 4, gpus_per_node: 2}\n")
    text = printed(capsys, monkeypatch, "--algo", "sft", "--config", "c.yaml", "--dry-run")
    assert "#SBATCH --nodes=4\n" in text
    assert "#SBATCH --gpus-per-node=2\n" in text
    text = printed(capsys, monkeypatch, "--algo", "sft", "--config", "c.yaml", "--dry-run", "--nodes", "1")
    assert "#SBATCH --nodes=1\n" in text
    text = submission.submit("sft", ["--config", "c.yaml"], gpus_per_node=0, dry_run=True)
    assert "#SBATCH --gpus-per-node=0\n" in text  # asked for, so not the configuration's 2


def test_what_was_asked_for_beats_a_sites_variables():
    executor = submission._executor("dpo", 2, {"partition": "high", "exclusive": False})
    assert executor._make_submission_command(Path("x.sh")) == ["sbatch", "--partition=high", "x.sh"]
    assert "exclusive" not in executor._make_submission_file_text("true", "")


@pytest.mark.parametrize("algo", ["dpo", "sft", "kto", "cpt"])
def test_templates_ask_for_the_same(algo):
    text = (ROOT / f"sbatch/{algo}.sh").read_text()
    head = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    expected = {key: "" if value is True else value for key, value in submission.DEFAULTS.items()}
    assert head == {**expected, "job-name": algo, "nodes": "1"}
    commands = [i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#")]
    directives = [i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert max(directives) < min(commands)  # sbatch stops reading them at the first command


def test_templates_differ_in_the_algorithm_only():
    dpo, *others = [
        (ROOT / f"sbatch/{algo}.sh").read_text().splitlines()[2:] for algo in ("dpo", "sft", "kto", "cpt")
    ]
    for algo, text in zip(("sft", "kto", "cpt"), others):
        assert [line.replace("dpo", algo) for line in dpo] == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algo", "dpo", "--config", "my config.yaml", "optim.lrr=1"], "optim.lr"),
        (["--algo", "dpo", "--config", "nosuch.yaml"], "nosuch.yaml"),
        (["--algo", "ddpo"], "ddpo"),
        (["--algo", "dpo", "--config", "my config.yaml", "--nodes", "0"], "nodes: 0"),
        (["--algo", "dpo", "--config", "my config.yaml", "--name", "x", "run.name=y"], "--name"),
        (["--algo", "dpo", "--config", "my config.yaml", "--executor", "local", "--dry-run"], "local"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(monkeypatch, words, message):
    monkeypatch.setattr(submission, "_submit_slurm", lambda *a: pytest.fail("submitted"))
    monkeypatch.setattr("sys.argv", ["submit", *words])
    with pytest.raises(UserError, match=message):
        tool.main()
