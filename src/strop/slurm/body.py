"""The two ends of an attempt on the batch host: `begin` before the ranks start, `end` after they ended.

`begin` finds the run's directory, refuses what is not ours or not free, and creates the record. `end`
gathers the facts, lets `decide` decide, records the decision and then acts on it: it is recorded first,
because a requeue kills this very process. What it goes by is read by `strop.slurm.evidence`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import EXIT_STORAGE, EXIT_YIELD, STORAGE_ERRNOS, UserError
from strop.obs import secrets
from strop.slurm import (
    attempts,
    code,
    collect,
    command,
    deaths,
    decide,
    dependants,
    env,
    evidence,
    hostlist,
    naming,
    successor,
)

WAIT_WITHOUT_END_S = 3600.0
END_MARGIN_S = 20.0
"""Before the job's end a controller that does not answer is given up."""
EXCLUDE_FOR_S = 24 * 3600.0
NOTIFY_LIMIT_S = 60.0


@dataclass(frozen=True)
class Begun:
    run_dir: Path
    attempt: int
    end_time: Optional[float]
    notes: tuple[str, ...]
    successor: Optional[str] = None
    left_logs: bool = False
    """Earlier attempts' logs lie on the disks of this job's nodes."""


class NothingToDo(Exception):
    """A successor whose run has ended, or gone on elsewhere; the message says so. Exit code 0."""


class Exhausted(RuntimeError):
    """The attempts before this one died without a word, too often in a row."""


def begin(algo: str, args: Sequence[str], job: env.Job) -> Begun:
    """Create the attempt. Raises UserError, lease.Held, Exhausted or NothingToDo: nothing is written."""
    run = naming.resolve(algo, args, job, code.REPOSITORY)
    idle = successor.stand_down(job, run.directory, attempts.read_all(run.directory))
    if idle:
        raise NothingToDo(f"{idle}; nothing left to do for job {job.target}, its successor")
    records = _records_of(run, job)
    code_now = code.identify()
    committed = attempts.committed_step(run.directory)
    notes = []
    if committed is not None:
        note = code.check(code_now, records, allow=run.allow_code_change, stage=run.stage)
        notes += [note] if note else []
    _refuse_if_exhausted(run.directory, records, committed)
    attempt = attempts.begin(
        run.directory,
        job_id=job.job_id,
        restart_count=job.restart_count,
        nodes=list(job.nodes),
        pid=job.shell_pid,
        target=job.target,
        launcher=job.launcher,
        algo=algo,
        args=secrets.mask_args(args),
        named=run.given,
        code=code_now,
        log_dir=str(job.log_dir) if job.log_dir else None,
        **deaths.mark(),
    )
    (run.directory / "requeue_pending").unlink(missing_ok=True)
    known, behind = None, None
    if job.target is not None:
        known = command.show_job(job.target) or {}
        # The successor of an array's task is a job of its own: it is told the task's run.
        named = args if run.given and not job.array_task_id else [*args, f"run.name={run.name}"]
        try:
            behind = successor.prepare(run.directory, attempt, known, job, algo, named)
        except command.SlurmError as error:
            notes.append(f"NO SUCCESSOR, and this job cannot be requeued: {error}")
    if behind:
        notes += [f"job {behind} is its successor: this one cannot be requeued", *_tell(job, behind)]
    left = any(not set(job.nodes).isdisjoint(collect.uncollected(run.directory, r)) for r in records)
    return Begun(
        run.directory, attempt, _end_time(known or {}), tuple(notes), behind, bool(job.log_dir) and left
    )


def _tell(job: env.Job, behind: str) -> list[str]:
    """Those that wait for this job may also wait for its successor; what to note of it."""
    assert job.target is not None
    waiting = dependants.read(job.dependants) if job.dependants else []
    try:
        told = dependants.follow(waiting, job.target, behind)
    except command.SlurmError as error:
        return [f"what waits for this job does not wait for its successor: {error}"]
    return [f"job {number} waits for either of both" for number in told]


def _records_of(run: naming.RunName, job: env.Job) -> list[dict[str, Any]]:
    """The run's earlier attempts; refuses a directory that is not this run's."""
    records = attempts.read_all(run.directory)
    if run.directory.exists() and not run.directory.is_dir():
        raise UserError(f"run directory {run.directory}: is a file")
    if not records and run.directory.is_dir():
        content = sorted(p.name for p in run.directory.iterdir() if p.name != "attempts")
        if content:
            raise UserError(
                f"run directory {run.directory}: exists, but is not a run (it has {content[0]!r} and no "
                "attempts/); choose another run.name or run.dir"
            )
    if records and not run.given and job.restart_count == 0:
        raise UserError(
            f"run directory {run.directory}: belongs to an earlier job of the same number; give run.name=..."
        )
    return records


