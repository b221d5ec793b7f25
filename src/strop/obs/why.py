"""Why a run's last failure happened: the first rank that failed by itself, and what followed from it.

`explain` puts together what lies in the run's directory: the attempt's record (the decision), the fates of
its ranks (`strop.obs.fates`), the log around the first failure, and how the run stands now. Nothing is
written, and Slurm is asked only about a job that may still come to something. `text` is one screen of it.
"""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError
from strop.obs import fates, nearby, run_files, status
from strop.obs.fates import Fate, ranges
from strop.obs.nearby import Line
from strop.obs.secrets import redact
from strop.slurm import attempts, decide

WELL = ("done", "preempted", "time_limit", "stopped", "requeued", "cancelled")
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
    if not run_files.is_run(run_dir):
        raise UserError(f"{run_dir}: not a run of strop: no attempts/ in it")
    run = run_files.read(run_dir)
    now = status.assess(run)
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


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


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
    if same > 1:
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


# ---------------------------------------------------------------------------------------------- text

BOLD, RED, YELLOW, DIM, OFF = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
WIDTH = 150
FRAMES = 4
LABEL = 10
GROUPS = 4


def text(why: Why, color: bool = False) -> str:
    """One screen. Plain where color is off."""

    def paint(words: str, *codes: str) -> str:
        return f"{''.join(codes)}{words}{OFF}" if color and words else words

    state_color = RED if why.state in status.BAD else YELLOW if why.state in ("queued", "stopped") else ""
    title = f"{why.run}: {paint(why.state, BOLD, state_color)}"
    rows = [title + (f", {why.detail}" if why.detail else "")]
    if why.attempt is None:
        rows.append("no attempt has failed" if why.num_attempts else "no attempt has begun")
        return "\n".join([*rows, *_row("next", [why.next], paint)]) + "\n"
    rows += [_attempt_line(why), ""]
    rows += _row("cause", _cause(why, paint), paint)
    rows += _row("log", [_log_line(line, paint) for line in why.lines], paint)
    for label, groups in (("others", why.others), ("followed", why.followed), ("silent", why.silent)):
        rows += _row(label, _group_lines(groups), paint)
    rows += _row("slurm", list(why.slurm), paint)
    rows += _row("decision", [why.decision], paint)
    rows += _row("next", why.next.splitlines(), paint)
    rows += _row("note", list(why.notes), paint)
    return "\n".join(rows) + "\n"


def _row(label: str, lines: Sequence[str], paint: Any) -> list[str]:
    shown = [line for line in lines if line]
    heads = [paint(label.ljust(LABEL), BOLD), *[" " * LABEL] * len(shown)]
    return [head + line for head, line in zip(heads, shown)]


def _attempt_line(why: Why) -> str:
    parts = [f"attempt {why.attempt} of {why.num_attempts}"]
    parts += [f"job {why.job_id}"] if why.job_id else []
    parts += [f"{why.num_ranks} ranks on {len(why.nodes)} node{'s' if len(why.nodes) != 1 else ''}"]
    if why.began is not None:
        parts.append(f"began {_date(why.began)}")
    if why.ended is not None:
        parts.append(f"ended {_date(why.ended)} UTC")
    return ", ".join(parts)


def _cause(why: Why, paint: Any) -> list[str]:
    """What and where, the exception, the end of its traceback."""
    words = decide.WORDS.get(why.cause or "", why.cause or "it runs")
    f = why.first
    if f is None:
        return [paint(words, BOLD, RED if why.cause not in (None, *WELL) else "")]
    lines = [paint(words, BOLD, RED) + f": {where(f)}"]
    message = f.message.strip().splitlines()
    named = f.exception if f.exception and not f.message.startswith(f.exception) else ""
    lines.append(clip(": ".join(filter(None, [named, first_line(f.message)])), WIDTH))
    lines += [clip(line, WIDTH) for line in message[1:3]]
    if f.kind == "silent" and not f.message:
        lost = "no stacks: it was stopped" if why.cause == "hang" else "no word: killed at once"
        lines.append(f"it left {lost}, or its node is gone")
    lines += [paint(clip(line, WIDTH), DIM) for line in trace_end(f.traceback, FRAMES)]
    if why.alike:
        lines.append(f"the same on {named_ranks(why.alike)}")
    return lines


def where(f: Fate) -> str:
    parts = [f"rank {f.rank}" + (f" on {f.node}" if f.node else "")]
    parts += [f"phase {f.phase}"] if f.phase else []
    parts += [f"step {f.step}"] if f.step is not None else []
    if f.time is not None:
        parts.append(f"{'about ' if f.kind in ('silent', 'killed', 'segfault') else ''}{clock(f.time)}")
    return ", ".join(parts)


def trace_end(trace: Optional[str], frames: int) -> list[str]:
    """The last frames of a traceback, one line each: "loop.py:210 in _forward: return t.policy(batch)"."""
    found: list[str] = []
    for line in (trace or "").splitlines():
        stripped = line.strip()
        if stripped.startswith('File "'):
            path, _, rest = stripped[6:].partition('", line ')
            number, _, name = rest.partition(", in ")
            found.append(f"{'/'.join(path.split('/')[-2:])}:{number}" + (f" in {name}" if name else ""))
        elif found and line.startswith("    ") and ": " not in found[-1] and set(stripped) - set("^~ "):
            found[-1] += f": {stripped}"
    return [f"  {line}" for line in found[-frames:]]


def named_ranks(group: Group, limit: int = 12) -> str:
    count = len(group.ranks)
    nodes = f" on {group.nodes[0]}" if len(group.nodes) == 1 else ""
    if count > 1 and len(group.nodes) > 1:
        nodes = f" on {len(group.nodes)} nodes"
    return f"{'rank' if count == 1 else f'{count} ranks:'} {ranges(group.ranks, limit)}{nodes}"


def _group_lines(groups: Sequence[Group]) -> list[str]:
    lines = [clip(f"{named_ranks(g)}  {g.what}", WIDTH) for g in groups[:GROUPS]]
    left = sum(len(g.ranks) for g in groups[GROUPS:])
    return [*lines, *([f"and {left} ranks more"] if left else [])]


def _log_line(line: Line, paint: Any) -> str:
    code = {"ERROR": RED, "CRITICAL": RED, "WARNING": YELLOW}.get(line.level, DIM)
    at = clock(line.time) if line.time is not None else " " * len("03:12:07.412")
    return paint(clip(f"{at} [{line.ranks}] {line.level or 'raw'} {line.message}", WIDTH), code)


def clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def clock(unix_s: float) -> str:
    ms = round(unix_s * 1000)
    return time.strftime("%H:%M:%S", time.gmtime(ms // 1000)) + f".{ms % 1000:03d}"


def _date(unix_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(unix_s))
