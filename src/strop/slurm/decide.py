"""What becomes of a job when its ranks have ended: a pure function from facts to a decision.

`classify` names the cause, strongest witness first: the outcome that rank 0 recorded, what a rank said in
its verdict, what Slurm says about the job, and last the traces of a death without words. `decide` turns
cause and budgets into an action. Budgets count attempts *since the last newly committed step*, so a run
that moves forward may fail forever, and one that does not stops soon. srun's exit code is hardly used:
a signal beats a code in it, and its own kills look like the ranks'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from strop.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_HANG, EXIT_STORAGE, EXIT_USER, EXIT_YIELD
from strop.slurm.hang import Suspect

FAILURE_LIMIT = 5
FINGERPRINT_LIMIT = 3
REPEAT_LIMIT = 2
"""Native crash at the same place, or out of memory at the same step."""
YIELD_LIMIT = 10
"""Stops that committed nothing new. They cost no failure budget, but ten in a row lead nowhere."""

YIELDS = ("preempted", "time_limit", "stopped", "requeued", "lost", "late")
FAILURES = ("oom", "hang", "segfault", "killed", "startup", "exception")
STARTUP_PHASES = ("INIT", "PREFLIGHT", "RESUME")
EXIT_UNKNOWN = 1

WORDS = {
    "done": "finished",
    "preempted": "preempted",
    "time_limit": "time limit near",
    "stopped": "asked to stop",
    "requeued": "put back into the queue by Slurm or its owner",
    "lost": "died without a word (node lost, or killed at once)",
    "late": "was to stop, but was killed before it could commit",
    "cancelled": "cancelled",
    "user": "the configuration or the data is wrong",
    "diverged": "diverged",
    "storage": "cannot write",
    "oom": "out of memory",
    "hang": "hung",
    "segfault": "crashed in native code",
    "killed": "a rank was killed",
    "startup": "failed before its first step",
    "exception": "failed",
}

LESS_MEMORY = (
    "to need less memory: lower train.micro_batch_tokens, train.activation_checkpointing=full, more nodes; "
    "if it was the host's memory: --mem=0, or fewer ranks a node"
)


@dataclass(frozen=True)
class Verdict:
    """What one rank said about its end; `kind` is one of attempts.KINDS."""

    rank: int
    node: str
    kind: str
    exit_code: int
    message: str
    step: Optional[int] = None
    phase: Optional[str] = None
    fingerprint: Optional[str] = None
    time: float = 0.0


@dataclass(frozen=True)
class Crash:
    """faulthandler's dump in a rank's stderr."""

    rank: Optional[int]
    message: str
    fingerprint: str


@dataclass(frozen=True)
class Death:
    """A rank that was killed, as srun or the kernel tell (strop.slurm.deaths)."""

    rank: Optional[int]
    node: Optional[str]
    message: str
    oom: bool
    """For want of memory."""
    step: Optional[int] = None


@dataclass(frozen=True)
class JobState:
    """What Slurm says about the job when its ranks have ended."""

    known: bool = True
    can_requeue: bool = True
    requeued: bool = False
    """Slurm is already putting it back: its restart count is above ours."""
    ended: bool = False
    """Slurm is ending it (COMPLETING) for another reason than these: scancel."""
    time_limit: bool = False
    preempted: bool = False


@dataclass(frozen=True)
class Past:
    """An earlier attempt since the last newly committed step."""

    cause: str
    fingerprint: Optional[str] = None
    step: Optional[int] = None


@dataclass(frozen=True)
class Facts:
    state: str
    """Of the attempt's record: X (no outcome was written), DONE, YIELD or FAIL."""
    launcher_exit: int
    step: Optional[int] = None
    committed_step: Optional[int] = None
    reason: Optional[str] = None
    """Why the ranks yielded, as rank 0 recorded it."""
    signals: tuple[str, ...] = ()
    """What the batch shell received: USR1, TERM, INT."""
    stop_requested: bool = False
    """There is a stop file."""
    verdicts: tuple[Verdict, ...] = ()
    crash: Optional[Crash] = None
    death: Optional[Death] = None
    ended_first: tuple[int, ...] = ()
    """The ranks that srun named first as ended."""
    successor: Optional[str] = None
    """The job that waits behind this one, to go on in its place."""
    space: str = ""
    """The file system of the run and what is free there, if something could not be written."""
    suspect: Optional[Suspect] = None
    """Whom the ranks of a hung attempt were waiting for."""
    lost_nodes: tuple[str, ...] = ()
    """Nodes of a hung attempt that Slurm has lost, or lost for a while, since it began."""
    num_nodes: int = 1
    job: JobState = JobState()
    history: tuple[Past, ...] = ()
    last_words: str = ""
    """The end of the stderr of a rank that left no verdict."""


