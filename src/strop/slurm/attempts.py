"""The record of every start of a job, on disk: attempts/0001.json, attempts/0002.json, ...

`begin` creates the next record with O_EXCL and state X before any rank starts. Rank 0 rewrites it (by
rename) as DONE, YIELD or FAIL; the batch shell's `end` adds cause and action. A left-over X is an attempt
that died hard. The newest record is also the run's *lease*: `begin` refuses while its owner lives
(`strop.slurm.lease`), and an attempt with a newer one beside it must not commit any more
(`holds_lease`), which stops ranks that Slurm could not reach when it declared their node dead.

A rank that fails leaves a verdict in logs/NNNN/, since srun's exit code does not tell causes apart.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.errors import UserError
from strop.obs import log_line, secrets
from strop.slurm import lease, stop

MARKER = "COMMITTED.json"
"""In a checkpoint's directory: without it that is rubble."""
STATES = ("X", "DONE", "YIELD", "FAIL")
LAST_TIME = 253402300800.0
"""The year 10000, in Unix seconds."""
LARGEST_OFFSET_S = 1e9
KINDS = ("user", "diverged", "storage", "oom", "hang", "exception", "peer")


def record_file(run_dir: Path, attempt: int) -> Path:
    return run_dir / "attempts" / f"{attempt:04d}.json"


def log_dir(run_dir: Path, attempt: int) -> Path:
    return run_dir / "logs" / f"{attempt:04d}"


def rank_log_dir(run_dir: Path, attempt: int, local: Optional[Path]) -> Path:
    """Where the ranks write their logs: on the node's own disk (`local`: STROP_LOG_DIR) if there is one."""
    return log_dir(run_dir, attempt) if local is None else local / run_dir.name / f"{attempt:04d}"


def _make_directory(path: Path) -> None:
    """UserError where it cannot be, by its name or the user's rights; a full or broken disk is OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            raise
        raise UserError(f"run.dir: {path.parent} cannot be made: {error.strerror}") from None


def begin(
    run_dir: Path,
    *,
    job_id: Optional[str],
    restart_count: int,
    nodes: list[str],
    pid: Optional[int] = None,
    wait_s: float = 180.0,
    **facts: Any,
) -> int:
    """Create the next attempt's record and return its number, or raise `lease.Held` or UserError.

    `pid` is the process whose life is the attempt's (default: this one). Any further `facts` (code,
    launcher, arguments) are recorded as they are. An owner that is still dying is given `wait_s`.
    Two that begin at once see each other: one creates the file, the other finds its living owner.
    """
    _make_directory(run_dir / "attempts")
    pid = pid or os.getpid()
    me = lease.Owner(job_id, restart_count, socket.gethostname(), pid, lease.process_start(pid))
    deadline = time.monotonic() + wait_s
    while True:
        records = read_all(run_dir)  # anew in every round: what was half-written before is whole now
        holder, dying = lease.living_owner(run_dir, records[-1], me) if records else (None, False)
        if holder is not None:
            if not dying or time.monotonic() >= deadline:
                raise lease.Held(
                    f"run {run_dir} is in use by {holder} (attempt {records[-1]['attempt']}); "
                    "wait for it, cancel it, or give this one another run.name"
                )
            time.sleep(0.5)
            continue
        attempt = records[-1]["attempt"] + 1 if records else 1
        record = {
            "attempt": attempt,
            "state": "X",
            **me.as_record(),
            "nodes": list(nodes),
            "began": time.time(),
            "committed_step": committed_step(run_dir),
            **facts,
        }
        if _create(record_file(run_dir, attempt), record):
            break
    if records and records[-1]["state"] == "X":
        stop.request(run_dir, records[-1]["attempt"], f"superseded by attempt {attempt}")
    log_dir(run_dir, attempt).mkdir(parents=True, exist_ok=True)
    return attempt


def _create(path: Path, record: dict[str, Any]) -> bool:
    """False if somebody else was faster."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    files.fsync(path.parent)
    return True


def finish(
    run_dir: Path, attempt: int, state: str, *, step: Optional[int], reason: Optional[str] = None
) -> None:
    """The outcome, written by rank 0 before the final barrier."""
    assert state in STATES[1:], state
    update(run_dir, attempt, state=state, step=step, reason=reason, ended=time.time())


def update(run_dir: Path, attempt: int, **fields: Any) -> dict[str, Any]:
    """Add fields to a record, by rename. One writer at a time: `begin`, then rank 0, then `end`."""
    record = read(run_dir, attempt)
    record.update(fields)
    files.write_json(record_file(run_dir, attempt), record)
    return record


def read(run_dir: Path, attempt: int) -> dict[str, Any]:
    """One record. A file that was cut off by its creator's death reads as an X of an unknown owner."""
    path = record_file(run_dir, attempt)
    record = files.read_json(path)
    if not isinstance(record, dict) or not _has_its_types(record):
        record = {"attempt": attempt, "state": "X", "began": path.stat().st_mtime, "broken": True}
    return record


