"""How a run stands: a pure function from what was read of it (`run_files.RunFiles`) to `Status`.

The newest attempt's record says how it ended, or X; then the life of its owner decides between running,
queued and dead. What an attempt cost follows from timing.jsonl, which is never cut back: the work between
its last commit and its end is lost, and so is the next attempt's start-up. A step that was done again
counts once, with its last duration.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from strop.obs import run_files
from strop.obs.next_action import next_action
from strop.obs.run_files import Checkpoints, RunFiles
from strop.slurm import decide, lease

RUNNING = ("starting", "training", "validating", "saving", "stopping")
BAD = ("failed", "held", "pending", "dead")
RECENT_STEPS = 31
"""As in `progress`: the ETA is a median over so many steps."""


@dataclass(frozen=True)
class Attempt:
    """One start of the job and what it came to."""

    attempt: int
    job_id: Optional[str]
    nodes: tuple[str, ...]
    began: float
    ended: Optional[float]
    """None while it runs; of one that died without a word, its last sign of life."""
    state: str
    cause: Optional[str]
    """A key of decide.WORDS; "lost" for a record that nobody finished; None while it runs."""
    action: Optional[str]
    steps: int
    """Steps that it trained, repeated ones included."""
    committed_step: Optional[int]
    """Newest commit when it ended (now, while it runs)."""
    lost_s: Optional[float]
    """From its last commit to its end; None while it runs, 0 if it finished."""
    resume_s: Optional[float]
    """From the next attempt's begin to that one's first step; None while that is not known."""
    repeated_steps: int
    """Of its steps, those that a later attempt did again."""
    summary: str
    """What the job body said at its end."""


@dataclass(frozen=True)
class Status:
    name: str
    directory: str
    algo: Optional[str]
    state: str
    """queued, starting, training, validating, saving, stopping, stopped, finished, held, pending, failed,
    cancelled or dead."""
    detail: str
    step: int
    total_steps: Optional[int]
    eta_s: Optional[float]
    """Of training that is left; None without two steps to measure it by."""
    tokens_per_s: Optional[float]
    metrics: Optional[dict[str, Any]]
    evaluation: Optional[dict[str, Any]]
    job_id: Optional[str]
    attempts: tuple[Attempt, ...]
    kept_s: float
    """Time in steps that count, each once."""
    wall_s: float
    """From the first start to now, or to the end of what does not go on."""
    queue_s: float
    """Of it, between attempts and since the last one while it waits."""
    effective_ratio: Optional[float]
    """kept_s / (wall_s - queue_s)."""
    checkpoints: Checkpoints
    next_action: str


def assess(run: RunFiles) -> Status:
    standing = _without_refusals(run)
    state, detail = _state(standing)
    if standing is not run:
        detail = f"a later start was refused: {_first_line(run.records[-1])}"
    total = run_files.total_steps(standing)
    trained = [m for m in run.metrics if "loss" in m]
    evaluations = [m for m in run.metrics if any(key.startswith("eval_") for key in m)]
    step = max([trained[-1]["step"] if trained else 0, *run.checkpoints.committed[-1:]])
    if total is not None and step > total:  # an extension that only a changed file tells of
        total = None
    rows = _attempts(run, state)
    kept = _kept_s(run, state)
    wall, queue = _wall_and_queue(run, rows, state)
    newest: Mapping[str, Any] = run.records[-1] if run.records else {}
    status = Status(
        name=run.directory.name,
        directory=str(run.directory),
        algo=newest.get("algo") or run.config.get("algo"),
        state=state,
        detail=detail,
        step=step,
        total_steps=total,
        eta_s=_eta_s(run, step, total),
        tokens_per_s=_median([t.get("tokens_per_s") for t in _newest(run)[-RECENT_STEPS:]]),
        metrics=trained[-1] if trained else None,
        evaluation=evaluations[-1] if evaluations else None,
        job_id=run.target,
        attempts=rows,
        kept_s=kept,
        wall_s=wall,
        queue_s=queue,
        effective_ratio=kept / (wall - queue) if wall > queue else None,
        checkpoints=run.checkpoints,
        next_action="",
    )
    return dataclasses.replace(status, next_action=next_action(standing, status.state, step))


def _without_refusals(run: RunFiles) -> RunFiles:
    """A finished run stays finished when somebody starts it again and is refused: for another configuration,
    say. The attempts after its end count only once they train, or fail for another reason than the user's."""
    trained = {t.get("attempt") for t in run.timing}
    number = len(run.records)
    while (
        number and _is_refused(run.records[number - 1]) and run.records[number - 1]["attempt"] not in trained
    ):
        number -= 1
    if number in (0, len(run.records)) or run.records[number - 1].get("state") != "DONE":
        return run
    return dataclasses.replace(run, records=run.records[:number])


