"""The two ends of an attempt on the batch host: `begin` before the ranks start, `end` after they ended.

`begin` finds the run's directory, refuses what is not ours or not free, and creates the record. `end`
gathers the facts, lets `decide` decide, records the decision and then acts on it: it is recorded first,
because a requeue kills this very process.
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.errors import EXIT_YIELD, UserError
from strop.slurm import attempts, code, command, crash, decide, env, hang, naming, stop

ROOT = code.PACKAGE.parents[1]
EXCLUDE_FOR_S = 24 * 3600.0


@dataclass(frozen=True)
class Begun:
    run_dir: Path
    attempt: int
    end_time: Optional[float]
    notes: tuple[str, ...]


class Exhausted(RuntimeError):
    """The attempts before this one died without a word, too often in a row."""


def begin(algo: str, args: Sequence[str], job: env.Job) -> Begun:
    """Create the attempt. Raises UserError, lease.Held or Exhausted; then nothing has been written."""
    run = naming.resolve(algo, args, job, ROOT)
    records = _records_of(run, job)
    code_now = code.identify()
    committed = attempts.committed_step(run.directory)
    notes = []
    if committed is not None:
        note = code.check(code_now, records, allow=run.allow_code_change)
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
        args=list(args),
        code=code_now,
    )
    (run.directory / "requeue_pending").unlink(missing_ok=True)
    return Begun(run.directory, attempt, _end_time(job), tuple(notes))


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


def _end_time(job: env.Job) -> Optional[float]:
    if job.target is None:
        return None
    record = command.show_job(job.target) or {}
    text = record.get("EndTime", "Unknown")
    return None if text == "Unknown" else time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def end(job: env.Job, launcher_exit: int, signals: Sequence[str]) -> decide.Decision:
    """Decide, record, act. The decision's exit code is the job's."""
    assert job.run_dir is not None
    assert job.attempt is not None
    facts = gather(job, launcher_exit, signals)
    decision = decide.decide(facts)
    state = "FAIL" if facts.state == "X" else facts.state
    attempts.update(
        job.run_dir,
        job.attempt,
        state=state,
        cause=decision.cause,
        action=decision.action,
        exit_code=decision.exit_code,
        fingerprint=decision.fingerprint,
        exclude=list(decision.exclude),
        summary=decision.summary,
        closed=time.time(),
    )
    if job.launcher == "slurm" and decision.action in ("requeue", "hold") and not facts.job.requeued:
        decision = _put_back(job, decision)
    return decision


def gather(job: env.Job, launcher_exit: int, signals: Sequence[str]) -> decide.Facts:
    """Read what the ranks left behind, and ask Slurm about the job."""
    assert job.run_dir is not None
    assert job.attempt is not None
    run_dir, number = job.run_dir, job.attempt
    records = attempts.read_all(run_dir)
    record = attempts.read(run_dir, number)
    committed = attempts.committed_step(run_dir)
    fields = decide.Verdict.__dataclass_fields__
    said = attempts.read_verdicts(run_dir, number)
    verdicts = [decide.Verdict(**{key: v[key] for key in fields if key in v}) for v in said]
    logs = attempts.log_dir(run_dir, number)
    return decide.Facts(
        state=record["state"],
        launcher_exit=launcher_exit,
        step=record.get("step"),
        committed_step=committed,
        reason=record.get("reason"),
        signals=tuple(signals),
        stop_requested=stop.stop_file(run_dir, number).exists(),
        verdicts=tuple(verdicts),
        crash=crash.find(logs),
        suspect=hang.suspect(said, *_ranks(logs)),
        num_nodes=len(record.get("nodes") or ()),
        job=_local_state(signals) if job.launcher == "local" else job_state(job),
        history=decide.since_progress(records, committed)[:-1],
        last_words=crash.last_words(logs, {v.rank for v in verdicts}),
    )


def _ranks(logs: Path) -> tuple[int, dict[int, str]]:
    """How many ranks came, and on which nodes they were, as far as the pre-flight check could tell."""
    clock = files.read_json(logs / "clock.json") or {"ranks": []}
    nodes = {entry["rank"]: entry["node"] for entry in clock["ranks"]}
    return len(nodes) or len(list(logs.glob("rank*.err"))), nodes


def _local_state(signals: Sequence[str]) -> decide.JobState:
    """Without Slurm, Ctrl-C or TERM is the user who wants the prompt back; USR1 asks for a restart."""
    return decide.JobState(ended=bool({"TERM", "INT"} & set(signals)))


def job_state(job: env.Job) -> decide.JobState:
    assert job.target is not None
    try:
        record = command.show_job(job.target)
    except command.NoController:
        record = None
    return decide.JobState(known=False) if record is None else read_state(record, job.restart_count)


def read_state(record: dict[str, str], restart_count: int) -> decide.JobState:
    """As measured without accounting: after scancel COMPLETING with Restarts unchanged, on a requeue with
    one more, at the time limit with Reason=TimeLimit; in a preemption's grace time RUNNING with PreemptTime.
    """
    ended = record["JobState"] != "RUNNING"
    return decide.JobState(
        can_requeue=record.get("Requeue") == "1" and record.get("BatchFlag") != "0",
        requeued=int(record.get("Restarts", 0)) > restart_count,
        ended=ended,
        time_limit=ended and record.get("Reason") == "TimeLimit",
        preempted=record.get("PreemptTime", "None") not in ("None", "Unknown"),
    )


def _put_back(job: env.Job, decision: decide.Decision) -> decide.Decision:
    """scontrol requeue (or requeuehold). Refused: the job ends with what it has, and says so."""
    assert job.target is not None
    assert job.run_dir is not None
    verb = "requeue" if decision.action == "requeue" else "requeuehold"
    pending = job.run_dir / "requeue_pending"
    pending.write_text(f"scontrol {verb} {job.target}\n")
    try:
        command.slurm(["scontrol", verb, job.target], deadline_s=600.0)
    except command.NoController as error:
        return _refused(decision, f"{error}\nthe requeue is still to be done: {pending}")
    except command.SlurmError as error:
        if "pending" not in str(error).lower():
            pending.unlink()
            return _refused(decision, str(error))
    pending.unlink(missing_ok=True)
    try:
        _exclude_nodes(job, job.run_dir)
    except command.SlurmError as error:  # the job is in the queue already; only this wish failed
        return dataclasses.replace(decision, summary=f"{decision.summary}\nno node excluded: {error}")
    return decision


def _refused(decision: decide.Decision, why: str) -> decide.Decision:
    exit_code = EXIT_YIELD if decision.cause in decide.YIELDS else decision.exit_code
    summary = decision.summary.replace("\nrequeued", "") + f"\nnot requeued: {why}"
    return dataclasses.replace(decision, action="stop", exit_code=exit_code, summary=summary)


def _exclude_nodes(job: env.Job, run_dir: Path) -> None:
    """Keep the restarted job off the nodes that failed the pre-flight check within the last day."""
    records = attempts.read_all(run_dir)
    bad = {node: r["closed"] > time.time() - EXCLUDE_FOR_S for r in records for node in r.get("exclude", [])}
    if not bad:
        return
    assert job.target is not None
    now = env.hostlist.expand(
        (command.show_job(job.target) or {}).get("ExcNodeList", "").replace("(null)", "")
    )
    wanted = sorted({n for n in now if n not in bad} | {n for n, fresh in bad.items() if fresh})
    command.slurm(["scontrol", "update", f"JobId={job.target}", f"ExcNodeList={','.join(wanted)}"])


def notify(job: env.Job, decision: decide.Decision, text: str) -> None:
    """The site's STROP_NOTIFY command gets the summary on its stdin when a job ends for good."""
    if job.notify and decision.action != "requeue":
        subprocess.run(["bash", "-c", job.notify], input=text, text=True, timeout=60, check=False)