def _refuse_if_exhausted(run_dir: Path, records: list[dict[str, Any]], committed: Optional[int]) -> None:
    history = decide.since_progress(records, committed)
    spent = decide.exhausted(history) if history and records[-1]["state"] == "X" else None
    if spent:
        attempts.update(run_dir, records[-1]["attempt"], cause="lost", action="stop")
        raise Exhausted(f"run {run_dir}: {spent}; not started again. Submit it anew to try once more")


def _end_time(record: Mapping[str, str]) -> Optional[float]:
    text = record.get("EndTime", "Unknown")
    return None if text == "Unknown" else time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def end(job: env.Job, launcher_exit: int, signals: Sequence[str]) -> decide.Decision:
    """Decide, record, act. The decision's exit code is the job's."""
    assert job.run_dir is not None
    assert job.attempt is not None
    facts = evidence.gather(job, launcher_exit, signals)
    decision = _record(job, facts, decide.decide(facts))
    if job.launcher != "slurm":
        return decision
    if not facts.job.known and decision.action in ("requeue", "hold"):
        pending = _leave_pending(job, decision)
        facts = dataclasses.replace(facts, job=evidence.job_state(job, deadline_s=_left_s(job)))
        decision = _record(job, facts, decide.decide(facts))  # somebody may have cancelled it meanwhile
        pending.unlink(missing_ok=True)
    before = decision
    if decision.action in ("requeue", "hold") and not facts.job.requeued:
        decision = _put_back(job, decision, facts)
    if facts.successor and decision.action in ("finished", "stop"):
        decision = _without_successor(decision, facts.successor)
    return decision if decision == before else _record(job, facts, decision)


def _record(job: env.Job, facts: decide.Facts, decision: decide.Decision) -> decide.Decision:
    """Write the decision down. Where even that cannot be written, storage is the cause."""
    assert job.run_dir is not None
    assert job.attempt is not None
    try:
        attempts.update(
            job.run_dir,
            job.attempt,
            state="FAIL" if facts.state == "X" else facts.state,
            step=decision.step if facts.step is None else facts.step,
            cause=decision.cause,
            action=decision.action,
            exit_code=decision.exit_code,
            fingerprint=decision.fingerprint,
            exclude=list(decision.exclude),
            summary=decision.summary,
            rank=decision.rank,
            node=decision.node,
            launcher_exit=facts.launcher_exit,
            signals=list(facts.signals),
            closed=time.time(),
        )
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        why = f"{error}\n{deaths.describe_space(job.run_dir)}"
        if decision.action in ("requeue", "successor"):
            summary = (
                f"{decide.WORDS['storage']}: {why}\n{decision.summary}\nheld: make room, then release it"
            )
            return dataclasses.replace(
                decision, action="hold", exit_code=EXIT_STORAGE, cause="storage", summary=summary
            )
        if decision.cause != "storage":
            return dataclasses.replace(decision, summary=f"{decision.summary}\nnot recorded: {why}")
    return decision


def _left_s(job: env.Job) -> float:
    """How long a controller that does not answer may be waited for."""
    if job.end_time is None:
        return WAIT_WITHOUT_END_S
    return max(job.end_time - time.time() - END_MARGIN_S, 5.0)


def _put_back(job: env.Job, decision: decide.Decision, facts: decide.Facts) -> decide.Decision:
    """scontrol requeue (or requeuehold). Refused: the job ends with what it has, and says so."""
    assert job.run_dir is not None
    if decision.action == "hold" and facts.successor and not facts.job.can_requeue:
        successor.hold(facts.successor)
        return _released_by(decision, facts.successor)
    pending = _leave_pending(job, decision)
    try:
        command.slurm(_back(job, decision), deadline_s=_left_s(job))
    except command.NoController as error:
        summary = decision.summary.replace("\nrequeued", "")
        summary += f"\n{error}\nthe requeue is still to be done: {' '.join(_back(job, decision))}"
        summary += " (or submit it again with the same run.name)"
        return dataclasses.replace(decision, action="pending", exit_code=EXIT_YIELD, summary=summary)
    except command.SlurmError as error:
        if "pending" not in str(error).lower():
            pending.unlink(missing_ok=True)
            return _refused(decision, str(error), facts.successor)
    pending.unlink(missing_ok=True)
    if decision.action == "hold":
        return _released_by(decision, str(job.target))
    try:
        _exclude_nodes(job, job.run_dir)
    except command.SlurmError as error:  # the job is in the queue already; only this wish failed
        return dataclasses.replace(decision, summary=f"{decision.summary}\nno node excluded: {error}")
    return decision