def _is_refused(r: Mapping[str, Any]) -> bool:
    if r.get("launcher") == "direct":
        return bool(r.get("state") == "FAIL" and r.get("reason") == "user")
    return r.get("cause") == "user"


def _first_line(r: Mapping[str, Any]) -> str:
    return (r.get("summary") or f"attempt {r['attempt']}").splitlines()[0]


# --------------------------------------------------------------------------------------------- state


def _state(run: RunFiles) -> tuple[str, str]:
    """(state, what more there is to say)."""
    if not run.records:
        return "dead", "no attempt has begun"
    r = run.records[-1]
    state, owner = r.get("state", "X"), _owner(run)
    cause = r.get("cause") or ("cancelled" if owner == "cancelled" else None)
    words = decide.WORDS.get(cause or "", "")
    if state == "DONE":
        return "finished", ""
    if state != "X" and r.get("launcher") == "direct":
        return ("failed", r.get("reason") or "") if state == "FAIL" else ("stopped", r.get("reason") or "")
    if cause == "cancelled" and state == "YIELD" and r.get("launcher") == "local":
        return "stopped", "on request"  # Ctrl-C: there is no job that was cancelled
    if r.get("action") == "stop":
        name = (
            "cancelled" if cause == "cancelled" else "stopped" if _committed_stop(cause, state) else "failed"
        )
        return name, words
    if r.get("action") == "hold":
        return ("queued", "released") if owner == "queued" else ("held", words)
    if r.get("action") == "pending" and (owner == "gone" or run.job is None):
        return "pending", f"{words}; the requeue is still to be asked for"
    if owner in ("queued", "held", "cancelled"):
        return owner, words or f"attempt {r['attempt']} died without a word"
    if owner == "restarted":
        return "starting", f"attempt {r['attempt'] + 1} is about to begin"
    if owner == "gone":
        end = "died without a word" if state == "X" else words or "ended"
        return "dead", f"attempt {r['attempt']} {end}, and nobody goes on with it"
    if owner == "ending" or state != "X":
        return "stopping", words or r.get("reason") or ""
    return _phase(run), f"asked to stop: {r['stop_reason']}" if r["stop_reason"] else ""


def _committed_stop(cause: Optional[str], state: str) -> bool:
    return state == "YIELD" or cause in decide.YIELDS


def _owner(run: RunFiles) -> str:
    """alive, ending, restarted, queued, held, cancelled or gone."""
    r = run.records[-1]
    if r.get("job_id") is None:
        if r["alive"] is None:  # cut off while it was created
            return "alive" if run.now - r["heartbeat"] < lease.CREATION_LIMIT_S else "gone"
        return "alive" if r["alive"] else "gone"
    if run.job is None:  # Slurm was not asked, or did not answer: the heartbeat and the decision remain
        if r.get("action") in ("requeue", "successor"):
            return "queued"
        return "alive" if run.now - r["heartbeat"] < lease.HEARTBEAT_LIMIT_S else "gone"
    state = run.job.get("JobState", "")
    if state == "PENDING":
        return "held" if "held" in run.job.get("Reason", "").lower() else "queued"
    if state in lease.ALIVE:
        restarted = run.successor_goes_on or int(run.job.get("Restarts", 0)) > r.get("restart_count", 0)
        return "restarted" if restarted else "alive"
    return {"COMPLETING": "ending", "CANCELLED": "cancelled"}.get(state, "gone")


def _phase(run: RunFiles) -> str:
    """What a living attempt does, by the traces that each phase leaves."""
    mark = f".a{run.records[-1]['attempt']}.tmp"
    if any(name.endswith(mark) for name in run.checkpoints.unfinished):
        return "saving"
    validation = run.config.get("validation") or {}
    validated = {m["step"] for m in run.metrics if any(key.startswith("eval_") for key in m)}
    lines = _newest(run)
    if not lines:
        first = len(run.records) == 1 and run.loop_began and validation.get("at_start")
        return "validating" if first and 0 not in validated else "starting"
    step, every = lines[-1]["step"], validation.get("every")
    last = step == run_files.total_steps(run)
    due = validation.get("at_end") if last else every and step % every == 0
    has_set = bool(validated) or not validation.get("at_start")
    return "validating" if due and has_set and step not in validated else "training"


# ---------------------------------------------------------------------------------------------- cost


