"""Where Slurm will not put a job back into the queue, a second job waits behind it: its successor.

A job is lost to the queue when it may not be requeued (`--no-requeue`) or when preemption cancels it
(PreemptMode=CANCEL); in the latter case nothing of it can act any more. So `begin` submits the successor at
the start of every such attempt, with `--dependency=afterany`: the same resources, the same arguments, the
same run, one successor per attempt. It is made of three things: the `#SBATCH` lines of the batch script as
Slurm keeps it, what the controller says about the running job (which knows the command line's options and
beats those lines), and the arguments in the attempt's record. Not known to either: `--signal` and the task
layout's rarer options (`--switches`, `--nice`, ...) where they were given on the command line.

Slurm starts the successor after *any* end. So whoever ends the run for good cancels it, and `stand_down`
looks again when it starts. A task of an array gets a plain job as its successor, outside the array's
throttle. Heterogeneous jobs and jobs without a batch script get none.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from strop.slurm import attempts, code, command, env

OPTIONS = {
    "JobName": "job-name",
    "Partition": "partition",
    "Account": "account",
    "QOS": "qos",
    "Reservation": "reservation",
    "Features": "constraint",
    "Licenses": "licenses",
    "ReqNodeList": "nodelist",
    "ExcNodeList": "exclude",
    "NumNodes": "nodes",
    "NumTasks": "ntasks",
    "TimeLimit": "time",
    "TimeMin": "time-min",
    "MailUser": "mail-user",
    "MailType": "mail-type",
    "Comment": "comment",
    "WorkDir": "chdir",
}
"""Fields of `scontrol show job`, and sbatch's option for each."""
GPUS = {
    "TresPerNode": "gres",
    "TresPerJob": "gpus",
    "TresPerTask": "gpus-per-task",
    "TresPerSocket": "gpus-per-socket",
}
UNSET = ("", "(null)", "N/A", "None", "Unknown")
NOT_REPEATED = {
    *("array", "a", "dependency", "d", "begin", "b", "hold", "H", "wait", "W", "parsable", "test-only"),
    *("requeue", "no-requeue", "exclusive", "oversubscribe", "s", "output", "o", "error", "e", "export"),
    *("gres", "gpus", "G", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "mem", "mem-per-cpu"),
}
"""What a `#SBATCH` line says about these is of this one job, or is said again (and a mixture is refused)."""


def needed(record: Mapping[str, str], wish: Optional[bool]) -> bool:
    """Whether the job with this record needs a successor; `wish` (STROP_SUCCESSOR) has the last word.

    A QOS may have a preempt mode of its own, which only the accounting knows: there the user must wish.
    """
    if record.get("BatchFlag") != "1" or "HetJobId" in record or wish is False:
        return False
    return bool(wish) or record.get("Requeue") == "0" or _cancels(record["Partition"])


def _cancels(partition: str) -> bool:
    """A partition without a mode of its own shows the cluster's."""
    text = command.slurm(["scontrol", "show", "partition", partition])
    modes = re.search(r"PreemptMode=(\S+)", text)
    return modes is not None and "CANCEL" in modes[1].split(",")


def waiting(successor: Optional[str]) -> bool:
    """Whether this job is still in the queue: its owner may have cancelled it."""
    record = command.show_job(successor) if successor else None
    return record is not None and record["JobState"] == "PENDING"


def prepare(
    run_dir: Path, attempt: int, record: Mapping[str, str], job: env.Job, algo: str, args: Sequence[str]
) -> Optional[str]:
    """Make sure that exactly one successor waits behind this job, and record it. Its number, or None.

    `args` hold the run's name: one that is made of the job's number would be another run.
    """
    if not needed(record, job.successor_wish):
        return None
    assert job.job_id is not None
    assert job.target is not None
    earlier = [r.get("successor") for r in attempts.read_all(run_dir) if r.get("target") == job.target]
    known = next((s for s in reversed(earlier) if s), None)
    if not waiting(known):
        script = command.slurm(["scontrol", "write", "batch_script", job.job_id, "-"])
        known = command.slurm(
            ["sbatch", "--parsable", *options(record, job.target)],
            stdin=body_script(script, [algo, *args]),
            variables=env.submission_variables(job.target),
        ).strip()
        known = known.split(";")[0]  # "14;cluster" in a federation
    attempts.update(run_dir, attempt, successor=known)
    return known


