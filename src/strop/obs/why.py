"""Why a run's last failure happened: the first rank that failed by itself, and what followed from it.

`explain` puts together what lies in the run's directory: the attempt's record (the decision), the fates of
its ranks (`strop.obs.fates`), the log around the first failure, and how the run stands now. Nothing is
written, and Slurm is asked only about a job that may still come to something. `text` is one screen of it
(`strop.obs.why_text`).
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError
from strop.obs import fates, nearby, run_files, status
from strop.obs.fates import WELL, Fate
from strop.obs.nearby import Line
from strop.obs.secrets import redact
from strop.obs.why_text import WIDTH, first_line
from strop.obs.why_text import text as text
from strop.slurm import attempts, decide
from strop.slurm.hostlist import ranges

SLURM_SHOWN = 4


@dataclass(frozen=True)
class Group:
    """Ranks that ended alike."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Why:
    """What is known of one attempt's end. Texts are without secrets."""

    run: str
    directory: str
    state: str
    """How the run stands now, as tools.status says."""
    detail: str
    attempt: Optional[int]
    """None where no attempt has failed (or begun)."""
    num_attempts: int
    job_id: Optional[str]
    nodes: tuple[str, ...]
    num_ranks: int
    began: Optional[float]
    ended: Optional[float]
    cause: Optional[str]
    """A key of decide.WORDS; None while the attempt runs."""
    first: Optional[Fate]
    """The rank that failed first by itself; None where no rank is to blame or known."""
    alike: Optional[Group]
    """The ranks that failed in the same way beside it."""
    others: tuple[Group, ...]
    """Ranks that failed by themselves in other ways."""
    followed: tuple[Group, ...]
    silent: tuple[Group, ...]
    lines: tuple[Line, ...]
    """The log around the failure."""
    slurm: tuple[str, ...]
    decision: str
    next: str
    notes: tuple[str, ...] = ()


def explain(run_dir: Path, attempt: Optional[int] = None) -> Why:
    """The last failure, or how the given attempt ended. Raises UserError if there is none such."""
    run = read(run_dir)
    return explain_read(run, status.assess(run), attempt)


def read(run_dir: Path) -> run_files.RunFiles:
    if not run_files.is_run(run_dir):
        raise UserError(f"{run_dir}: not a run of strop: no attempts/ in it")
    return run_files.read(run_dir, slurm_deadline_s=0)


def explain_read(run: run_files.RunFiles, now: status.Status, attempt: Optional[int] = None) -> Why:
    """`explain`, of what has been read."""
    run_dir = run.directory
    index = _which(run.records, attempt, now, run_dir)
    head: dict[str, Any] = {
        "run": run_dir.resolve().name,
        "directory": str(run_dir),
        "state": now.state,
        "detail": redact(now.detail),
        "num_attempts": len(run.records),
    }
    if index is None:
        return _nothing(head, now)
    record = run.records[index]
    following = run.records[index + 1] if index + 1 < len(run.records) else None
    found = fates.read(run_dir, record, following)
    alive = following is None and now.state in status.RUNNING and not record.get("closed")
    row = now.attempts[index]
    return Why(
        **head,
        attempt=record["attempt"],
        job_id=row.job_id,
        nodes=row.nodes,
        num_ranks=len(found.ranks),
        began=row.began,
        ended=row.ended,
        cause=found.cause if found.first or not alive else None,
        first=found.first and _clean(found.first),
        lines=tuple(nearby.around(run_dir, record["attempt"], found)),
        slurm=_slurm(found, record, run.job if following is None else None),
        decision=_decision(run, index, alive, found.first is not None),
        next=_next(now, record, following, found.cause),
        notes=found.notes,
        **_groups(found, alive),
    )


def _which(
    records: Sequence[Mapping[str, Any]], attempt: Optional[int], now: status.Status, run_dir: Path
) -> Optional[int]:
    """The index of the attempt to explain: the one asked for, else the last that failed; None without one."""
    numbers = [r["attempt"] for r in records]
    if attempt is not None:
        if attempt not in numbers:
            raise UserError(f"--attempt {attempt}: {run_dir} has {ranges(numbers) if numbers else 'none'}")
        return numbers.index(attempt)
    failed = [i for i, row in enumerate(now.attempts) if row.cause is not None and row.cause not in WELL]
    if now.attempts and now.attempts[-1].cause is None and _any_verdict(run_dir, numbers[-1]):
        failed.append(len(numbers) - 1)  # it has failed, and is not yet ended
    return failed[-1] if failed else None


def _any_verdict(run_dir: Path, number: int) -> bool:
    return next(attempts.log_dir(run_dir, number).glob("verdict-*.json"), None) is not None


def _nothing(head: dict[str, Any], now: status.Status) -> Why:
    last = now.attempts[-1] if now.attempts else None
    return Why(
        **head,
        attempt=None,
        job_id=now.job_id,
        nodes=last.nodes if last else (),
        num_ranks=0,
        began=last.began if last else None,
        ended=last.ended if last else None,
        cause=None,
        first=None,
        alike=None,
        others=(),
        followed=(),
        silent=(),
        lines=(),
        slurm=(),
        decision="",
        next=now.next_action,
    )


def _clean(fate: Fate) -> Fate:
    """Raw stderr and what an older writer left may hold a secret."""
    trace = fate.traceback and redact(fate.traceback)
    return dataclasses.replace(fate, message=redact(fate.message), traceback=trace)