def _attempts(run: RunFiles, state: str) -> tuple[Attempt, ...]:
    rows = []
    for i, r in enumerate(run.records):
        following = run.records[i + 1] if i + 1 < len(run.records) else None
        runs = following is None and _runs(run, state)
        after = following.get("committed_step") if following else (run.checkpoints.committed or (None,))[-1]
        lines = _lines_of(run, r)
        ended = None if runs else _ended(r, following, lines)
        finished = r.get("state") == "DONE"
        later = {t["step"] for t in run.timing if t.get("attempt", 0) > r["attempt"]}
        repeated = {t["step"] for t in lines} & later
        lost = None if ended is None else 0.0 if finished else ended - _last_commit(r, after, lines)
        rows.append(
            Attempt(
                attempt=r["attempt"],
                job_id=r.get("target") or r.get("job_id"),
                nodes=tuple(r.get("nodes") or ()),
                began=r["began"],
                ended=ended,
                state=r.get("state", "X"),
                cause=None if runs else r.get("cause") or _untold(finished, following is None, state),
                action=r.get("action"),
                steps=len({t["step"] for t in lines}) * _every(run),
                committed_step=after,
                lost_s=None if lost is None else max(0.0, lost),
                resume_s=0.0 if finished else _startup_s(run, following),
                repeated_steps=len(repeated) * _every(run),
                summary=r.get("summary") or "",
            )
        )
    return tuple(rows)


def _untold(finished: bool, newest: bool, state: str) -> str:
    """The cause of an attempt whose batch shell did not come to record one."""
    if finished:
        return "done"
    return "cancelled" if newest and state == "cancelled" else "lost"


def _runs(run: RunFiles, state: str) -> bool:
    """The newest attempt has not ended; between two attempts of a job none runs."""
    return state in RUNNING and not run.records[-1].get("closed")


def _lines_of(run: RunFiles, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [t for t in run.timing if t.get("attempt") == record["attempt"] and "time" in t]


def _newest(run: RunFiles) -> list[dict[str, Any]]:
    """The newest attempt's lines of timing.jsonl."""
    return _lines_of(run, run.records[-1]) if run.records else []


def _ended(
    r: Mapping[str, Any], following: Optional[Mapping[str, Any]], lines: list[dict[str, Any]]
) -> float:
    """When an attempt's batch shell closed it; else its last sign of life, before the next one began."""
    if told := r.get("closed") or r.get("ended"):
        return told
    signs = max([r["began"], r["heartbeat"], *(t["time"] for t in lines[-1:])])
    return min(signs, following["began"]) if following else signs


def _last_commit(r: Mapping[str, Any], after: Optional[int], lines: list[dict[str, Any]]) -> float:
    """When this attempt's last committed step was done. Without one, all its steps are lost, but not its
    start-up, which the attempt before pays for; without a step, everything."""
    if after is not None and after > (r.get("committed_step") or 0):
        done = [t["time"] for t in lines if t["step"] <= after]
        if done:
            return done[-1]
    return lines[0]["time"] - lines[0].get("step_s", 0.0) if lines else r["began"]


def _startup_s(run: RunFiles, following: Optional[Mapping[str, Any]]) -> Optional[float]:
    """From an attempt's begin to its first step's begin; None if it has not come that far."""
    if following is None:
        return None
    lines = _lines_of(run, following)
    return max(0.0, lines[0]["time"] - lines[0].get("step_s", 0.0) - following["began"]) if lines else None


def _every(run: RunFiles) -> int:
    return int((run.config.get("log") or {}).get("every") or 1)


def _kept_s(run: RunFiles, state: str) -> float:
    """Each step once, as it was done last; of a run that stands still, only what is committed."""
    committed = (run.checkpoints.committed or (0,))[-1]
    newest = run.records[-1]["attempt"] if run.records and _runs(run, state) else None
    kept = {
        t["step"]: t.get("step_s", 0.0)
        for t in run.timing
        if t["step"] <= committed or t.get("attempt") == newest
    }
    return sum(kept.values()) * _every(run)


def _wall_and_queue(run: RunFiles, rows: tuple[Attempt, ...], state: str) -> tuple[float, float]:
    if not rows:
        return 0.0, 0.0
    last = run.now if rows[-1].ended is None else rows[-1].ended
    end = run.now if state in ("queued", *RUNNING) else last
    gaps = sum(max(0.0, b.began - a.ended) for a, b in zip(rows, rows[1:]) if a.ended is not None)
    return max(0.0, end - rows[0].began), gaps + max(0.0, end - last)


def _eta_s(run: RunFiles, step: int, total: Optional[int]) -> Optional[float]:
    """By the median time from one step to the next, so that validation and commits do not shake it."""
    lines = _newest(run)[-RECENT_STEPS - 1 :]
    pairs = [(a, b) for a, b in zip(lines, lines[1:]) if b["step"] > a["step"]]
    per_step = _median([(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs])
    if per_step is None and lines:
        per_step = lines[-1].get("step_s")
    return None if total is None or per_step is None else per_step * (total - step)


def _median(values: list[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None
