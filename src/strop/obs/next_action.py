"""What comes next for a run, in one sentence: what Slurm will do by itself, or what its owner should type."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from strop.obs.run_files import RunFiles


def next_action(run: RunFiles, state: str, step: int) -> str:
    if not run.records:
        return "nothing is known of how it was started"
    r, target = run.records[-1], run.target
    if run.requeue_pending is not None and state not in ("queued", "starting", "training"):
        return f"the controller did not take the requeue: {run.requeue_pending}"
    if state == "finished":
        best = "best" if run.checkpoints.best else "latest"
        return (
            f"nothing: finished; convert it with python -m tools.convert_dcp_to_hf --run {_quoted(run)} "
            f"--step {best}"
        )
    if state == "queued":
        return f"nothing: job {target} is {_pending(run.job)}; it goes on from {_place(run)}"
    if state == "held":
        return f"see to the cause, then: scontrol release {target}"
    if state in ("starting", "training", "validating", "saving"):
        return f"nothing: it runs {_where(r)}" + _end(run.job)
    if state == "stopping":
        return "nothing: the job ends, and its batch script decides what becomes of it"
    if state == "failed" and r.get("cause") == "diverged":
        return (
            f"change the learning rate or the data and start a new run; the last good state is {_place(run)}"
        )
    first = {"failed": "see to the cause, then submit it again", "dead": "submit it again"}
    return f"{first.get(state, 'to go on, submit it again')} (goes on from {_place(run)}): {command(run)}"


def command(run: RunFiles) -> str:
    """What starts the run again."""
    r = run.records[-1]
    algo, args = r.get("algo") or run.config.get("algo") or "ALGO", list(r.get("args") or [])
    name = f"run.name={run.directory.name}"
    if [word for word in args if word.startswith("run.name=")][-1:] != [name]:  # none, or that of an array
        args.append(name)
    if r.get("launcher") == "direct":
        return shlex.join(["python", "-m", "strop.train", algo, *args]) + " (and the settings it had)"
    if r.get("launcher") == "local":
        ranks = (r.get("machine") or {}).get("ranks", 1)
        return f"STROP_LAUNCHER=local STROP_LOCAL_RANKS={ranks} " + shlex.join(
            ["bash", "sbatch/lib.sh", algo, *args]
        )
    nodes = len(r.get("nodes") or [""])
    return shlex.join(["sbatch", f"--nodes={nodes}", f"sbatch/{algo}.sh", *args])


def _quoted(run: RunFiles) -> str:
    return shlex.quote(str(run.directory))


def _place(run: RunFiles) -> str:
    return f"step {run.checkpoints.committed[-1]}" if run.checkpoints.committed else "the beginning"


def _pending(job: Mapping[str, str] | None) -> str:
    if not job:
        return "in the queue (Slurm was not asked)"
    reason = job.get("Reason", "None")
    why = f" ({reason})" if reason != "None" else ""
    start = job.get("StartTime", "Unknown")
    when = "does not know yet when it starts" if start == "Unknown" else f"expects it to start at {start}"
    return f"pending in the queue{why}, Slurm {when}"


def _where(r: Mapping[str, Any]) -> str:
    nodes = ", ".join(r.get("nodes") or ["?"])
    if r.get("job_id"):
        return f"in job {r.get('target') or r['job_id']} on {nodes}"
    return f"on {nodes} (process {r.get('pid', '?')})"


def _end(job: Mapping[str, str] | None) -> str:
    end = (job or {}).get("EndTime", "Unknown")
    return "" if end == "Unknown" else f" until {end} at most"
