"""Which rank was killed, and whether for want of memory: what is left of a death without a verdict.

A killed rank says nothing. srun does, on its stderr, which is the job's output file:

    srun: error: node2: task 1: Killed
    srun: error: node2: task 1: Out Of Memory
    slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.

The first rank that it names is the cause; the others are ended by srun itself. `begin` marks how long the
file is, since a restart appends to it. Where Slurm does not watch the memory, the cgroup's count of kernel
kills on the batch host is the second witness.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.slurm import attempts, decide, hostlist

TAIL_BYTES = 1 << 18
TASK = re.compile(r"^(?:srun|local_launch): error: (\S+): tasks? ([\d,-]+): (.+?)\s*$", re.MULTILINE)
OOM_EVENT = re.compile(r"^.*Detected \d+ oom[-_]kill event.*$", re.MULTILINE)
OOM_WORDS = "Out Of Memory"


def mark() -> dict[str, Any]:
    """For the attempt's record: the output file and its length, and the kernel's count, before the ranks."""
    facts: dict[str, Any] = {"oom_kills": oom_kills()}
    path = os.path.realpath("/proc/self/fd/2")
    if os.path.isfile(path):  # not a terminal or a pipe
        facts["output"] = [path, os.path.getsize(path)]
    return facts


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of this job (outside of Slurm: of this container) the kernel killed on this host."""
    total = 0
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        job = re.match(r".*?/job_\d+", path)
        folder = (job[0] if job else path).lstrip("/")
        if not controllers:  # cgroup v2; v1 has a line for each controller
            file = root / "sys/fs/cgroup" / folder / "memory.events"
        elif "memory" in controllers.split(","):
            file = root / "sys/fs/cgroup/memory" / folder / "memory.oom_control"
        else:
            continue
        found = re.search(r"^oom_kill (\d+)", file.read_text(), re.MULTILINE) if file.is_file() else None
        total += int(found[1]) if found else 0
    return total


def find(
    run_dir: Path,
    record: Mapping[str, Any],
    verdicts: Sequence[decide.Verdict],
    until: Optional[int] = None,
) -> Optional[decide.Death]:
    """The rank that was killed first in the attempt with this record; None if none was. until: `written`."""
    text = written(record, until)
    named = _after_followers(TASK.findall(text), verdicts)
    starved = [task for task in named if task[2].startswith(OOM_WORDS)]
    event = OOM_EVENT.search(text)
    killed = named[:1] if named and named[0][2].startswith("Killed") else []
    counted = bool(killed) and oom_kills() > record.get("oom_kills", 0)
    if not (starved or event or killed):
        return None
    node, ranks, words = (starved or killed or [("", "", event[0].strip() if event else "")])[0]
    lines = [words] if not event or event[0].strip() == words else [words, event[0].strip()]
    first = re.match(r"\d+", ranks)
    return decide.Death(
        rank=int(first[0]) if first else None,
        node=node or None,
        message=(f"rank{'s' if not ranks.isdigit() else ''} {ranks} on {node}: " if node else "")
        + "; ".join(lines)
        + ("; the kernel ended it for want of memory" if counted and not starved and not event else ""),
        oom=bool(starved or event) or counted,
        step=_step(run_dir, verdicts),
    )


def _step(run_dir: Path, verdicts: Sequence[decide.Verdict]) -> Optional[int]:
    """How far the run had come: by the others' verdicts, else by the newest line of its metrics."""
    said = [v.step for v in verdicts if v.step is not None]
    if said:
        return max(said)
    path = run_dir / "metrics.jsonl"
    lines = files.tail(path, TAIL_BYTES) if path.exists() else b""
    steps = re.findall(rb'^\{"step": (\d+)', lines, re.MULTILINE)
    return int(steps[-1]) if steps else attempts.committed_step(run_dir)


def written(record: Mapping[str, Any], until: Optional[int] = None) -> str:
    """What the attempt left in the job's output file, at most the last TAIL_BYTES; until: where the next
    attempt's part begins."""
    path, offset = record.get("output") or ("", 0)
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        start = max(offset, end - TAIL_BYTES) if offset <= end else 0
        if until is not None and offset <= until <= end:
            start, end = max(offset, until - TAIL_BYTES), until
        file.seek(start)
        return file.read(end - start).decode(errors="replace")


def ended_first(
    record: Mapping[str, Any], verdicts: Sequence[decide.Verdict], until: Optional[int] = None
) -> tuple[int, ...]:
    """The ranks of the first line in which srun names any that did not merely follow: it learns of the
    culprit's end before it ends the others. One clock, whatever those of the nodes say."""
    named = _after_followers(TASK.findall(written(record, until)), verdicts)
    return tuple(ranks_of(named[0][1])) if named else ()


def _after_followers(
    named: Sequence[tuple[str, str, str]], verdicts: Sequence[decide.Verdict]
) -> list[tuple[str, str, str]]:
    """srun's lines from the first one that names a rank of which no verdict says that it only followed:
    sixteen ranks end within milliseconds, and the nodes report that in any order."""
    followers = {v.rank for v in verdicts if v.kind == "peer"}
    return list(itertools.dropwhile(lambda line: followers.issuperset(ranks_of(line[1])), named))


def ranks_of(text: str) -> list[int]:
    """Of srun's "3,5-7"; none of what only looks like it."""
    try:
        return [int(rank) for rank in hostlist.expand(f"[{text}]")]
    except ValueError:
        return []


def describe_space(run_dir: Path) -> str:
    """Which file system a run is on and what is free there: what to say when nothing can be written."""
    space = os.statvfs(run_dir)
    free, size = space.f_bavail * space.f_frsize / 2**30, space.f_blocks * space.f_frsize / 2**30
    text = f"{_mount(run_dir)}: {free:.1f} of {size:.1f} GiB free"
    if space.f_files and not space.f_favail:
        return text + ", but no inode (too many files)"
    return text + ("; if that is plenty, it is a quota" if free > 1 else "")


def _mount(path: Path) -> str:
    """ "/scratch (lustre)": the longest mount point that leads to the path."""
    real = os.path.realpath(path)
    best, kind = "/", "?"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point, fstype = (word.replace("\\040", " ") for word in line.split()[1:3])
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fstype
    return f"{best} ({kind})"