def _back(job: env.Job, decision: decide.Decision) -> list[str]:
    assert job.target is not None
    return ["scontrol", "requeue" if decision.action == "requeue" else "requeuehold", job.target]


def _leave_pending(job: env.Job, decision: decide.Decision) -> Path:
    """For whoever looks at the run after this process was killed while it waited for the controller."""
    assert job.run_dir is not None
    path = job.run_dir / "requeue_pending"
    with contextlib.suppress(OSError):  # a full disk may be the very reason for a hold
        path.write_text(" ".join(_back(job, decision)) + "\n")
    return path


def _released_by(decision: decide.Decision, target: str) -> decide.Decision:
    return dataclasses.replace(decision, summary=f"{decision.summary}: scontrol release {target}")


def _refused(decision: decide.Decision, why: str, waiting: Optional[str]) -> decide.Decision:
    exit_code = EXIT_YIELD if decision.cause in decide.YIELDS else decision.exit_code
    summary = decision.summary.replace("\nrequeued", "") + f"\nnot requeued: {why}"
    if waiting and decision.action == "requeue":
        summary += f"\njob {waiting} goes on"
        return dataclasses.replace(decision, action="successor", exit_code=exit_code, summary=summary)
    return dataclasses.replace(decision, action="stop", exit_code=exit_code, summary=summary)


def _without_successor(decision: decide.Decision, waiting: str) -> decide.Decision:
    """Nothing is lost if this fails: the successor finds the end in the run directory (`stand_down`)."""
    try:
        successor.cancel(waiting)
    except command.SlurmError as error:
        return dataclasses.replace(
            decision, summary=f"{decision.summary}\njob {waiting} not cancelled: {error}"
        )
    return decision


def cancel_successor(job: env.Job) -> bool:
    """TERM has reached the batch shell. After scancel the successor goes at once: `end` may come too late,
    since KILL follows within half a minute and a commit may take longer."""
    assert job.run_dir is not None
    assert job.attempt is not None
    waiting = attempts.read(job.run_dir, job.attempt).get("successor")
    if not waiting or not decide.is_cancelled(evidence.job_state(job), waiting):
        return False
    successor.cancel(waiting)
    return True


def _exclude_nodes(job: env.Job, run_dir: Path) -> None:
    """Keep the restarted job off the nodes that failed the pre-flight check within the last day."""
    records = attempts.read_all(run_dir)
    bad = {node: r["closed"] > time.time() - EXCLUDE_FOR_S for r in records for node in r.get("exclude", [])}
    if not bad:
        return
    assert job.target is not None
    now = hostlist.expand((command.show_job(job.target) or {}).get("ExcNodeList", "").replace("(null)", ""))
    wanted = sorted({n for n in now if n not in bad} | {n for n, fresh in bad.items() if fresh})
    command.slurm(["scontrol", "update", f"JobId={job.target}", f"ExcNodeList={','.join(wanted)}"])


def hold(job: env.Job) -> str:
    """Put a job whose attempt could not even begin for want of space back into the queue, held. What became
    of it, in words."""
    if job.target is None:
        return "make room, then start it again"
    try:
        command.slurm(["scontrol", "requeuehold", job.target])
    except command.SlurmError as error:
        return f"make room, then submit it again (not held: {error})"
    return f"held: make room, then: scontrol release {job.target}"


def discard_unnamed(job: env.Job) -> None:
    """A refused start without run.name, outside of Slurm: its name is the time, which nobody uses again."""
    assert job.run_dir is not None
    assert job.attempt is not None
    if not attempts.read(job.run_dir, job.attempt).get("named"):
        attempts.discard(job.run_dir, job.attempt)


def notify(job: env.Job, decision: decide.Decision, text: str) -> None:
    """The site's STROP_NOTIFY command gets the summary on its stdin when a job ends for good."""
    if not job.notify or decision.action in ("requeue", "successor"):
        return
    try:  # its output goes to the job's: our stdout is for the batch shell
        subprocess.run(
            ["bash", "-c", job.notify],
            input=text,
            text=True,
            stdout=sys.stderr,
            timeout=NOTIFY_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"strop: STROP_NOTIFY took longer than {NOTIFY_LIMIT_S:.0f} s", file=sys.stderr)
