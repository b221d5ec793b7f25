"""A run as somebody outside sees it: its files, its processes and its job, and the waiting for a moment."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.slurm import attempts, command
from strop.slurm.local_cluster import LocalCluster
from strop.slurm.processes import command_lines, read_or_empty

POLL_S = 0.01
PHASE_LINES = {
    "model": "building the model ...",
    "reference": "reference log-probs (train) ...",
    "resume": "verifying checkpoints ...",
}
"""What rank 0 says when a phase begins."""


class Stuck(RuntimeError):
    """What had to happen did not happen in time."""


@dataclass
class Scene:
    """One run and its job."""

    cluster: LocalCluster
    run_dir: Path
    output: Path
    job: str
    save_every: int
    validate_every: int
    hit: int = 0
    """The newest attempt that a fault has ended."""
    base: int = 0
    """Steps done when the last fault struck that ended no attempt."""
    _timing: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    # ---- files

    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        try:
            names = os.listdir(self.run_dir / "attempts")
        except FileNotFoundError:
            return 0
        return max((int(name[:-5]) for name in names if re.fullmatch(r"\d{4,}\.json", name)), default=0)

    def record(self, attempt: int) -> dict[str, Any]:
        return attempts.read(self.run_dir, attempt)

    def timing(self) -> list[dict[str, Any]]:
        """Every step that was done, in the order of doing, repeated ones too."""
        path = self.run_dir / "timing.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._timing += [json.loads(line) for line in whole.splitlines()]
        return self._timing

    def steps(self, attempt: int) -> list[int]:
        return [line["step"] for line in self.timing() if line["attempt"] == attempt]

    def said(self, attempt: int) -> str:
        """What the job's output holds of this attempt."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return text.partition(f"attempt {attempt}, job")[2].partition(f"attempt {attempt + 1}, job")[0]

    def commits(self) -> list[int]:
        return attempts.committed_steps(self.run_dir / "checkpoints")

    # ---- processes and job

    def rank_pid(self, rank: int) -> int | None:
        """Process of a rank: the trainer, not what writes its raw log."""
        return next((pid for pid, r in self.rank_pids().items() if r == rank), None)

    def rank_pids(self) -> dict[int, int]:
        """{process: rank} of this run; srun and its like have the same words in their arguments."""
        found = {}
        for pid, argv in command_lines():
            module = argv[2] if len(argv) > 2 and argv[1] == "-m" else None
            if module == "strop.train" and "python" in os.path.basename(argv[0]):
                pairs = read_or_empty(f"/proc/{pid}/environ").split(b"\0")
                variables = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
                if variables.get(b"STROP_RUN_DIR") == os.fsencode(self.run_dir):
                    found[pid] = int(variables[b"SLURM_PROCID"])
        return found

    def show(self) -> dict[str, str]:
        """The job as `scontrol show job` has it."""
        return command.parse_jobs(self.cluster.slurm("scontrol", "show", "job", self.job))[0]

    def update(self, *changes: str) -> None:
        self.cluster.slurm("scontrol", "update", f"JobId={self.job}", *changes)

    # ---- moments

    def in_phase(self, phase: str, attempt: int, steps: int) -> bool:
        """Whether this attempt is there; "train" and what follows it: `steps` steps after its start."""
        logs = attempts.log_dir(self.run_dir, attempt)
        if phase == "imports":
            return len(self.rank_pids()) == 2
        if phase == "rendezvous":
            return any(logs.glob("present-*"))
        if phase in PHASE_LINES:
            return PHASE_LINES[phase] in self.said(attempt)
        done = self.steps(attempt)
        if not done or done[-1] < max(done[0], self.base) + steps:
            return False
        if phase == "validation":
            return done[-1] % self.validate_every == 0
        if phase == "save":
            return any((self.run_dir / "checkpoints").glob(f"*.a{attempt}.tmp/*"))
        assert phase == "train", phase
        return True


def wait_until(what: Callable[[], Any], limit_s: float, name: str) -> Any:
    """The first true value; Stuck after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        if time.monotonic() > deadline:
            raise Stuck(f"{name}: not within {limit_s:.0f} s")
        time.sleep(POLL_S)
    return value
