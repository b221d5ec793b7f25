"""The one place that runs a Slurm command, and the reading of what `scontrol show job` answers."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Optional

NO_ANSWER = re.compile(
    r"unable to contact slurm controller|socket timed out|connection refused|connection timed out|"
    r"communication connection failure|zero bytes were transmitted|transport endpoint|"
    r"slurm backup controller in standby|unable to establish controller",
    re.IGNORECASE,
)
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE"),
)
"""States of a job that will not run again."""
UNKNOWN_JOB = re.compile(r"invalid job id", re.IGNORECASE)
ONE_TRY_S = 30.0
LONG_KEYS = ("Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment", "AdminComment", "SystemComment")


class SlurmError(RuntimeError):
    """The command was refused; the message is Slurm's."""


class NoController(SlurmError):
    """The controller did not answer until the deadline."""


def slurm(
    args: Sequence[str],
    *,
    deadline_s: float = 60.0,
    stdin: Optional[str] = None,
    variables: Optional[Mapping[str, str]] = None,
    with_stderr: bool = False,
) -> str:
    """Run a Slurm command and return what it printed (`with_stderr`: `sbatch --test-only` answers there);
    `variables` in place of the environment.

    A controller that does not answer (a restart, a fail-over) is asked again after 1, 2, 4, ... 30 s.
    """
    deadline = time.monotonic() + deadline_s
    pause_s = 1.0
    while True:
        error = ""
        try:
            limit_s = min(max(5.0, deadline - time.monotonic()), ONE_TRY_S)
            done = subprocess.run(
                args, capture_output=True, text=True, input=stdin, env=variables, timeout=limit_s
            )
            if done.returncode == 0:
                return done.stdout + done.stderr if with_stderr else done.stdout
            error = (done.stderr or done.stdout).strip()
        except subprocess.TimeoutExpired:
            error = "connection timed out"
        if not NO_ANSWER.search(error):
            raise SlurmError(f"{' '.join(args)}: {error}")
        if time.monotonic() + pause_s > deadline:
            raise NoController(f"{' '.join(args)}: {error}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 30.0)


def show_job(target: str, *, deadline_s: float = 60.0) -> Optional[dict[str, str]]:
    """What the controller knows of a job ("17" or "17_3"); None if it has forgotten it."""
    try:
        text = slurm(["scontrol", "show", "job", target], deadline_s=deadline_s)
    except NoController:
        raise
    except SlurmError as error:
        if UNKNOWN_JOB.search(str(error)):
            return None
        raise
    jobs = parse_jobs(text)
    array, _, task = target.partition("_")
    for job in jobs:  # the number of an array is also that of one of its tasks: take that one
        if task and job.get("ArrayTaskId") == task and job.get("ArrayJobId") == array:
            return job
        if not task and job["JobId"] == target:
            return job
    return None


def parse_jobs(text: str) -> list[dict[str, str]]:
    """The records of `scontrol show job`, which an empty line separates.

    Most lines are `Key=Value Key=Value`; a few keys have a line of their own, because their values hold
    spaces and equals signs (Command holds the script's arguments).
    """
    jobs = []
    for block in re.split(r"\n\s*\n", text.strip()):
        job: dict[str, str] = {}
        for line in map(str.strip, block.splitlines()):
            key, _, value = line.partition("=")
            if key in LONG_KEYS:
                job[key] = value
                continue
            pairs = re.split(r"(?:^|\s)([A-Z][\w:/]*)=", line)[1:]
            job.update(zip(pairs[::2], (value.strip() for value in pairs[1::2])))
        if "JobId" in job:
            jobs.append(job)
    return jobs


def lost_nodes(nodes: Sequence[str], since: float) -> list[str]:
    """Those of `nodes` that the controller cannot reach, or whose slurmd was started after `since` (unix
    seconds): a crash or a reboot took it away in between."""
    text = slurm(["scontrol", "--oneliner", "show", "node", ",".join(nodes)], deadline_s=10.0)
    lost = []
    for line in text.splitlines():
        record = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        started = record.get("SlurmdStartTime", "None")
        restarted = started[:1].isdigit() and time.mktime(time.strptime(started, "%Y-%m-%dT%H:%M:%S")) > since
        if restarted or re.search(r"DOWN|NOT_RESPONDING|FAIL|\*", record.get("State", "")):
            lost.append(record["NodeName"])
    return lost