@dataclass(frozen=True)
class Cause:
    name: str
    message: str = ""
    fingerprint: Optional[str] = None
    step: Optional[int] = None
    rank: Optional[int] = None
    node: Optional[str] = None
    phase: Optional[str] = None


@dataclass(frozen=True)
class Decision:
    action: str
    """requeue | successor | pending (requeue still to be asked for) | stop | hold | finished"""
    exit_code: int
    cause: str
    summary: str
    fingerprint: Optional[str] = None
    exclude: tuple[str, ...] = ()
    """Nodes that failed the pre-flight check: the next attempt shall not get them."""
    step: Optional[int] = None
    """Where it failed."""
    rank: Optional[int] = None
    """Who failed first."""
    node: Optional[str] = None


def decide(facts: Facts) -> Decision:
    cause = classify(facts)
    past = (*facts.history, Past(cause.name, cause.fingerprint, cause.step))
    action, exit_code, why = _act(facts, cause, past)
    return Decision(
        action,
        exit_code,
        cause.name,
        _summary(facts, cause, action, why),
        cause.fingerprint,
        _to_exclude(facts, cause),
        cause.step,
        cause.rank,
        cause.node,
    )


def classify(facts: Facts) -> Cause:
    if facts.state == "DONE":
        return Cause("done")
    first = first_failure(facts.verdicts, facts.ended_first)
    if first and first.kind in ("user", "diverged"):
        return _from_verdict(first.kind, first)
    if is_cancelled(facts.job, facts.successor):
        return Cause("cancelled")
    death = facts.death if facts.state != "YIELD" else None
    if death and death.oom and (first is None or first.kind in ("exception", "hang")):
        return Cause("oom", death.message, None, death.step, death.rank, death.node)
    if facts.state != "YIELD" and first and first.kind == "hang":
        return _hung(first, facts.suspect, facts.lost_nodes)
    if facts.state != "YIELD" and first and not _died_before(first, facts):
        startup = first.step in (None, 0) or (first.phase or "").upper() in STARTUP_PHASES
        kind = "startup" if first.kind == "exception" and startup else first.kind
        return _from_verdict(kind, first)
    if facts.state != "YIELD" and facts.crash:
        crash = facts.crash
        return Cause("segfault", crash.message, crash.fingerprint, facts.step, crash.rank)
    if facts.job.requeued:
        return Cause("requeued")
    asked = why_stopped(facts.job, facts.signals, facts.stop_requested)
    if facts.state == "YIELD" and facts.launcher_exit != 0 and asked is None:
        return Cause("killed", facts.last_words)  # the TERM that rank 0 obeyed was srun's: another rank died
    if facts.state == "YIELD":
        return Cause(asked or "stopped", facts.reason or "")
    if asked:  # no outcome: with exit code 0 the stop came before there was anything to save
        return Cause(asked if facts.launcher_exit == 0 else "late", facts.last_words)
    if facts.launcher_exit == 0:
        message = "all ranks ended with exit code 0, but no outcome was recorded"
        return Cause("exception", message, fingerprint="no-outcome")
    if death:
        message = "\n".join(filter(None, [death.message, facts.last_words]))
        return Cause("killed", message, None, death.step, death.rank, death.node)
    return Cause("killed", facts.last_words)


def is_cancelled(job: JobState, successor: Optional[str]) -> bool:
    """Slurm ends the job, and not for its time, a requeue or a preemption.

    A preemption that cancels looks like scancel in the grace time of one that requeues; the job has a
    successor where the former is possible, and the successor asks Slurm once more.
    """
    preempted = job.preempted and successor is not None
    return job.ended and not (job.requeued or job.time_limit or preempted)


