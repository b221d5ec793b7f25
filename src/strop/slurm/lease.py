"""Is the owner of a run's newest attempt still alive? Two attempts must never run together.

An attempt's owner is the batch shell (or a trainer started by hand): a Slurm job's restart, or a process
on a host. The same job with a higher restart count supersedes its earlier self, since Slurm restarts a
job only after it has ended it (or declared its node dead). Another job is asked of Slurm. A process is
looked up on its own host; from elsewhere only the record's age tells, which living ranks keep touching.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from strop.slurm import command

HEARTBEAT_LIMIT_S = 600.0
CREATION_LIMIT_S = 30.0
ALIVE = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


class Held(RuntimeError):
    """The run belongs to somebody who is alive; the message names them."""


@dataclass(frozen=True)
class Owner:
    job_id: Optional[str]
    restart_count: int
    host: str
    pid: int
    pid_start: Optional[str]
    """Ticks since boot at which the process started: process ids are used again."""

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def process_start(pid: int) -> Optional[str]:
    """Field 22 of /proc/PID/stat; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def living_owner(run_dir: Path, record: dict[str, Any], me: Owner) -> tuple[Optional[str], bool]:
    """(who holds the run, or None if the attempt has ended or its owner is dead; whether they are dying)."""
    if record.get("broken"):  # its creator died while it wrote, or is writing just now
        young = _age_s(run_dir, record) < CREATION_LIMIT_S
        return ("an attempt that is just being created", True) if young else (None, False)
    if record["state"] != "X":
        return None, False
    same_job = record["job_id"] is not None and record["job_id"] == me.job_id
    if same_job and record["restart_count"] < me.restart_count:
        return None, False
    if record["job_id"] is not None and not same_job:
        return _living_job(record.get("target") or record["job_id"])
    return _living_process(run_dir, record, me), False


def _living_job(target: str) -> tuple[Optional[str], bool]:
    job = command.show_job(target)
    state = job["JobState"] if job else "gone"
    if state == "COMPLETING":
        return f"job {target} (COMPLETING)", True
    return (f"job {target} ({state})", False) if state in ALIVE else (None, False)


def _living_process(run_dir: Path, record: dict[str, Any], me: Owner) -> Optional[str]:
    name = f"process {record['pid']} on {record['host']}"
    if record["host"] == me.host:
        started = process_start(record["pid"])
        return name if started is not None and started == record["pid_start"] else None
    age_s = _age_s(run_dir, record)
    if age_s < HEARTBEAT_LIMIT_S:
        return f"{name} (last sign of life {age_s:.0f} s ago; taken for dead after {HEARTBEAT_LIMIT_S:.0f} s)"
    return None


def _age_s(run_dir: Path, record: dict[str, Any]) -> float:
    return time.time() - os.stat(run_dir / "attempts" / f"{record['attempt']:04d}.json").st_mtime
