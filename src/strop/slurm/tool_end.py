"""What becomes of a job that ran one tool (sbatch/tool.sh: a preparation, an export) when the tool has ended.

Such a job has no run directory and no attempts: its tool keeps what it has finished, and a second start goes
on with the rest or finds that nothing is left. So the tool's exit code, the signals that the batch shell got
and what Slurm says of the job are all there is to decide by. A preemption costs no budget, nor does a time
limit before which something was finished (the tool's exit code 75). A job that reaches its time limit without
finishing anything would do so for ever: its FINGERPRINT_LIMIT-th start, whatever ended the others, is then
its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from strop.errors import EXIT_DONE, EXIT_STORAGE, EXIT_TERM, EXIT_USER, EXIT_YIELD
from strop.slurm import body, command, decide, env, evidence

PATIENCE_S = 600.0
"""For a controller that does not answer; at the time limit the job is killed before that."""


@dataclass(frozen=True)
class Ending:
    action: str
    """finished | requeue | hold | stop"""
    exit_code: int
    words: str = ""


def end(job: env.Job, exit_code: int, signals: Sequence[str]) -> Ending:
    """Decide, and act. The ending's exit code is the job's."""
    if job.target is None or exit_code in (EXIT_DONE, EXIT_USER):
        return Ending("finished" if exit_code == EXIT_DONE else "stop", exit_code)
    if exit_code == EXIT_STORAGE:
        return Ending("hold", exit_code, body.hold(job))
    state = evidence.job_state(job, deadline_s=PATIENCE_S)
    ending = judge(state, exit_code, signals, job.restart_count + 1)
    return _put_back(job.target, ending) if ending.action == "requeue" and not state.requeued else ending


def judge(state: decide.JobState, exit_code: int, signals: Sequence[str], starts: int) -> Ending:
    """What is to be done with a tool that has failed or was stopped; `starts`: of this job, with this one."""
    cause = _cause(state, exit_code, signals)
    if cause is None:
        return Ending("stop", exit_code)
    if cause == "cancelled":
        return Ending("stop", exit_code, "cancelled; what is finished is kept")
    stopped = f"{decide.WORDS[cause]}; what is finished is kept"
    if not (state.can_requeue or state.requeued):
        why = "not requeued: the job may not be (--no-requeue, or not a batch job)"
        return Ending("stop", EXIT_YIELD, f"{stopped}\n{why}")
    if cause == "time_limit" and exit_code != EXIT_YIELD and starts >= decide.FINGERPRINT_LIMIT:
        why = f"not requeued: nothing was finished in this start, number {starts} of the job; raise --time"
        return Ending("stop", EXIT_YIELD, f"{stopped}\n{why}")
    return Ending("requeue", EXIT_YIELD, f"{stopped}: back into the queue")


def _cause(state: decide.JobState, exit_code: int, signals: Sequence[str]) -> Optional[str]:
    """Why it was stopped, a key of decide.WORDS; None for an end of its own."""
    unknown = not state.known and "TERM" in signals
    if unknown or decide.is_cancelled(state, None):
        return "cancelled"
    if state.requeued:
        return "requeued"
    asked = decide.why_stopped(state, signals)
    if asked is None and exit_code in (EXIT_YIELD, EXIT_TERM):
        return "stopped"  # the step got TERM, and the batch shell nothing
    return asked


def _put_back(target: str, ending: Ending) -> Ending:
    try:
        command.slurm(["scontrol", "requeue", target], deadline_s=PATIENCE_S)
    except command.SlurmError as error:
        if "pending" not in str(error).lower():  # else it is there already
            words = ending.words.replace(": back into the queue", f"\nnot requeued: {error}")
            return Ending("stop", EXIT_YIELD, words)
    return ending
