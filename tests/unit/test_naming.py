"""The name of a run, known before any YAML parser is. PyYAML, which is here, gives the truth for the scan."""

from __future__ import annotations

import pytest
import yaml

from strop.errors import UserError
from strop.slurm import naming
from strop.slurm.env import Job


def job(job_id=None, array=None, task=None):
    return Job(job_id, array, task, 0, (), "slurm" if job_id else "local", None, None, None, None)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("args", "who", "path"),
    [
        ([], job("12"), "runs/dpo-12"),
        ([], job("13", "12", "4"), "runs/dpo-12_4"),
        (["run.name=x"], job("12"), "runs/x"),
        (["run.name=x"], job("13", "12", "4"), "runs/x-4"),  # else all but one task would be refused
        (["run.name=x"], job("12", "12", "0"), "runs/x-0"),
        (["run.name=x", "run.name=y"], job("12"), "runs/y"),  # the last word counts
        (["run.name=null"], job("12"), "runs/dpo-12"),
        (["run.name='x y'", "run.dir=out/a"], job("12"), "out/a/x y"),
        (["checkpointing.checkpoint_dir=out"], job("12"), "out/dpo-12"),  # NeMo RL's name for it
        (["optim.name=adam"], job("12"), "runs/dpo-12"),
    ],
)
def test_from_the_command_line(args, who, path, tmp_path):
    assert naming.resolve("dpo", args, who, tmp_path).directory == tmp_path / path


@pytest.mark.parametrize(
    "text",
    [
        "run:\n  name: x\n  dir: out\n",
        "run:\n    # the name\n    name: 'x'  # quoted\n\n    dir: \"out\"\nmodel:\n  name: other\n",
        "model:\n  name: other\nrun: {name: x, dir: out}\n",
        "run: {name: x, dir: out}  # inline\n",
        "data:\n  run:\n    name: deeper\nrun:\n  dir: out\n  name: x\n",
        "run:\n  name: null\n  dir: out\n",
        "run:\n  allow_code_change: true\n  name:\n",
        "run:\nmodel:\n  name: other\n",
        "running:\n  name: other\n",
        "",
    ],
)
def test_from_the_file(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    run = (yaml.safe_load(text) or {}).get("run") or {}
    expected = {key: str(value).lower() if value is True else value for key, value in run.items() if value}
    assert naming.scan_config(path) == expected


def test_the_command_line_beats_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {name: x, dir: out}")
    args = ["--config", "c.yaml", "run.name=y"]
    assert naming.resolve("dpo", args, job("1"), tmp_path).directory == tmp_path / "out/y"


def test_default_file_of_the_repository(tmp_path):
    (tmp_path / "repo/configs").mkdir(parents=True)
    (tmp_path / "repo/configs/dpo.yaml").write_text("run.name: x\n")
    assert naming.resolve("dpo", [], job("1"), tmp_path / "repo").name == "x"


@pytest.mark.parametrize(
    "args", [["run.name=a/b"], ["run.name=.hidden"], ["--config", "no.yaml"], ["--config"]]
)
def test_refused(args, tmp_path):
    with pytest.raises(UserError, match=r"run\.name|--config"):
        naming.resolve("dpo", args, job("1"), tmp_path)
