"""tools.pipeline with the real trainer on a toy model: as jobs of the local cluster, and without Slurm.

The truths are Slurm's own states of the jobs, the runs' records, and the weights: what a stage exports
must be what its checkpoint holds, and what the next one begins with.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from strop.pipeline import graph as graph_module
from strop.slurm import attempts, command
from tests import toy as t
from tests.slurm.body_jobs import ended, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, toy, monkeypatch):
    """An empty directory with the toy's configurations; PYTHON and the path as a user has them."""
    for algo in ("cpt", "sft", "dpo"):
        t.config(toy, algo, tmp_path / f"{algo}.yaml")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def on_slurm(slurm_cluster, place, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment()["SLURM_CONF"])
    yield
    if (place / "runs/p.pipeline").is_dir():
        call("--cancel")


def write(stages: dict, **top) -> None:
    tree = json.loads(json.dumps({"name": "p", **top, "stages": stages}))  # nothing in it twice: no anchors
    Path("p.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def call(*words: str) -> subprocess.CompletedProcess[str]:
    shell = [sys.executable, "-m", "tools.pipeline", "p.yaml", *words]
    return subprocess.run(shell, capture_output=True, text=True, timeout=240)


def jobs() -> dict[str, list[str]]:
    graph = graph_module.read(Path("runs/p.pipeline").resolve())
    assert graph is not None
    return {name: node.jobs for name, node in graph.nodes.items()}


def has_trained(run: str, steps: int) -> bool:
    path = Path("runs") / run / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) >= steps


def assert_exported(run: str, step: int, directory: str = "latest") -> None:
    """The export has the checkpoint's weights, bit for bit."""
    exported = load_file(Path("runs") / run / "export" / directory / "model.safetensors")
    stored = t.checkpoint(Path("runs") / run, step)
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, stored[f"model.{name}"].to(tensor.dtype)), name


