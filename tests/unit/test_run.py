"""The trainer's side of a run's directory: what `open_run` refuses, and which error is which verdict."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat

import pytest
import yaml

from strop import config as config_module
from strop import config_load
from strop import run as run_module
from strop.config import Config, RunConfig
from strop.data.store import TokenStore
from strop.errors import UserError
from strop.obs import secrets
from strop.obs.metrics import MetricsFile
from strop.slurm import attempts, code, env


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **fields: dataclasses.replace(
        Config(algo="dpo"), run=dataclasses.replace(RunConfig(), **fields)
    )


def direct() -> env.Env:
    return env.read_env({})


def test_direct_run_is_pinned_to_its_code(config, tmp_path, monkeypatch):
    codes = iter(["a", "b", "c", "c", "c"])
    monkeypatch.setattr(code, "identify", lambda: {"digest": next(codes), "commit": None})
    for attempt in (1, 2):  # before the first checkpoint any code may go on
        assert run_module.open_run(config(name="x"), direct()).attempt == attempt
        attempts.finish(tmp_path / "runs/x", attempt, "YIELD", step=1)
    (tmp_path / "runs/x/checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "runs/x/checkpoints/step-000001/COMMITTED.json").write_text("{}")
    with pytest.raises(UserError, match="digest b then, digest c now"):
        run_module.open_run(config(name="x"), direct())
    assert run_module.open_run(config(name="x", allow_code_change=True), direct()).attempt == 3


@pytest.mark.parametrize("name", ["a/b", ".hidden", ""])
def test_name_is_checked_as_the_job_body_does(config, name):
    with pytest.raises(UserError, match=r"run\.name="):
        run_module.open_run(config(name=name), direct())


@pytest.mark.parametrize(
    ("folder", "reason"), [("/proc/x", "No such file or directory"), ("rows.jsonl/runs", "Not a directory")]
)
def test_run_directory_that_cannot_be(config, tmp_path, folder, reason):
    """/proc, because it is closed to root too, as whom tests in a container run."""
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match=rf"run\.dir: .*{folder}/x cannot be made: {reason}"):
        run_module.open_run(config(name="x", dir=folder), direct())


def test_launched_run_must_be_where_the_configuration_says(config, tmp_path):
    launched = dataclasses.replace(direct(), run_dir=tmp_path / "runs/x", attempt=1)
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs")
    for folder in ("runs", "link", str(tmp_path / "runs")):
        assert run_module.open_run(config(name="x", dir=folder), launched).launched
    with pytest.raises(UserError, match=r"run\.dir: .*other, but the job's run is"):
        run_module.open_run(config(name="x", dir="other"), launched)


def test_run_of_an_arrays_task_has_the_tasks_name(config, tmp_path):
    task = dataclasses.replace(direct(), run_dir=tmp_path / "runs/x-4", attempt=1, job_id="12_4")
    (tmp_path / "runs/x-4").mkdir(parents=True)
    assert run_module.open_run(config(name="x"), task).dir == tmp_path / "runs/x-4"
    with pytest.raises(UserError, match=r"run\.name: 'y', but the job's run is"):
        run_module.open_run(config(name="y"), task)
    successor = dataclasses.replace(task, job_id="13")
    assert run_module.open_run(config(name="x-4"), successor).launched


@pytest.mark.parametrize(
    ("number", "verdict"),
    [(errno.ENOSPC, ("storage", 74)), (errno.EDQUOT, ("storage", 74)), (errno.EROFS, ("storage", 74)),
     (errno.ENOENT, ("exception", 1))],
)  # fmt: skip
def test_full_over_quota_or_read_only_is_storage(number, verdict):
    assert run_module.classify(OSError(number, os.strerror(number))) == verdict


def test_files_are_as_the_umask_says(tmp_path):
    """A group that shares its runs has umask 002; files of their owner alone would end that."""
    before = os.umask(0o002)
    try:
        MetricsFile(tmp_path / "metrics.jsonl").close()
        (tmp_path / "data").mkdir()
        (tmp_path / "data").chmod(0o2775)
        with pytest.raises(AssertionError, match="without rows"):  # looked at before it is removed again
            TokenStore.write(tmp_path / "data/s", look(tmp_path / "data"), kind="sft", digest="d")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "metrics.jsonl").stat().st_mode) == 0o664


def look(folder):
    (aside,) = folder.iterdir()
    assert stat.S_IMODE(aside.stat().st_mode) == 0o2775
    assert {stat.S_IMODE(p.stat().st_mode) for p in aside.iterdir()} == {0o664}
    yield from ()


SECRET = {
    "data": {
        "train": "https://me:hunter22@example.org/rows.jsonl",
        "adapter": "mine:Adapter",
        "adapter_args": {"api_key": "correct horse", "url": "https://example.org", "auth": "from-the-env"},
    },
    "metadata": {"notify": "https://bot:pass1234@example.org/hook", "db": {"password": "battery staple"}},
}
KEPT = {
    "data": {
        "train": "https://me:[secret]@example.org/rows.jsonl",
        "adapter": "mine:Adapter",
        "adapter_args": {"api_key": "[secret]", "url": "https://example.org", "auth": "[secret]"},
    },
    "metadata": {"notify": "https://bot:[secret]@example.org/hook", "db": {"password": "[secret]"}},
}


@pytest.fixture
def secretive(tmp_path, monkeypatch):
    """seed -> a configuration that is full of secrets, read as the trainer reads it."""
    monkeypatch.setenv("MY_TOKEN", "from-the-env")
    secrets.learn(())  # what is known of the environment is read anew
    tree = {**SECRET, "model": {"path": "models/from-the-env"}}
    tree["data"] = {**SECRET["data"], "adapter_args": {**SECRET["data"]["adapter_args"]}}
    tree["data"]["adapter_args"]["auth"] = "${oc.env:MY_TOKEN}"
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree))
    yield lambda *words: config_module.load("sft", file, words)
    monkeypatch.undo()
    secrets.learn(())


def test_config_yaml_keeps_no_secret_and_a_resume_agrees_all_the_same(secretive, tmp_path, monkeypatch):
    """The run itself has them. One that is another now (a renewed token) is the same configuration."""
    monkeypatch.chdir(tmp_path)
    config = secretive("run.name=x", "train.seed=1")
    assert config.data.adapter_args["auth"] == "from-the-env"
    assert config.data.adapter_args["api_key"] == "correct horse"
    run = run_module.open_run(config, direct())
    run_module.write_config(run, config)
    text = (run.dir / "config.yaml").read_text()
    kept = yaml.safe_load(text)
    assert {key: kept["data"][key] for key in KEPT["data"]} == KEPT["data"]
    assert kept["metadata"] == KEPT["metadata"]
    assert kept["model"]["path"] == "models/from-the-env", "an export reads it"
    assert not [word for word in ("hunter22", "correct horse", "pass1234", "battery") if word in text]
    assert run_module.agree(run, config) == config
    args = "data.adapter_args={api_key: renewed, url: https://example.org, auth: from-the-env}"
    renewed = secretive("run.name=x", "train.seed=1", args)
    assert run_module.agree(run, renewed) == renewed
    other = secretive("run.name=x", "train.seed=2")
    with pytest.raises(UserError) as caught:
        run_module.agree(run, other)
    assert str(caught.value).endswith(":\n  train.seed: 1 -> 2")


def test_a_run_whose_config_yaml_still_has_secrets_goes_on_and_does_not_show_them(
    secretive, tmp_path, monkeypatch
):
    """As runs of older versions left it."""
    monkeypatch.chdir(tmp_path)
    args = "data.adapter_args={api_key: %s, url: %s, auth: from-the-env}"
    config = secretive("run.name=x", args % ("clear", "https://example.com"))
    run = run_module.open_run(config, direct())
    (run.dir / "config.yaml").write_text(config_module.dump_yaml(config))
    assert run_module.agree(run, config) == config
    with pytest.raises(UserError) as caught:
        run_module.agree(run, secretive("run.name=x", args % ("another", "https://example.org")))
    assert str(caught.value).endswith(
        ":\n  data.adapter_args.url: https://example.com -> https://example.org"
    )


def test_no_key_of_ours_names_a_secret():
    """Else it would be kept as a marker, and an export or a resume would read that."""
    texts = [key for key, leaf in config_load.leaves(Config).items() if "str" in str(leaf.hint)]
    assert "model.path" in texts
    assert [key for key in texts if secrets.names_secret(key.rpartition(".")[2])] == []
