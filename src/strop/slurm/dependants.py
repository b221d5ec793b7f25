"""Jobs that wait for this one to succeed, told that its successor may do so in its place.

A stage of a pipeline is a job, and what hangs on it waits with `--dependency=afterok:JOB` and is cancelled by
Slurm when JOB fails (`--kill-on-invalid-dep=yes`). A requeued job keeps its number. One that goes on as a
successor (strop.slurm.successor) ends as a failure, perhaps killed, and can act no more: so as soon as there
is a successor, those that wait get `afterok:JOB?afterok:SUCCESSOR`, which either of both satisfies and only
the failure of both breaks. Measured with Slurm 22.05.

The pipeline writes the numbers of those that wait into a file, one a line, which the job finds by
STROP_DEPENDANTS. It submits, writes the file and then looks for a successor; the job records its successor
and then reads the file: whoever comes second sees the other. Slurm takes a number that it has forgotten for
one that has succeeded, so only numbers of jobs that are still to end may ever be named here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from strop import files
from strop.slurm import command


def add(file: Path, job_id: str) -> None:
    files.write_atomic(file, "".join(f"{number}\n" for number in [*read(file), job_id]))


def read(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def either(job_id: str, successor: str) -> str:
    """The dependency on the success of a job or of its successor."""
    return f"afterok:{job_id}?afterok:{successor}"


def follow(waiting: Sequence[str], job_id: str, successor: str) -> list[str]:
    """Let the jobs among `waiting` that are still pending wait for `job_id` or its successor. Which ones."""
    told = []
    for number in waiting:
        if (command.show_job(number) or {}).get("JobState") == "PENDING":
            change = ["scontrol", "update", f"JobId={number}", f"Dependency={either(job_id, successor)}"]
            command.slurm(change)
            told.append(number)
    return told
