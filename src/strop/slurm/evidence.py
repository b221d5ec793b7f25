"""What is known of an attempt whose ranks have ended: read from its directory, and asked of Slurm.

`gather` puts it together as `decide.Facts`; nothing is judged or written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from strop.slurm import attempts, command, crash, deaths, decide, env, hang, lease, stop, successor


def gather(job: env.Job, launcher_exit: int, signals: Sequence[str]) -> decide.Facts:
    """Read what the ranks left behind, and ask Slurm about the job."""
    assert job.run_dir is not None
    assert job.attempt is not None
    run_dir, number = job.run_dir, job.attempt
    records = attempts.read_all(run_dir)
    record = attempts.read(run_dir, number)
    committed = attempts.committed_step(run_dir)
    fields = decide.Verdict.__dataclass_fields__
    logs = attempts.log_dir(run_dir, number)
    clocks = _clocks(run_dir, number)
    said = attempts.read_verdicts(run_dir, number)
    said = [{**v, "time": v["time"] - clocks.get(v["rank"], ("", 0.0))[1]} for v in said]
    nodes = {rank: node for rank, (node, _) in clocks.items()}
    verdicts = [decide.Verdict(**{key: v[key] for key in fields if key in v}) for v in said]
    state = _local_state(signals) if job.launcher == "local" else job_state(job)
    suspect = hang.suspect(said, len(nodes) or len(attempts.ranks_with_logs(logs)), nodes)
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
        death=deaths.find(run_dir, record, verdicts),
        ended_first=deaths.ended_first(record, verdicts),
        successor=_successor(record.get("successor"), state),
        space=deaths.describe_space(run_dir) if any(v.kind == "storage" for v in verdicts) else "",
        suspect=suspect,
        lost_nodes=_lost_nodes(record) if suspect and suspect.silent and job.launcher != "local" else (),
        num_nodes=len(record.get("nodes") or ()),
        job=state,
        history=decide.since_progress(records, committed)[:-1],
        last_words=crash.last_words(logs, {v.rank for v in verdicts}),
    )


def _clocks(run_dir: Path, number: int) -> dict[int, tuple[str, float]]:
    """A damaged clock.json must not keep a job from its requeue: the times then count as they are."""
    try:
        return attempts.read_clocks(run_dir, number)
    except (ValueError, KeyError, TypeError):
        return {}


def _lost_nodes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What Slurm cannot tell is not known: the attempt then counts as hung."""
    try:
        return tuple(command.lost_nodes(record.get("nodes") or (), record["began"]))
    except command.SlurmError:
        return ()


def _successor(job_id: Optional[str], state: decide.JobState) -> Optional[str]:
    """The job that waits behind this one, unless its owner has taken it out of the queue."""
    return job_id if job_id and (not state.known or successor.waiting(job_id)) else None


def _local_state(signals: Sequence[str]) -> decide.JobState:
    """Without Slurm, Ctrl-C or TERM is the user who wants the prompt back; USR1 asks for a restart."""
    return decide.JobState(ended=bool({"TERM", "INT"} & set(signals)))


def job_state(job: env.Job, *, deadline_s: float = 10.0) -> decide.JobState:
    assert job.target is not None
    try:
        record = command.show_job(job.target, deadline_s=deadline_s)
    except command.NoController:
        record = None
    return decide.JobState(known=False) if record is None else read_state(record, job.restart_count)


def read_state(record: dict[str, str], restart_count: int) -> decide.JobState:
    """As measured without accounting: after scancel COMPLETING with Restarts unchanged, on a requeue with
    one more, at the time limit with Reason=TimeLimit; in a preemption's grace time RUNNING with PreemptTime.
    """
    ended = record["JobState"] not in lease.ALIVE  # SIGNALING: it is RUNNING, and gets a signal just now
    return decide.JobState(
        can_requeue=record.get("Requeue") == "1" and record.get("BatchFlag") != "0",
        requeued=int(record.get("Restarts", 0)) > restart_count,
        ended=ended,
        time_limit=ended and record.get("Reason") == "TimeLimit",
        preempted=record.get("PreemptTime", "None") not in ("None", "Unknown"),
    )