def _died_before(first: Verdict, facts: Facts) -> bool:
    """A rank without a verdict that was killed or crashed ended first, by srun's word: the exception is of
    a rank that noticed, in words that strop.slurm.peers does not know."""
    silent = {x.rank for x in (facts.crash, facts.death) if x is not None and x.rank is not None}
    silent -= {v.rank for v in facts.verdicts}
    return first.kind == "exception" and bool(silent.intersection(facts.ended_first))


def first_failure(verdicts: Sequence[Verdict], ended_first: Sequence[int] = ()) -> Optional[Verdict]:
    """The cause among the consequences: what is certain first, then what is specific, then who ended first
    by srun's word, then the earliest.

    Clocks of nodes differ, so time only breaks ties; "peer" verdicts follow somebody else's end.
    """
    rank_of_kind = {"user": 0, "diverged": 1, "storage": 2, "oom": 3, "exception": 4, "hang": 4}
    causes = [v for v in verdicts if v.kind in rank_of_kind]
    return min(
        causes, key=lambda v: (rank_of_kind[v.kind], v.rank not in ended_first, v.time, v.rank), default=None
    )


def since_progress(records: Sequence[Mapping[str, Any]], committed_now: Optional[int]) -> tuple[Past, ...]:
    """The attempts that budgets count: those since the newest commit, or since a decision to stop.

    An attempt's record says what was committed when it began; so the next record says what it committed.
    A record without a cause belongs to an attempt whose batch shell died too. Somebody who starts a
    stopped run again has looked into it, and gets a fresh budget.
    """
    history: list[Past] = []
    newest = -1
    for i, record in enumerate(records):
        committed = records[i + 1].get("committed_step") if i + 1 < len(records) else committed_now
        if committed is not None and committed > newest:
            newest, history = committed, []
        history.append(Past(record.get("cause") or "lost", record.get("fingerprint"), record.get("step")))
        if record.get("action") in ("stop", "hold", "finished"):
            history = []
    return tuple(history)


def exhausted(past: Sequence[Past]) -> Optional[str]:
    """Why the last of these attempts must not be repeated; None while there is budget."""
    last = past[-1]
    if last.cause in YIELDS:
        fruitless = sum(p.cause in YIELDS for p in past)
        return f"stopped {fruitless} times without a new checkpoint" if fruitless >= YIELD_LIMIT else None
    failures = [p for p in past if p.cause in FAILURES]
    if last.cause == "segfault" and _count(past, last, "fingerprint") >= REPEAT_LIMIT:
        return f"crashed at the same place {REPEAT_LIMIT} times without a new checkpoint"
    if last.cause == "oom" and _count(past, last, "step") >= REPEAT_LIMIT:
        return f"out of memory at the same step {REPEAT_LIMIT} times: this batch does not fit"
    if last.cause in ("exception", "hang") and _count(past, last, "fingerprint") >= FINGERPRINT_LIMIT:
        return f"the same failure {FINGERPRINT_LIMIT} times without a new checkpoint"
    if len(failures) >= FAILURE_LIMIT:
        return f"{len(failures)} failures without a new checkpoint: {', '.join(p.cause for p in failures)}"
    return None


def _count(past: Sequence[Past], last: Past, field: str) -> int:
    return sum(p.cause == last.cause and getattr(p, field) == getattr(last, field) for p in past)


def _from_verdict(kind: str, v: Verdict) -> Cause:
    return Cause(kind, v.message, v.fingerprint, v.step, v.rank, v.node, v.phase)


def _hung(first: Verdict, suspect: Optional[Suspect], lost_nodes: tuple[str, ...]) -> Cause:
    """The rank that the others waited for counts as the cause, not the one that noticed first. A silent one
    whose node was lost did not hang: while ranks connect to each other, nothing tells of a peer's end."""
    if suspect is None or suspect.rank == first.rank:
        return _from_verdict("hang", first)
    message = f"{suspect.message}\n  noticed by rank {first.rank} on {first.node}: {first.message}"
    if suspect.silent and lost_nodes:
        message = f"lost: {', '.join(lost_nodes)}; {message}"
        node = suspect.node or lost_nodes[0]
        return Cause("killed", message, None, first.step, suspect.rank, node, first.phase)
    return Cause("hang", message, first.fingerprint, first.step, suspect.rank, suspect.node, first.phase)