def _has_its_types(record: Mapping[str, Any]) -> bool:
    """False for what is JSON, but no record of ours: readers rely on types and times."""
    kinds: dict[str, Any] = {"state": str, "cause": str, "nodes": list, "args": list, "output": list}
    kinds.update(machine=dict, rank=int, step=int, signals=list)
    of_kind = all(record.get(key) is None or isinstance(record[key], kind) for key, kind in kinds.items())
    return of_kind and all(
        record.get(key) is None or is_time(record[key]) for key in ("began", "ended", "closed")
    )


def read_all(run_dir: Path) -> list[dict[str, Any]]:
    """All records, oldest first."""
    folder = run_dir / "attempts"
    names = os.listdir(folder) if folder.is_dir() else []
    numbers = sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{4,9}\.json", name))
    return [read(run_dir, number) for number in numbers]


def discard(run_dir: Path, attempt: int) -> None:
    """Take away a run under a name that nobody chose whose first start was refused: nothing goes on there."""
    if attempt == 1 and committed_step(run_dir) is None and not (run_dir / "metrics.jsonl").exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def holds_lease(run_dir: Path, attempt: int) -> bool:
    """Ask before every commit: False once a newer attempt has begun, and then nothing may be written."""
    return not record_file(run_dir, attempt + 1).exists()


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps in a run's directory of checkpoints that have the commit marker, ascending."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name))
    return [step for step in steps if (checkpoints / f"step-{step:06d}" / MARKER).is_file()]


def committed_step(run_dir: Path) -> Optional[int]:
    """Step of the newest committed checkpoint; None before the first."""
    return next(reversed(committed_steps(run_dir / "checkpoints")), None)


def find_checkpoint(run_dir: Path, which: str) -> Optional[Path]:
    """The committed checkpoint that best, latest or a number means; None if it is not there."""
    root = run_dir / "checkpoints"
    if which == "best":
        best = files.read_json(root / "BEST.json")
        step = best.get("step") if isinstance(best, dict) else None
    else:
        step = committed_step(run_dir) if which == "latest" else int(which)
    return root / f"step-{step:06d}" if step in committed_steps(root) else None


def write_verdict(
    run_dir: Path,
    attempt: int,
    rank: int,
    *,
    kind: str,
    exit_code: int,
    message: str,
    exception: Optional[str] = None,
    traceback: Optional[str] = None,
    step: Optional[int] = None,
    phase: Optional[str] = None,
    node: Optional[str] = None,
) -> None:
    """Say why this rank ends. `peer`: it only followed another rank's end. The first verdict stays."""
    assert kind in KINDS, kind
    path = log_dir(run_dir, attempt) / f"verdict-{rank:05d}.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    verdict = {
        "rank": rank,
        "node": node or socket.gethostname(),
        "kind": kind,
        "exit_code": exit_code,
        "message": secrets.redact(message),
        "exception": exception,
        "traceback": secrets.redact(traceback) if traceback else None,
        "step": step,
        "phase": phase,
        "time": time.time(),
        "fingerprint": fingerprint(exception or kind, traceback or message),
    }
    files.write_json(path, verdict)


def read_verdicts(run_dir: Path, attempt: int) -> list[dict[str, Any]]:
    """All verdicts of an attempt, by rank, without those that were cut off."""
    paths = sorted(log_dir(run_dir, attempt).glob("verdict-*.json"))
    return [verdict for verdict in map(read_verdict, paths) if verdict is not None]


def read_verdict(path: Path) -> Optional[dict[str, Any]]:
    """None for a file that was cut off, or is no verdict."""
    value = files.read_json(path)
    needed = {"rank", "node", "exit_code", "message", "time"}
    if not isinstance(value, dict) or not needed <= value.keys() or value.get("kind") not in KINDS:
        return None
    texts = [value.get(key) for key in ("node", "message", "exception", "traceback", "phase", "fingerprint")]
    step = value.get("step")
    usable = all(text is None or isinstance(text, str) for text in texts) and is_time(value["time"])
    return value if usable and (step is None or isinstance(step, int)) else None


def is_time(value: Any) -> bool:
    """Unix seconds that a calendar has; not NaN."""
    return isinstance(value, (int, float)) and 0 <= value < LAST_TIME


def read_clocks(run_dir: Path, attempt: int) -> dict[int, tuple[str, float]]:
    """Node and clock offset in seconds from rank 0's, of every rank; {} if the ranks did not come so far."""
    told = files.read_json(log_dir(run_dir, attempt) / "clock.json")
    entries = told.get("ranks", []) if isinstance(told, dict) else []
    absurd = [entry["rank"] for entry in entries if not abs(entry["offset_s"]) < LARGEST_OFFSET_S]
    if absurd:
        raise ValueError(f"the offset of rank {absurd[0]} is no clock's")
    return {int(entry["rank"]): (str(entry["node"]), entry["offset_s"]) for entry in entries}


def ranks_with_logs(logs: Path) -> set[int]:
    return {segment.rank for segment in map(log_line.segment, logs.glob("rank*")) if segment}


def fingerprint(kind: str, trace: str) -> str:
    """Equal for the same failure at the same place.

    Of a Python traceback or faulthandler's dump only `file.py:line` counts, not the values in the message,
    which differ from one attempt to the next; without frames, the text without its numbers.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    place = [f"{os.path.basename(name)}:{line}" for name, line in frames] or [re.sub(r"\d+", "#", trace)]
    return hashlib.sha256("\n".join([kind, *place]).encode()).hexdigest()[:12]