def options(record: Mapping[str, str], target: str) -> list[str]:
    """sbatch's command line for a second job like this one, behind it."""
    found = [
        f"--{option}={record[field].strip()}"
        for field, option in OPTIONS.items()
        if record.get(field, "").strip() not in UNSET
    ]
    for field, option in GPUS.items():
        gres = [re.sub("^gres[:/]", "", part) for part in record.get(field, "").split(",")]
        gres = [part.replace("=", ":") for part in gres if part not in UNSET]
        if option != "gres":
            gres = [part[len("gpu:") :] for part in gres if part.startswith("gpu:")]
        found += [f"--{option}={','.join(gres)}"] if gres else []
    per_node = record.get("NtasksPerN:B:S:C", "0").partition(":")[0]
    found += [f"--ntasks-per-node={per_node}"] if per_node.isdigit() and per_node != "0" else []
    cpus = record.get("CPUs/Task", "1")
    found += [f"--cpus-per-task={cpus}"] if cpus.isdigit() and cpus != "1" else []
    for field, option in {"MinMemoryNode": "mem", "MinMemoryCPU": "mem-per-cpu"}.items():
        found += [f"--{option}={record[field]}"] if field in record and "MemPerTres" not in record else []
    shared = {"NO": "--exclusive", "USER": "--exclusive=user", "YES": "--oversubscribe"}
    found += [shared[record["OverSubscribe"]]] if record.get("OverSubscribe") in shared else []
    found += ["--requeue" if record.get("Requeue") == "1" else "--no-requeue"]
    found += [f"--{name}={path}" for name, path in _outputs(record, target).items()]
    return [*found, "--open-mode=append", "--export=ALL", f"--dependency=afterany:{target}"]


def _outputs(record: Mapping[str, str], target: str) -> dict[str, str]:
    """Slurm shows the file's name with the job's number filled in; the successor gets its own number."""
    number = rf"(?<!\d)({re.escape(target)}|{re.escape(record['JobId'])})(?!\d)"
    paths = {name: record.get(field, "") for name, field in (("output", "StdOut"), ("error", "StdErr"))}
    if paths["error"] == paths["output"]:
        paths["error"] = ""
    return {
        name: f"{folder}{slash}{re.sub(number, '%j', file)}"
        for name, (folder, slash, file) in ((n, p.rpartition("/")) for n, p in paths.items())
        if file
    }


def body_script(script: str, words: Sequence[str]) -> str:
    """The job's own `#SBATCH` lines, and the same body. What else the script did before (modules, exports)
    has left its traces in the environment, which the successor inherits."""
    lines = []
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH"):
            kept = [
                option for option in _split(line[len("#SBATCH") :]) if _name(option[0]) not in NOT_REPEATED
            ]
            lines += ["#SBATCH " + shlex.join(option) for option in kept]
        elif line.strip() and not line.startswith("#"):
            break  # sbatch reads no further either
    lib = code.REPOSITORY / "sbatch" / "lib.sh"
    return "\n".join(["#!/usr/bin/env bash", *lines, "exec " + shlex.join(["bash", str(lib), *words]), ""])


def _split(text: str) -> list[list[str]]:
    """The options of one `#SBATCH` line, each with its value if that is a word of its own."""
    found: list[list[str]] = []
    for word in shlex.split(text, comments=True):
        if word.startswith("-") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _name(word: str) -> str:
    return word[2:].partition("=")[0] if word.startswith("--") else word[1:2]


def stand_down(job: env.Job, run_dir: Path, records: Sequence[Mapping[str, Any]]) -> Optional[str]:
    """Why this job, a successor that starts, has nothing to do; None if it goes on (or is no successor).

    The controller's word about the predecessor covers the deaths after which nobody could write a record.
    """
    before = job.successor_of
    if before is None or any(r.get("target") == job.target for r in records):
        return None
    if not records:
        return f"run {run_dir} is gone"
    last = records[-1]
    if last.get("target") != before:
        return f"run {run_dir} was taken over by job {last.get('target')}"
    if last["state"] == "DONE" or last.get("action") in ("finished", "stop"):
        return f"run {run_dir} has ended with job {before}: {last.get('cause') or 'done'}"
    state = (command.show_job(before) or {}).get("JobState")
    if state == "CANCELLED":
        attempts.update(run_dir, last["attempt"], cause="cancelled", action="stop")
        return f"run {run_dir}: job {before} was cancelled"
    if state == "OUT_OF_MEMORY" and not last.get("cause"):
        attempts.update(run_dir, last["attempt"], cause="oom")
    return None


def cancel(successor: str) -> None:
    command.slurm(["scancel", successor])


def hold(successor: str) -> None:
    command.slurm(["scontrol", "hold", successor])
