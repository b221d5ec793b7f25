"""Interrupted runs: whatever the moment, the end is bit for bit that of the undisturbed run."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strop.slurm import attempts
from tests import toy as t

REPO = Path(__file__).resolve().parents[2]
SECTIONS = {
    "train": {"max_steps": 9, "micro_batch_size": 2},
    "validation": {"at_start": True, "every": 2, "at_end": True},
    "checkpoint": {"every": 3, "best_metric": "eval_loss"},
}
"""Nine steps are two epochs of four and one of the third."""


@pytest.fixture(scope="module")
def whole_run(ranks, toy, tmp_path_factory):
    """algorithm -> (algorithm, configuration, run directory, looks for a stop request by the last rank)."""

    @functools.cache
    def make(algo):
        work = tmp_path_factory.mktemp("undisturbed")
        source = toy / ("preference" if algo == "dpo" else "sft")
        data = {"train": str(source), "max_length": 256, "cache_dir": str(work / "cache")}
        config = t.config(toy, algo, work / "c.yaml", **SECTIONS, data=data)
        job = ranks.run(algo, config, f"{work.name}-whole", world_size=2)
        return algo, config, job.run_dir, int(job.text(1).rpartition("looks: ")[2])

    return make


@pytest.fixture(params=["dpo", "sft"])
def undisturbed(request, whole_run):
    return whole_run(request.param)


@pytest.fixture
def undisturbed_sft(whole_run):
    """Where the algorithm makes no difference."""
    return whole_run("sft")


def finish(ranks, algo, config, name, world_size=2):
    job = ranks.run(algo, config, name, world_size=world_size)
    assert attempts.read_all(job.run_dir)[-1]["state"] == "DONE"
    return job.run_dir


def assert_equal_runs(a: Path, b: Path, step: int = 9) -> None:
    t.assert_equal_checkpoints(a, b, step)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    best = json.loads((a / "checkpoints" / "BEST.json").read_text())
    assert best == json.loads((b / "checkpoints" / "BEST.json").read_text())


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_twice_equals_undisturbed(ranks, undisturbed, seed):
    """The last rank alone is asked to stop at a random look, then again; both agree, commit and yield."""
    algo, config, whole, looks = undisturbed
    draw = random.Random(f"{algo}{seed}")
    name = f"{whole.name}-twice{seed}"
    for low, high in ((1, looks // 2), (2, looks // 3)):
        job = ranks.run(algo, config, name, world_size=2, stop_at=draw.randint(low, high))
        record = attempts.read_all(job.run_dir)[-1]
        assert record["state"] == "YIELD"
        assert record["step"] == (attempts.committed_step(job.run_dir) or 0)
    assert_equal_runs(whole, finish(ranks, algo, config, name))


def test_stopped_at_every_moment_in_turn(ranks, undisturbed):
    """One run, stopped again and again, each attempt a little later: every kind of safe point is met."""
    algo, config, whole, _ = undisturbed
    name = f"{whole.name}-often"
    phases = set()
    for stop_at in range(2, 40):
        job = ranks.run(algo, config, name, world_size=2, stop_at=stop_at)
        record = attempts.read_all(job.run_dir)[-1]
        phases.add((record["state"], record["step"]))
        if record["state"] == "DONE":
            break
    assert record["state"] == "DONE"
    assert len(phases) > 4
    assert_equal_runs(whole, job.run_dir)


@pytest.mark.parametrize("seed", range(2))
def test_killed_without_warning(ranks, undisturbed, seed):
    """One rank dies by KILL and takes the others along: back to the last commit, the same end."""
    algo, config, whole, looks = undisturbed
    name = f"{whole.name}-killed{seed}"
    moments = random.Random(seed).sample(range(3, looks), 2)
    for kill_at in sorted(moments, reverse=True):
        job = ranks.start(algo, config, name, world_size=2, kill_at=kill_at)
        if set(ranks.wait(job)) == {0}:
            break  # a resumed run looks less often than kill_at
    assert_equal_runs(whole, finish(ranks, algo, config, name))


def test_another_number_of_ranks_trains_on_the_same_batches(ranks, undisturbed):
    algo, config, whole, _ = undisturbed
    name = f"{whole.name}-reshaped"
    for world_size, words in ((2, ["train.max_steps=3"]), (1, ["train.max_steps=6"]), (3, [])):
        job = ranks.run(algo, config, name, *words, world_size=world_size)
    lines = t.metrics(job.run_dir)
    # the ends at 3 and 6 were validated too
    lines = [m for m in lines if not ("eval_loss" in m and m["step"] == 3)]
    expected = t.metrics(whole)
    assert [m["step"] for m in lines] == [m["step"] for m in expected]
    for a, b in zip(lines, expected):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
        assert a.get("num_tokens") == b.get("num_tokens")


def test_a_finished_run_is_extended(ranks, undisturbed):
    algo, config, whole, _ = undisturbed
    name = f"{whole.name}-extended"
    # a run to step 4, whose end is a validation of the whole run too
    ranks.run(algo, config, name, "train.max_steps=4", world_size=2)
    assert_equal_runs(whole, finish(ranks, algo, config, name))
    before = (whole.parent / name / "metrics.jsonl").read_bytes()
    again = finish(ranks, algo, config, name)  # nothing is left to do
    assert (again / "metrics.jsonl").read_bytes() == before


def test_early_stop_is_final_and_the_best_is_kept(ranks, toy, tmp_path):
    """A learning rate that ruins the model: the first validation stays the best, two misses end the run."""
    config = t.config(
        toy, "sft", tmp_path / "c.yaml",
        train={"max_steps": 12, "max_grad_norm": None},
        optim={"lr": 0.3, "schedule": "constant"},
        validation={"at_start": True, "every": 1, "patience": 2},
        checkpoint={"every": 1, "best_metric": "eval_loss"},
    )  # fmt: skip
    name = f"{tmp_path.name}-patience"
    job = ranks.run("sft", config, name)
    losses = {m["step"]: m["eval_loss"] for m in t.metrics(job.run_dir) if "eval_loss" in m}
    best, since = 1, 0
    for step in range(2, 13):  # the rule, by hand
        best, since = (step, 0) if losses[step] < losses[best] else (best, since + 1)
        if since == 2:
            break
    assert max(losses) == step < 12
    kept = sorted(p.name for p in (job.run_dir / "checkpoints").glob("step-*"))
    assert kept == [f"step-{s:06d}" for s in sorted({best, step - 1, step})]
    assert json.loads((job.run_dir / "checkpoints" / "BEST.json").read_text()) == {
        "step": best, "metric": "eval_loss", "value": losses[best],
    }  # fmt: skip
    before = (job.run_dir / "metrics.jsonl").read_bytes()
    again = ranks.run("sft", config, name)
    assert attempts.read_all(again.run_dir)[-1]["state"] == "DONE"
    assert (again.run_dir / "metrics.jsonl").read_bytes() == before


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "file"),
    [("flip", "__1_0.distcp"), ("truncate", "__0_0.distcp"), ("flip", ".metadata"), ("flip", "state.json"),
     ("flip", "manifest.json"), ("delete", "__0_0.distcp")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_set_aside(ranks, undisturbed_sft, how, file):
    algo, config, whole, _ = undisturbed_sft
    name = f"{whole.name}-{how}{file}"
    job = ranks.run(algo, config, name, "train.max_steps=6", world_size=2)
    *_, previous, newest = attempts.committed_steps(job.run_dir / "checkpoints")
    assert newest == 6
    damage(job.run_dir / "checkpoints" / "step-000006" / file, how)
    rubble = [job.run_dir / "checkpoints" / n for n in ("step-000009.a1.tmp", "step-000007")]
    for path in rubble:  # an attempt that died while saving, one that died between rename and marker
        path.mkdir()
        (path / ".metadata").write_text("half")
    job = ranks.run(algo, config, name, world_size=2)
    assert "CHECKPOINT DAMAGED" in job.text()
    assert str(job.run_dir / "checkpoints" / "step-000006" / file) in job.text()
    assert f"loading the checkpoint of step {previous}" in job.text()
    assert (job.run_dir / "checkpoints" / "step-000006.damaged-1").is_dir()
    assert not any(path.exists() for path in rubble)
    assert_equal_runs(whole, job.run_dir)


def test_nothing_intact_is_an_error_and_never_a_new_start(ranks, undisturbed_sft):
    algo, config, whole, _ = undisturbed_sft
    name = f"{whole.name}-ruins"
    job = ranks.run(algo, config, name, "train.max_steps=6", world_size=2)
    before = (job.run_dir / "metrics.jsonl").read_bytes()
    for step in attempts.committed_steps(job.run_dir / "checkpoints"):
        damage(job.run_dir / "checkpoints" / f"step-{step:06d}" / "__0_0.distcp", "flip")
    code, text = ranks.fail(algo, config, name, world_size=2)
    assert code == 74
    assert "every committed checkpoint in" in text
    code, text = ranks.fail(algo, config, name, world_size=2)
    assert code == 78
    assert "holds no committed checkpoint, but step 6 had been reached" in text
    assert (job.run_dir / "metrics.jsonl").read_bytes() == before


def test_checkpoints_that_were_deleted_are_missed(ranks, undisturbed_sft):
    """Also where no later attempt has seen them: the record of the one that ended well tells the step."""
    algo, config, whole, _ = undisturbed_sft
    name = f"{whole.name}-deleted"
    job = ranks.run(algo, config, name, "train.max_steps=3", world_size=2)
    (job.run_dir / "checkpoints").rename(job.run_dir / "elsewhere")
    code, text = ranks.fail(algo, config, name, world_size=2)
    assert code == 78
    assert "step 3 had been reached" in text


def test_metrics_that_are_shorter_than_committed_are_a_loud_error(ranks, undisturbed_sft):
    algo, config, whole, _ = undisturbed_sft
    name = f"{whole.name}-short"
    job = ranks.run(algo, config, name, "train.max_steps=3", world_size=2)
    (job.run_dir / "metrics.jsonl").write_bytes(b"")
    code, text = ranks.fail(algo, config, name, world_size=2)
    assert code == 74
    assert "metrics.jsonl" in text


def test_an_attempt_that_lost_its_lease_commits_nothing(ranks, undisturbed_sft):
    """A newer attempt has begun while this one still ran: its stop request must not end in a commit."""
    algo, config, whole, _ = undisturbed_sft
    name = f"{whole.name}-lease"
    job = ranks.start(algo, config, name, world_size=2)
    newer = attempts.record_file(job.run_dir, 2)
    newer.write_text(json.dumps({"attempt": 2, "state": "X", "committed_step": None}))
    codes = ranks.wait(job)
    assert any(codes)
    assert attempts.committed_step(job.run_dir) is None
    assert "commits nothing: a newer attempt has begun" in job.text()


def test_signal_through_the_job_body(whole_run, tmp_path):
    """The whole way as a user goes it: lib.sh with two ranks, USR1 in the middle, which starts it again."""
    algo, config, whole, _ = whole_run("dpo")
    runs = tmp_path / "runs"
    command = ["bash", "sbatch/lib.sh", algo, "--config", str(config), "run.name=job", f"run.dir={runs}"]
    variables = {
        **os.environ, "STROP_LAUNCHER": "local", "STROP_LOCAL_RANKS": "2", "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    variables.pop("STROP_TEST_CLUSTER", None)
    with open(tmp_path / "out", "w") as out:
        body = subprocess.Popen(command, cwd=REPO, env=variables, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not (runs / "job" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        body.send_signal(signal.SIGUSR1)
        assert body.wait(120) == 0, (tmp_path / "out").read_text()
    assert [record["state"] for record in attempts.read_all(runs / "job")] == ["YIELD", "DONE"]
    assert_equal_runs(whole, runs / "job")