# -------------------------------------------------------------------------------------------- groups


def _groups(found: fates.Fates, alive: bool) -> dict[str, Any]:
    """The other ranks, by how they ended: alike, others, followed, silent."""
    first = found.first
    rest = [f for f in found.ranks if first is None or f.rank != first.rank]
    own = [f for f in rest if f.follows is None and f.kind in (*attempts.KINDS, "segfault", "killed", "torn")]
    if found.cause in WELL or (alive and first is None):
        own, rest = [], [f for f in rest if f.follows]
    alike = [f for f in own if first and _same(f, first)]
    if first and first.kind == "silent":
        alike = [f for f in rest if f.kind == "silent" and f.node == first.node and f.node]
    others = [f for f in own if not (first and _same(f, first))]
    spoke = first is not None and first.kind != "silent"
    silent = [f for f in rest if f.kind == "silent" and f not in alike]
    together = [f for f in others if f.kind == "killed" and spoke]  # srun's own kill
    return {
        "alike": _group(alike, "")[0] if alike else None,
        "others": tuple(_group([f for f in others if f not in together], None)),
        "followed": tuple(_group([f for f in rest if f.follows], None)),
        "silent": tuple(_group([*silent, *together], "ended with the step" if spoke else "left no word")),
    }


def _same(a: Fate, b: Fate) -> bool:
    return a.kind == b.kind and (a.fingerprint == b.fingerprint if a.fingerprint else a.message == b.message)


def _group(members: Sequence[Fate], what: Optional[str]) -> list[Group]:
    """The largest groups first. what: None takes each member's own words."""
    by_words: dict[str, list[Fate]] = {}
    for f in members:
        own = f.follows or ": ".join(filter(None, [f.exception or f.kind, first_line(redact(f.message))]))
        by_words.setdefault(own if what is None else what, []).append(f)
    groups = [
        Group(tuple(f.rank for f in same), tuple(sorted({f.node for f in same if f.node})), words)
        for words, same in by_words.items()
    ]
    return sorted(groups, key=lambda g: (-len(g.ranks), g.ranks))


# --------------------------------------------------------------------------------- Slurm and decision


def _slurm(
    found: fates.Fates, record: Mapping[str, Any], job: Optional[Mapping[str, str]]
) -> tuple[str, ...]:
    """What Slurm said itself: its lines in the output file, srun's exit code, the job as it is known now."""
    lines = [redact(line) for line in found.slurm]
    if len(lines) > SLURM_SHOWN:
        lines = [*lines[: SLURM_SHOWN - 1], f"... and {len(lines) - SLURM_SHOWN + 1} lines more"]
    told = []
    if record.get("launcher_exit") is not None:
        told.append(f"the step ended with exit code {record['launcher_exit']}")
    if record.get("signals"):
        told.append(f"the batch shell got {', '.join(record['signals'])}")
    if record.get("exit_code") is not None:
        told.append(f"the attempt's own exit code is {record['exit_code']}")
    if job:
        reason = job.get("Reason", "None")
        state = job.get("JobState", "?") + (f" ({reason})" if reason != "None" else "")
        told.append(f"the job is {state} now, exit code {job.get('ExitCode', '?')}")
    return (*lines, *(["; ".join(told)] if told else []))


def _decision(run: run_files.RunFiles, index: int, alive: bool, failed: bool) -> str:
    """What the job body decided, and what of the budgets was spent then."""
    records = list(run.records)
    record = records[index]
    if alive:
        return "none yet: the job body waits for the other ranks to end" if failed else "it still runs"
    action = record.get("action")
    if action is None:
        if record.get("launcher") == "direct" and record.get("state") != "X":
            return "started by hand: nobody requeues it"
        return "none was recorded: its batch shell died too"
    told = (record.get("summary") or "").strip().splitlines()
    words = told[-1] if told else action
    words = words if words.startswith(action) or action != "requeue" else f"{action}: {words}"
    following = records[index + 1] if index + 1 < len(records) else None
    after = following.get("committed_step") if following else (run.checkpoints.committed or (None,))[-1]
    history = decide.since_progress([*records[:index], {**record, "action": None}], after)
    failures = sum(p.cause in decide.FAILURES for p in history)
    if history and record.get("cause") in decide.FAILURES and " of " not in words:
        words += f" (failure {failures} of {decide.FAILURE_LIMIT} without a new checkpoint)"
    mark = record.get("fingerprint")
    same = sum(p.fingerprint == mark for p in history) if mark else 0
    if same > 1 and "same" not in words:
        words += f"; the same failure as in {same - 1} attempt{'s' if same > 2 else ''} before"
    return redact(words)


def _next(
    now: status.Status,
    record: Mapping[str, Any],
    following: Optional[Mapping[str, Any]],
    cause: Optional[str],
) -> str:
    if following is not None and now.state in ("finished", *status.RUNNING):
        return f"nothing: attempt {following['attempt']} went on, and the run is {now.state}"
    text = now.next_action
    if cause == "oom":
        text += "\n" + textwrap.fill(decide.LESS_MEMORY, WIDTH)
    if cause == "storage":
        text += "\nmake room in the file system of the run (or move run.dir) first"
    if cause == "hang":
        text += f"\nthe stacks of all ranks are in logs/{record['attempt']:04d}/rank*.err"
    return redact(text)