@pytest.mark.slurm
def test_whole_chain_with_a_requeue_in_the_middle(on_slurm):
    write(
        {
            "texts": {"algo": "prepare"},
            "cpt": {"config": "cpt.yaml", "set": {"train.max_steps": 3}},
            "sft": {"config": "sft.yaml", "set": {"train.max_steps": 120}},
            "dpo": {"config": "dpo.yaml", "set": {"train.max_steps": 3}, "export": {"dtype": "bf16"}},
        }
    )
    done = call()
    assert done.returncode == 0, done.stderr
    first = jobs()
    assert list(first) == ["texts", "cpt", "cpt.export", "sft", "sft.export", "dpo", "dpo.export"]
    wait_until(lambda: has_trained("p-sft", 1), 120)
    stores = {p: p.stat().st_mtime_ns for p in Path("runs/.cache").glob("text-*")}
    command.slurm(["scontrol", "requeue", first["sft"][0]])
    done = call("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert jobs() == first  # each job once, the requeued one under its own number
    assert [r["cause"] for r in attempts.read_all(Path("runs/p-sft"))] == ["requeued", "done"]
    told = json.loads(Path("runs/p.pipeline/texts.stores.json").read_text())["stores"]
    assert {Path(p).name for p in told} == {p.name for p in stores}  # what was prepared is what was read
    for run, step, directory in (("cpt", 3, "latest"), ("sft", 120, "latest"), ("dpo", 3, "latest-bf16")):
        assert_exported(f"p-{run}", step, directory)
    for run, before in (("sft", "cpt"), ("dpo", "sft")):
        path = yaml.safe_load(Path(f"runs/p-{run}/config.yaml").read_text())["model"]["path"]
        assert Path(path) == Path(f"runs/p-{before}/export/latest").resolve()
    assert t.metrics(Path("runs/p-dpo"))[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    again = call()
    assert (again.returncode, jobs()) == (0, first)
    assert "pipeline p  done" in again.stdout


@pytest.mark.slurm
def test_failed_stage_cancels_the_rest_and_the_next_call_goes_on(on_slurm, toy):
    """A broken row, found when the job runs. Two stages hang on the broken one, one does not."""
    rows = Path(toy / "sft" / "training.jsonl").read_text()
    t.write_jsonl(Path("rows/training.jsonl"), [{"prompt": "no completion"}])
    few = {"train.max_steps": 2}
    write(
        {
            "cpt": {"config": "cpt.yaml", "set": few},
            "sft": {"config": "sft.yaml", "set": {**few, "data.train": "rows"}},
            "dpo": {"config": "dpo.yaml", "set": few},
        }
    )
    failed = call("--wait")
    assert failed.returncode == 78, failed.stdout + failed.stderr
    first = jobs()
    states = {name: command.show_job(numbers[-1])["JobState"] for name, numbers in first.items()}
    assert states == {
        **dict.fromkeys(("cpt", "cpt.export"), "COMPLETED"),
        "sft": "FAILED",
        **dict.fromkeys(("sft.export", "dpo", "dpo.export"), "CANCELLED"),
    }
    assert "training.jsonl" in failed.stderr
    assert (
        "next: python -m tools.logs runs/p-sft --why; then python -m tools.pipeline p.yaml" in failed.stderr
    )
    shell = [sys.executable, "-m", "tools.status", "--pipeline", "p"]
    status = subprocess.run(shell, capture_output=True, text=True)
    assert status.returncode == 1
    lines = [line.strip() for line in status.stdout.splitlines()]
    assert lines[0] == "pipeline p  failed"
    assert any(line.startswith("└─ dpo  cancelled") for line in lines)
    assert any(line.startswith("sft failed (exit 78): ") and "training.jsonl" in line for line in lines)

    Path("rows/training.jsonl").write_text(rows)
    done = call("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    second = jobs()
    assert {name: len(numbers) for name, numbers in second.items()} == {
        **dict.fromkeys(("cpt", "cpt.export"), 1),
        **dict.fromkeys(("sft", "sft.export", "dpo", "dpo.export"), 2),
    }
    assert_exported("p-dpo", 2)


@pytest.mark.slurm
def test_run_that_goes_on_as_a_successor(on_slurm, monkeypatch):
    """First stopped without one: exit code 75, the export is cancelled. Then with one: the export waits."""
    write({"sft": {"config": "sft.yaml", "set": {"train.max_steps": 150}, "slurm": {"no_requeue": True}}})
    monkeypatch.setenv("STROP_SUCCESSOR", "0")
    assert call().returncode == 0
    wait_until(lambda: has_trained("p-sft", 1), 60)
    command.slurm(["scancel", "--batch", "--signal=USR1", jobs()["sft"][0]])
    stopped = call("--wait")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "sft stopped (exit 75): time limit near" in stopped.stderr
    assert command.show_job(jobs()["sft.export"][0])["JobState"] == "CANCELLED"

    monkeypatch.delenv("STROP_SUCCESSOR")
    trained = len(t.metrics(Path("runs/p-sft")))
    assert call().returncode == 0
    run, export = jobs()["sft"][1], jobs()["sft.export"][1]
    wait_until(lambda: has_trained("p-sft", trained + 1), 60)
    behind = attempts.read_all(Path("runs/p-sft"))[-1]["successor"]
    waiting = command.show_job(export)["Dependency"]
    assert waiting == f"afterok:{run}(unfulfilled)?afterok:{behind}(unfulfilled)"
    command.slurm(["scancel", "--batch", "--signal=USR1", run])
    assert ended(run)["ExitCode"] == "75:0"
    done = call("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended(export)["JobState"] == "COMPLETED"
    assert [r["target"] for r in attempts.read_all(Path("runs/p-sft"))][1:] == [run, behind]
    assert_exported("p-sft", 150)


@pytest.mark.slurm
def test_killed_between_two_submissions(on_slurm, monkeypatch):
    """sbatch has submitted, and its caller is killed before it hears of it: no job is submitted twice."""
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    fake = Path("bin/sbatch")
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'{real} "$@" || exit\n'
        '[[ $* == *--test-only* || $* != *"job-name=p-sft "* ]] || kill -KILL $PPID\n'
    )
    fake.chmod(0o755)
    write(
        {"cpt": {"config": "cpt.yaml"}, "sft": {"config": "sft.yaml"}, "dpo": {"config": "dpo.yaml"}},
        slurm={"begin": "now+1hour"},
    )
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{fake.parent.resolve()}:{path}")
    assert call().returncode == -signal.SIGKILL
    monkeypatch.setenv("PATH", path)
    assert {name: len(numbers) for name, numbers in jobs().items()} == {
        **dict.fromkeys(("cpt", "cpt.export"), 1),
        **dict.fromkeys(("sft", "sft.export", "dpo", "dpo.export"), 0),
    }
    done = call()
    assert done.returncode == 0, done.stderr
    (found,) = jobs()["sft"]
    assert f"sft: job {found} is in the queue already" in done.stdout
    text = command.slurm(["squeue", "--noheader", "--format=%j %i %T", "--sort=i"])
    own = [line.split() for line in text.splitlines() if line.startswith("p-")]
    assert own == [[f"p-{name}", numbers[0], "PENDING"] for name, numbers in jobs().items()]
    for name, before in (("sft.export", "sft"), ("dpo", "sft.export")):
        waiting = command.show_job(jobs()[name][0])["Dependency"]
        assert waiting == f"afterok:{jobs()[before][0]}(unfulfilled)"
    assert call("--cancel").returncode == 0
    assert {command.show_job(numbers[0])["JobState"] for numbers in jobs().values()} == {"CANCELLED"}


@pytest.mark.slurm
def test_a_pipeline_that_is_changed_while_it_waits(on_slurm):
    """New options and a stage that is taken out reach the queue; a changed configuration needs no new job."""
    stages = {name: {"config": f"{name}.yaml"} for name in ("cpt", "sft", "dpo")}
    write(stages, slurm={"begin": "now+1hour"})
    assert call().returncode == 0
    first = jobs()
    assert call("cpt.optim.lr=3e-6").returncode == 0
    assert jobs() == first
    del stages["sft"]
    stages["dpo"]["slurm"] = {"comment": "new"}
    write(stages, slurm={"begin": "now+1hour"})
    done = call("cpt.optim.lr=3e-6")
    assert done.returncode == 0, done.stderr
    assert f"p-sft: no such stage any more; job {first['sft'][0]} is cancelled" in done.stdout
    second = jobs()
    assert {name: len(numbers) for name, numbers in second.items()} == {
        **dict.fromkeys(("cpt", "cpt.export"), 1),
        **dict.fromkeys(("dpo", "dpo.export"), 2),
    }
    gone = [first[name][0] for name in ("sft", "sft.export", "dpo", "dpo.export")]
    assert {command.show_job(number)["JobState"] for number in gone} == {"CANCELLED"}
    record = command.show_job(second["dpo"][1])
    waits_for = f"afterok:{second['cpt.export'][0]}(unfulfilled)"
    assert (record["JobState"], record["Comment"], record["Dependency"]) == ("PENDING", "new", waits_for)


@pytest.mark.slurm
def test_mistakes_are_found_before_anything_is_submitted(on_slurm):
    """What only Slurm knows, for the last stage; and a typing error there."""
    last = {"config": "sft.yaml", "slurm": {"partition": "nosuch"}}
    write({"cpt": {"config": "cpt.yaml"}, "sft": last})
    refused = call()
    assert refused.returncode == 78
    assert "stage sft: sbatch refuses the job of sft: " in refused.stderr
    assert "nvalid partition" in refused.stderr
    write({"cpt": {"config": "cpt.yaml"}, "sft": {"config": "sft.yaml", "set": {"optim.lrr": 1}}})
    refused = call()
    assert refused.returncode == 78
    assert refused.stderr == "error: p.yaml:8: unknown key optim.lrr; did you mean optim.lr?\n"
    write({"cpt": {"config": "cpt.yaml"}, "sft": {"config": "sft.yaml", "set": {"data.train": "gone.jsonl"}}})
    refused = call()
    assert refused.returncode == 78
    assert refused.stderr.startswith("error: stage sft: data.train: no such file or directory: gone.jsonl\n")
    assert all(numbers == [] for numbers in jobs().values())


def test_without_slurm(place):
    """Ctrl-C in the middle of the second stage: it commits; the next call goes on there."""
    write(
        {
            "texts": {"algo": "prepare"},
            "cpt": {"config": "cpt.yaml", "set": {"train.max_steps": 2}},
            "sft": {"config": "sft.yaml", "set": {"train.max_steps": 120}, "slurm": {"ntasks_per_node": 2}},
        }
    )
    shell = [sys.executable, "-m", "tools.pipeline", "p.yaml", "--executor", "local"]
    first = subprocess.Popen(
        shell,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: has_trained("p-sft", 1) or first.poll() is not None, 120)
    refused = call("--executor", "local")
    assert refused.returncode == 78
    assert "another call of tools.pipeline is at work" in refused.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert "the same call goes on" in first.stdout.read()
    record = attempts.read_all(Path("runs/p-sft"))[-1]
    assert (record["state"], record["exit_code"]) == ("YIELD", 75)
    done = call("--executor", "local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpt.export: done already" in done.stdout
    assert [len(numbers) for numbers in jobs().values()] == [1, 1, 1, 2, 1]
    assert [m["step"] for m in t.metrics(Path("runs/p-sft"))] == list(range(1, 121))
    assert_exported("p-sft", 120)