def _to_exclude(facts: Facts, cause: Cause) -> tuple[str, ...]:
    """The nodes that failed the pre-flight check, unless all did: then it is not the nodes' fault."""
    if cause.node is None or not _in_preflight(cause.phase):
        return ()
    bad = {cause.node, *(v.node for v in facts.verdicts if v.kind == "exception" and _in_preflight(v.phase))}
    return () if len(bad) == facts.num_nodes > 1 else tuple(sorted(bad))


def _in_preflight(phase: Optional[str]) -> bool:
    return (phase or "").upper() == "PREFLIGHT"


def why_stopped(job: JobState, signals: Sequence[str], stop_requested: bool = False) -> Optional[str]:
    if job.preempted:
        return "preempted"
    if job.time_limit:
        return "time_limit"
    if "USR1" in signals and "TERM" not in signals:
        return "time_limit"
    return "stopped" if signals or stop_requested else None


def _act(facts: Facts, cause: Cause, past: Sequence[Past]) -> tuple[str, int, str]:
    """(action, exit code, why) for a cause."""
    committed = EXIT_YIELD if facts.state == "YIELD" else EXIT_UNKNOWN
    fixed = {
        "done": ("finished", EXIT_DONE, ""),
        "user": ("stop", EXIT_USER, "not requeued: correct it and submit again"),
        "diverged": ("stop", EXIT_DIVERGED, "not requeued: the same steps would diverge again"),
        "storage": ("hold", EXIT_STORAGE, "held: make room, then release it"),
        "cancelled": ("stop", committed, "not requeued: it was cancelled"),
    }
    if cause.name in fixed:
        return fixed[cause.name]
    exit_code = {"hang": EXIT_HANG}.get(cause.name, EXIT_UNKNOWN)
    if cause.name in YIELDS:
        exit_code = committed
    spent = exhausted(past)
    if spent:
        return "stop", EXIT_USER if cause.name == "oom" and "same step" in spent else exit_code, spent
    failures = sum(p.cause in FAILURES for p in past)
    budget = f" (failure {failures} of {FAILURE_LIMIT} without a new checkpoint)"
    budget = budget if cause.name in FAILURES else ""
    gone = facts.job.ended and not facts.job.requeued
    if facts.successor and (gone or not facts.job.can_requeue):
        return "successor", exit_code, f"job {facts.successor} goes on{budget}"
    if not facts.job.can_requeue:
        return "stop", exit_code, "not requeued: the job may not be (--no-requeue, or not a batch job)"
    return "requeue", exit_code, f"requeued{budget}"


def _summary(facts: Facts, cause: Cause, action: str, why: str) -> str:
    """First line: what happened, in the failing rank's words if it left any. Last line: what comes now."""
    where = [] if cause.rank is None else [f"rank {cause.rank}"]
    where += [cause.node] if cause.node else []
    where += [f"phase {cause.phase}"] if cause.phase else []
    step = cause.step if cause.step is not None else facts.step
    where += [f"step {step}"] if step is not None else []
    head = f"{WORDS[cause.name]}" + (f" ({', '.join(where)})" if where else "")
    lines = [f"{head}: {cause.message}" if cause.message else head]
    if cause.name == "user":  # the first line names the key, file or row
        lines = [cause.message, head]
    if cause.name == "late":
        lines.append("the time between the signal and the kill was too short: raise --signal=B:USR1@SECONDS")
    if cause.name == "oom":
        lines.append(LESS_MEMORY)
    if cause.name == "storage" and facts.space:
        lines.append(facts.space)
    if facts.committed_step is None:
        lines.append("nothing is committed yet")
    else:
        lines.append(f"committed up to step {facts.committed_step}")
    return "\n".join([*lines, why] if why else lines)
