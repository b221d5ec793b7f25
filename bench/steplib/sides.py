"""One training of a few steps by either side, as a process tree of its own whose memory is watched.

strop is started as its launcher starts it on one node (sbatch/lib.sh without Slurm): one rank with all
threads, or one rank a thread. TRL runs in an environment of its own (bench/peers.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.steplib.inputs import SEED, Task

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("trl_worker.py")
MAX_LENGTH = 1024
"""TRL's default."""


@dataclass(frozen=True)
class Side:
    """One way to train."""

    name: str
    precision: str
    ranks: int = 1
    """strop's."""
    settings: str | None = None
    """TRL's: "as it comes" or "best"; None: this is strop."""


@dataclass(frozen=True)
class Job:
    """What both sides train, and where they write."""

    task: Task
    algo: str
    rows: Path
    ordered: Path
    batch: int
    steps: int
    lr: float
    folder: Path
    threads: int


@dataclass(frozen=True)
class Outcome:
    seconds: list[float]
    losses: list[float]
    peak_gib: float


def train(side: Side, job: Job, trl_python: Path) -> Outcome:
    return _strop(side, job) if side.settings is None else _trl(side, job, trl_python)


def _strop(side: Side, job: Job) -> Outcome:
    name = f"{job.task.name}-{job.algo}-{uuid.uuid4().hex[:8]}"
    words = [
        f"model.path={job.task.model}",
        f"data.train={job.rows}",
        f"data.max_length={MAX_LENGTH}",
        f"train.precision={side.precision}",
        f"train.global_batch_size={job.batch}",
        "train.micro_batch_tokens=4096",
        f"train.max_steps={job.steps}",
        f"train.seed={SEED}",
        f"optim.lr={job.lr}",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "validation.every=null",
        "checkpoint.every=null",
        "checkpoint.best_metric=null",
        "log.tensorboard=false",
        f"run.dir={job.folder / 'runs'}",
        f"run.name={name}",
    ]
    variables = {
        **os.environ,
        "PYTHON": sys.executable,
        "STROP_LAUNCHER": "local",
        "STROP_LOCAL_RANKS": str(side.ranks),
    }
    config = REPO / "configs" / f"{job.algo}.yaml"
    command = ["bash", str(REPO / "sbatch/lib.sh"), job.algo, "--config", str(config), *words]
    peak_gib = _run(command, variables, job.folder, name)
    lines = {file: _lines(job.folder / "runs" / name / file) for file in ("timing.jsonl", "metrics.jsonl")}
    return Outcome(
        [line["step_s"] for line in lines["timing.jsonl"]],
        [line["loss"] for line in lines["metrics.jsonl"] if "loss" in line],
        peak_gib,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _trl(side: Side, job: Job, python: Path) -> Outcome:
    out = job.folder / f"trl-{uuid.uuid4().hex[:8]}.json"
    spec = {
        "algo": job.algo,
        "model": str(job.task.model),
        "rows": str(job.ordered),
        "batch": job.batch,
        "steps": job.steps,
        "lr": job.lr,
        "threads": job.threads,
        "settings": side.settings,
        "folder": str(job.folder / "trl"),
        "out": str(out),
    }
    path = out.with_suffix(".spec.json")
    path.write_text(json.dumps(spec))
    variables = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    peak_gib = _run([str(python), str(WORKER), str(path)], variables, job.folder, out.stem)
    steps = json.loads(out.read_text())
    return Outcome([s["seconds"] for s in steps], [s["loss"] for s in steps], peak_gib)


def _run(command: Sequence[str], variables: dict[str, str], folder: Path, name: str) -> float:
    """Run to the end; the peak memory of its processes in GiB: the sum of the peaks of those alive."""
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        over, peaks = threading.Event(), [0]

        def watch() -> None:
            while not over.wait(0.1):
                peaks[0] = max(
                    peaks[0], sum(processes.kib(pid, "VmHWM") for pid in processes.tree(process.pid))
                )

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
    if code:
        tail = (folder / f"{name}.log").read_text()[-3000:]
        raise SystemExit(f"{' '.join(command)}\nfailed with exit code {code}:\n{tail}")
    return peaks[0] / 2**20
