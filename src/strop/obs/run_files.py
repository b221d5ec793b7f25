"""What a run's directory says about the run, read without torch, however it was left.

Files may be missing, cut off in the middle of a line, or be written just now: what cannot be read is left
out. Nothing is judged here; `strop.obs.status` does that, as a pure function of `RunFiles`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from strop import files
from strop.aliases import ALIASES
from strop.slurm import attempts, command, lease

TAIL_BYTES = 1 << 16
SLURM_DEADLINE_S = 4.0


@dataclass(frozen=True)
class Checkpoints:
    """By name; `step-000100` only counts where its commit marker is there."""

    committed: tuple[int, ...] = ()
    best: Optional[dict[str, Any]] = None
    """{"step", "metric", "value"} of BEST.json."""
    damaged: tuple[str, ...] = ()
    """Set aside by a resume: `step-000100.damaged-1`."""
    unfinished: tuple[str, ...] = ()
    """Being written, or left by an attempt that died while it wrote: `step-000100.a2.tmp`."""
    size_bytes: Optional[int] = None
    """Of the newest one, by its manifest."""


@dataclass(frozen=True)
class RunFiles:
    """Everything that was read about one run at `now`."""

    directory: Path
    now: float
    records: tuple[dict[str, Any], ...]
    """attempts/*.json, oldest first; `heartbeat`, `alive` and `stop_reason` are added by `read`."""
    config: dict[str, Any]
    rows: Optional[int]
    """Training rows in use, by the ledger."""
    timing: tuple[dict[str, Any], ...]
    """All lines, or with `quick` the last ones."""
    metrics: tuple[dict[str, Any], ...]
    """The last lines."""
    loop_began: bool
    """Some attempt came as far as the training loop, which opens timing.jsonl."""
    checkpoints: Checkpoints
    job: Optional[Mapping[str, str]] = None
    """Slurm's record of the newest attempt's job, or of its successor once that is to go on; {} if Slurm has
    forgotten it; None if it was not asked or did not answer."""
    requeue_pending: Optional[str] = None
    """The command that the controller did not take."""

    @property
    def target(self) -> Optional[str]:
        """The number of the job that goes on with the run, for scontrol; None outside of Slurm."""
        r = self.records[-1] if self.records else {}
        return str(r["successor"]) if self.successor_goes_on else r.get("target") or r.get("job_id")

    @property
    def successor_goes_on(self) -> bool:
        """The newest attempt's own job will not run again, and the one that waited behind it is there."""
        successor = self.records[-1].get("successor") if self.records else None
        return bool(self.job and successor and self.job.get("JobId") == str(successor))


def is_run(directory: Path) -> bool:
    return (directory / "attempts").is_dir()


def read(
    directory: Path,
    *,
    quick: bool = False,
    now: Optional[float] = None,
    slurm_deadline_s: float = SLURM_DEADLINE_S,
) -> RunFiles:
    """Read one run. `quick` reads only the ends of files, enough for a line of a list. A controller that
    does not answer is asked again until `slurm_deadline_s`; with 0 once."""
    now = time.time() if now is None else now
    numbers = sorted(int(p.stem) for p in (directory / "attempts").glob("*.json") if p.stem.isdigit())
    records = [_record(directory, number, now) for number in numbers]
    ledger = _json(directory / "data" / "ledger.json")
    return RunFiles(
        directory=directory,
        now=now,
        records=tuple(records),
        config=_config(directory / "config.yaml"),
        rows=_rows(ledger),
        timing=tuple(json_lines(directory / "timing.jsonl", TAIL_BYTES if quick else None)),
        metrics=tuple(json_lines(directory / "metrics.jsonl", TAIL_BYTES)),
        loop_began=(directory / "timing.jsonl").exists(),
        checkpoints=_checkpoints(directory / "checkpoints"),
        job=_ask_slurm(records[-1], slurm_deadline_s) if records else None,
        requeue_pending=_text(directory / "requeue_pending"),
    )


def _record(directory: Path, number: int, now: float) -> dict[str, Any]:
    """An attempt's record, with its last heartbeat, whether its process lives, and its stop request.

    `alive` is None where nothing here can tell: a job is asked of Slurm instead.
    """
    heartbeat = min(attempts.record_file(directory, number).stat().st_mtime, now)
    record = {"state": "X", "began": heartbeat, **attempts.read(directory, number), "attempt": number}
    alive = None
    if record.get("job_id") is None and not record.get("broken"):
        me = lease.Owner(None, 0, os.uname().nodename, os.getpid(), None)
        with contextlib.suppress(KeyError):  # a record that another version wrote
            owner, _ = lease.living_owner(directory, {"job_id": None, **record, "state": "X"}, me)
            alive = owner is not None
    stop = _text(directory / "attempts" / f"{number:04d}.stop")
    return {**record, "heartbeat": heartbeat, "alive": alive, "stop_reason": stop}


def _ask_slurm(record: Mapping[str, Any], deadline_s: float) -> Optional[Mapping[str, str]]:
    """Only about a job that may still come to something, and only where Slurm is."""
    target = record.get("target") or record.get("job_id")
    final = record.get("action") in ("stop", "finished")
    if target is None or final or shutil.which("scontrol") is None:
        return None
    try:
        own = command.show_job(str(target), deadline_s=deadline_s) or {}
        if not record.get("successor") or own.get("JobState", "COMPLETED") not in command.ENDED:
            return own
        behind = command.show_job(str(record["successor"]), deadline_s=deadline_s) or {}
        return own if behind.get("JobState", "COMPLETED") in command.ENDED else behind
    except command.SlurmError:
        return None


def _config(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except (OSError, UnicodeDecodeError):
        return None


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _rows(ledger: Any) -> Optional[int]:
    try:
        return int(ledger["train"]["used"])
    except (KeyError, TypeError, ValueError):
        return None


def json_lines(path: Path, tail: Optional[int] = None) -> list[dict[str, Any]]:
    """The records of a JSONL file (of its last `tail` bytes); torn and foreign lines are left out."""
    try:
        raw = (path.read_bytes() if tail is None else files.tail(path, tail)).splitlines(keepends=True)
    except OSError:
        return []
    found = []
    for line in raw:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    found.append(record)
    return found


def _checkpoints(root: Path) -> Checkpoints:
    names = sorted(os.listdir(root)) if root.is_dir() else []
    committed = attempts.committed_steps(root)
    best = _json(root / "BEST.json")
    size = None
    if committed:
        manifest = _json(root / f"step-{committed[-1]:06d}" / "manifest.json")
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            size = sum(entry["size"] for entry in manifest["files"].values())
    return Checkpoints(
        tuple(committed),
        best if isinstance(best, dict) and isinstance(best.get("step"), int) else None,
        tuple(n for n in names if ".damaged-" in n),
        tuple(n for n in names if n.endswith(".tmp")),
        size,
    )


def total_steps(run: RunFiles) -> Optional[int]:
    """Steps of the whole run, as rank 0 recorded them. Before it has come so far: config.yaml, and what the
    newest attempt's command line said over it (a finished run is extended by a larger max_steps, and its
    config.yaml stays)."""
    if run.records and isinstance(run.records[-1].get("max_steps"), int):
        return int(run.records[-1]["max_steps"])
    train = dict(run.config.get("train") or {})
    if run.records:
        train.update(_words(run.records[-1].get("args") or []))
    number = train.get("max_steps")
    if number is None and run.rows and train.get("global_batch_size") and train.get("max_epochs"):
        per_epoch = -(-run.rows // train["global_batch_size"])
        per_epoch = min(per_epoch, train.get("limit_train_batches") or per_epoch)
        number = math.ceil(train["max_epochs"] * per_epoch)
    return number if isinstance(number, int) else None


def _words(args: Sequence[str]) -> dict[str, Any]:
    """The `train.` keys among key=value words, aliases included."""
    found = {}
    for word in args:
        key, equals, text = word.partition("=")
        name = ALIASES[key].key if key in ALIASES else key
        if equals and name in ("train.max_steps", "train.max_epochs", "train.limit_train_batches"):
            with contextlib.suppress(yaml.YAMLError):
                found[name[6:]] = yaml.safe_load(text)
    return found
