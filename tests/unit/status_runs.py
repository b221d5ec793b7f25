"""A run directory for tools.status, built by hand at fixed times."""

from __future__ import annotations

import json
import os
from pathlib import Path

from strop.obs import run_files, status

T = 1_800_000_000.0
"""When the first attempt began."""
CONFIG = """\
algo: dpo
train: {max_steps: 10, max_epochs: 1.0, global_batch_size: 4, limit_train_batches: null}
validation: {every: 4, at_start: false, at_end: true}
log: {every: 1}
"""


class RunDir:
    """A run directory that is written piece by piece."""

    def __init__(self, path: Path, config: str = CONFIG) -> None:
        self.path = path
        (path / "attempts").mkdir(parents=True)
        (path / "config.yaml").write_text(config)

    def attempt(self, number: int, began: float, heartbeat: float | None = None, **fields) -> dict:
        record = {
            "attempt": number,
            "state": "X",
            "job_id": "17",
            "target": "17",
            "restart_count": number - 1,
            "host": "n1",
            "pid": 1,
            "pid_start": "1",
            "nodes": ["n1", "n2"],
            "began": T + began,
            "committed_step": None,
            "launcher": "slurm",
            "algo": "dpo",
            "args": ["run.name=r"],
            **fields,
        }
        file = self.path / "attempts" / f"{number:04d}.json"
        file.write_text(json.dumps(record))
        os.utime(file, (T + (heartbeat or began), T + (heartbeat or began)))
        return record

    def steps(self, attempt: int, steps: range, first_end: float, step_s: float = 2.0) -> None:
        """One step after another, the first of them done at `first_end`."""
        with open(self.path / "timing.jsonl", "a") as timing, open(self.path / "metrics.jsonl", "a") as lines:
            for i, step in enumerate(steps):
                time = T + first_end + i * step_s
                line = {
                    "step": step,
                    "time": time,
                    "attempt": attempt,
                    "step_s": step_s,
                    "tokens_per_s": 50.0,
                }
                timing.write(json.dumps(line) + "\n")
                lines.write(json.dumps({"step": step, "loss": 0.5, "learning_rate": 1e-6}) + "\n")

    def evaluation(self, step: int) -> None:
        with open(self.path / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps({"step": step, "eval_loss": 0.4, "eval_rewards/accuracies": 0.75}) + "\n")

    def commit(self, step: int) -> None:
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        manifest = {"files": {"a": {"size": 2**30}, "b": {"size": 2**29}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "COMMITTED.json").write_text("{}")


def assess(run: RunDir, now: float) -> status.Status:
    return status.assess(run_files.read(run.path, now=T + now))


def interrupted(run: RunDir) -> None:
    """Attempt 1: 10 s to start, steps 1-6 of 2 s, step 4 committed, killed at 24 s. 6 s in the queue.
    Attempt 2: from 30 s on, 5 s to start, steps 5-8 of 2 s; step 8 committed."""
    run.attempt(1, 0, cause="killed", action="requeue", state="FAIL", closed=T + 24, summary="a rank died")
    run.attempt(2, 30, heartbeat=40, committed_step=4)
    run.steps(1, range(1, 7), first_end=12)
    run.steps(2, range(5, 9), first_end=37)
    run.commit(4)
    run.commit(8)
