"""Sinks: TensorBoard is read back with its own reader; trackers are stood in for by recorders."""

import importlib.util
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from strop.errors import UserError
from strop.obs.sinks import Sinks, check_installed, shown

OFF = {
    "tensorboard": False,
    "wandb": False,
    "mlflow": False,
    "project": "p",
    "config": {"train": {"seed": 1}},
}


def scalars(run_dir):
    reader = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True
    )
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_names_and_what_is_left_out():
    record = {"step": 3, "loss": 1, "rewards/margins": 0.5, "eval_rewards/margins": 0.25, "grad_norm": None}
    assert shown(record) == {"train/loss": 1.0, "train/rewards/margins": 0.5, "eval/rewards/margins": 0.25}


def test_tensorboard_reads_back_and_a_resume_purges_later_steps(tmp_path):
    first = Sinks(tmp_path, **OFF | {"tensorboard": True})
    for step in range(1, 6):
        first.log({"step": step, "loss": step / 2})
        first.log({"step": step, "eval_loss": step / 4})
    # No close: the process was killed. Everything is in the file already.
    assert scalars(tmp_path)["train/loss"] == [(s, s / 2) for s in range(1, 6)]
    second = Sinks(tmp_path, **OFF | {"tensorboard": True, "resumed_from": 3})
    for step in (4, 5, 6):
        second.log({"step": step, "loss": step / 2})
    second.close()
    got = scalars(tmp_path)
    assert got["train/loss"] == [(s, s / 2) for s in range(1, 7)]
    assert got["eval/loss"] == [(s, s / 4) for s in range(1, 4)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_key_and_the_package(package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    wanted = {"tensorboard": False, "wandb": False, "mlflow": False} | {package: True}
    with pytest.raises(
        UserError,
        match=f"^log.{package} is true, but the Python package {package} is not installed: "
        f"pip install {package}, or log.{package}=false$",
    ):
        check_installed(**wanted)


@pytest.fixture
def fake_wandb(monkeypatch):
    """wandb's run as far as it is used: a step that never goes back, log() that refuses older steps."""
    runs = {}

    class Run:
        def __init__(self):
            self.step, self.rows = 0, []

        def log(self, values, step):
            assert step >= self.step
            self.step = step
            self.rows.append((step, values))

        def finish(self):
            pass

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.init = lambda id, resume, **_: runs.setdefault(id, Run()) if resume == "allow" else None
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_goes_on_in_the_same_run_without_going_back(tmp_path, fake_wandb):
    a = Sinks(tmp_path, **OFF | {"wandb": True})
    for step in (1, 2, 3):
        a.log({"step": step, "loss": 0.5})
    b = Sinks(tmp_path, **OFF | {"wandb": True, "resumed_from": 1})
    for step in (2, 3, 4):
        b.log({"step": step, "loss": 0.5})
    [run] = fake_wandb.values()
    assert [step for step, _ in run.rows] == [1, 2, 3, 3, 4]


def test_a_sink_that_fails_warns_once_and_the_others_go_on(tmp_path, fake_wandb, caplog):
    sinks = Sinks(tmp_path, **OFF | {"wandb": True, "tensorboard": True})
    sinks.log({"step": 1, "loss": 0.5})
    [run] = fake_wandb.values()
    run.step = "gone"  # as good as a lost connection: any access raises something of its own
    for step in (2, 3):
        sinks.log({"step": step, "loss": 0.5})
    sinks.close()
    [message] = caplog.messages
    assert message.startswith("wandb failed and gets nothing more in this attempt: TypeError: ")
    assert [s for s, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, fake_wandb, monkeypatch, caplog):
    def no_network(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_network)
    sinks = Sinks(tmp_path, **OFF | {"wandb": True})
    sinks.log({"step": 1, "loss": 0.5})
    assert caplog.messages == [
        "wandb failed and gets nothing more in this attempt: ConnectionError: no route"
    ]


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("mlflow")
    module.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    for name in ("set_experiment", "log_params", "end_run"):
        setattr(module, name, lambda *a, name=name: calls.append((name, *a)))
    module.log_metrics = lambda values, step: calls.append((step, values))
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    module.start_run = lambda **how: calls.append(("start_run", how)) or run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for resumed_from in (None, 1):
        sinks = Sinks(tmp_path, **OFF | {"mlflow": True, "resumed_from": resumed_from})
        sinks.log({"step": 1, "eval_loss": 0.5})
        sinks.close()
    assert calls == [
        ("set_experiment", "p"),
        ("start_run", {"run_name": tmp_path.name}),
        ("log_params", {"train": '{"seed": 1}'}),
        (1, {"eval/loss": 0.5}),
        ("end_run",),
        ("set_experiment", "p"),
        ("start_run", {"run_id": "r1"}),
        (1, {"eval/loss": 0.5}),
        ("end_run",),
    ]
