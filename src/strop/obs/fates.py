"""What became of every rank of an attempt, from what each left behind.

A verdict speaks for itself, unless its words only follow another rank's end (`strop.slurm.peers`). A rank
without one may have left the dump of a native crash in its raw file, or a line of srun's in the job's
output; who left nothing at all was killed, or its node is gone, or it was ended with the others. Times are
corrected by clock.json to rank 0's clock. Whatever cannot be read is counted in `notes`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from strop.obs import log_line
from strop.slurm import attempts, crash, deaths, decide, hang, hostlist, peers

TAIL_BYTES = 1 << 14
SLURM_LINE = re.compile(r"^(?:srun|slurmstepd[\w-]*|slurmd[\w-]*|local_launch): .+$", re.MULTILINE)
CRASH_WORDS = ("Segmentation fault", "Bus error", "Illegal instruction", "Aborted", "Floating point")
WELL = ("done", "preempted", "time_limit", "stopped", "requeued", "cancelled")


@dataclass(frozen=True)
class Fate:
    """How one rank ended."""

    rank: int
    kind: str
    """Of its verdict (attempts.KINDS); else segfault, killed (by srun's word), torn (its verdict is cut off),
    silent, or done."""
    node: Optional[str] = None
    message: str = ""
    exception: Optional[str] = None
    traceback: Optional[str] = None
    step: Optional[int] = None
    phase: Optional[str] = None
    time: Optional[float] = None
    """Unix seconds by rank 0's clock: of its verdict, or of its last line."""
    follows: Optional[str] = None
    """Why its words only follow another rank's end; None if they stand for themselves, or it left none."""
    fingerprint: Optional[str] = None


@dataclass(frozen=True)
class Fates:
    """All ranks of one attempt, and the one that failed first."""

    ranks: tuple[Fate, ...]
    cause: Optional[str]
    """A key of decide.WORDS; None while it runs."""
    first: Optional[Fate]
    slurm: tuple[str, ...]
    """What srun and slurmstepd wrote into the job's output, first lines first."""
    notes: tuple[str, ...]


def read(run_dir: Path, record: Mapping[str, Any], following: Optional[Mapping[str, Any]]) -> Fates:
    """The fates of the attempt with this record; following: the next attempt's."""
    number = record["attempt"]
    logs = attempts.log_dir(run_dir, number)
    until = _until(record, following)
    clocks, notes = _clocks(run_dir, number)
    said, torn = _verdicts(logs)
    notes += [f"cut off and unreadable: verdict of rank {hostlist.ranges(torn, 12)}"] if torn else []
    names = os.listdir(logs) if logs.is_dir() else []
    if not names:
        notes.append(f"{logs} holds no logs")
    structured, raw = (log_line.files_by_rank(logs, raw=kind) for kind in (False, True))
    world_size = _world_size(record, clocks, names, said)
    output = deaths.written(record, until)
    tasks = _tasks(output)
    ended_well = record.get("state") in ("DONE", "YIELD") and record.get("cause") not in decide.FAILURES
    ranks = []
    for rank in range(world_size):
        node, offset_s = clocks.get(rank, (None, 0.0))
        if rank in said:
            fate = _spoken(said[rank], offset_s)
        else:
            kind = "torn" if rank in torn else "done" if ended_well else "silent"
            line = last_line(structured[rank][-1]) if rank in structured and not ended_well else {}
            fate = _unspoken(rank, kind, node, offset_s, tasks.get(rank), raw.get(rank), line)
        ranks.append(fate)
    cause, first = _first(run_dir, record, until, ranks, said, clocks)
    if first is not None and first.kind in ("silent", "killed", "segfault"):
        first = ranks[first.rank] = _as_noticed(first, ranks)
    ranks = [_mark_hung(fate, cause, first) for fate in ranks]
    lines = tuple(dict.fromkeys(line.strip() for line in SLURM_LINE.findall(output)))
    return Fates(tuple(ranks), cause, first, lines, tuple(notes))


def _until(record: Mapping[str, Any], following: Optional[Mapping[str, Any]]) -> Optional[int]:
    """Where the next attempt's part of the same output file begins."""
    mine, theirs = record.get("output"), (following or {}).get("output")
    return theirs[1] if mine and theirs and mine[0] == theirs[0] else None


def _clocks(run_dir: Path, number: int) -> tuple[dict[int, tuple[str, float]], list[str]]:
    try:
        return attempts.read_clocks(run_dir, number), []
    except (OSError, KeyError, TypeError, ValueError) as error:
        return {}, [f"clock.json of attempt {number} cannot be read ({error}): times are not corrected"]


def _verdicts(logs: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """(verdicts by rank, ranks of which the verdict is cut off or is no verdict)."""
    said: dict[int, dict[str, Any]] = {}
    torn = []
    for path in sorted(logs.glob("verdict-*.json")):
        number = re.fullmatch(r"verdict-(\d{5,7})\.json", path.name)
        if not number:
            continue
        try:
            verdict = attempts.read_verdict(path)
        except OSError:
            verdict = None
        if verdict is not None:
            said[int(number[1])] = {**verdict, "rank": int(number[1])}
        else:
            torn.append(int(number[1]))
    return said, torn


def _world_size(
    record: Mapping[str, Any], clocks: Mapping[int, Any], names: Sequence[str], said: Mapping[int, Any]
) -> int:
    machine = record.get("machine")
    told = machine.get("ranks", 0) if isinstance(machine, dict) else 0
    seen = [
        int(m[1]) for name in names if (m := re.match(r"(?:rank|present-|verdict-)(\d{5,7})(?!\d)", name))
    ]
    told = told if isinstance(told, int) else 0
    return max([told, len(clocks), *(rank + 1 for rank in (*seen, *said))])


def _tasks(output: str) -> dict[int, str]:
    """What srun said of each task's end."""
    found: dict[int, str] = {}
    for _, tasks, words in deaths.TASK.findall(output):
        for rank in deaths.ranks_of(tasks):
            found.setdefault(rank, words)
    return found


def last_line(path: Path) -> dict[str, Any]:
    """The last structured line of a file; {} without one."""
    return next(log_line.last_records(path, TAIL_BYTES), {})


def clock_offsets(run_dir: Path, attempt: int) -> dict[int, float]:
    """Seconds by which each rank's clock is ahead of rank 0's; {} where that is not known."""
    return {rank: offset_s for rank, (_, offset_s) in _clocks(run_dir, attempt)[0].items()}


def unix_time(text: Any) -> Optional[float]:
    """Seconds of a line's time; None for what is none."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def _spoken(v: Mapping[str, Any], offset_s: float) -> Fate:
    message = str(v.get("message") or "")
    follows = None
    if v["kind"] in ("peer", "exception"):
        follows = peers.reason(v.get("exception"), message, v.get("traceback"))
    if v["kind"] == "peer":
        follows = follows or "followed another rank's end"
    time = v.get("time")
    return Fate(
        rank=v["rank"],
        kind="peer" if follows else v["kind"],
        node=v.get("node"),
        message=message,
        exception=v.get("exception"),
        traceback=v.get("traceback"),
        step=v.get("step"),
        phase=v.get("phase"),
        time=time - offset_s if isinstance(time, (int, float)) else None,
        follows=follows,
        fingerprint=v.get("fingerprint"),
    )


def _unspoken(
    rank: int,
    kind: str,
    node: Optional[str],
    offset_s: float,
    srun: Optional[str],
    raw: Optional[Sequence[Path]],
    line: Mapping[str, Any],
) -> Fate:
    """Of a rank without a verdict: its dump, else srun's word, else its silence."""
    message, follows, fingerprint = "", None, None
    dump = crash.of_rank(rank, raw) if raw is not None and kind != "done" else None
    if kind != "done" and isinstance(dump, decide.Crash):
        kind, message, fingerprint = "segfault", dump.message, dump.fingerprint
    elif kind != "done" and isinstance(dump, str):
        kind, follows = "peer", dump
    elif kind != "done" and srun and srun.startswith((*CRASH_WORDS, "Killed", deaths.OOM_WORDS)):
        kind, message = "segfault" if srun.startswith(CRASH_WORDS) else "killed", f"srun says: {srun}"
    stamp = unix_time(line.get("time"))
    return Fate(
        rank=rank,
        kind=kind,
        node=node or line.get("node"),
        message=message,
        step=line.get("step"),
        phase=line.get("phase"),
        time=None if stamp is None else stamp - offset_s,
        follows=follows,
        fingerprint=fingerprint,
    )


# ------------------------------------------------------------------------------------- who was first


def _first(
    run_dir: Path,
    record: Mapping[str, Any],
    until: Optional[int],
    ranks: Sequence[Fate],
    said: Mapping[int, Mapping[str, Any]],
    clocks: Mapping[int, tuple[str, float]],
) -> tuple[Optional[str], Optional[Fate]]:
    """(cause, the rank that failed first by itself), as the job body decided it where it did."""
    cause, rank = record.get("cause"), record.get("rank")
    if cause in WELL or record.get("state") == "DONE":
        return cause or "done", None
    if cause is None or rank is None:
        found = decide.classify(_facts(run_dir, record, until, ranks, said, clocks))
        # Without a word of anybody's, the decision knows no better than "killed".
        untold = found.name == "killed" and not any(f.kind not in ("silent", "done") for f in ranks)
        cause = cause or ("lost" if untold else found.name)
        rank = found.rank
    if rank is not None and 0 <= rank < len(ranks):
        return cause, ranks[rank]
    return cause, _first_silent(ranks, cause)


def _facts(
    run_dir: Path,
    record: Mapping[str, Any],
    until: Optional[int],
    ranks: Sequence[Fate],
    said: Mapping[int, Mapping[str, Any]],
    clocks: Mapping[int, tuple[str, float]],
) -> decide.Facts:
    """What `decide` would have had before it, had the batch shell lived."""
    spoken = [
        decide.Verdict(
            rank=f.rank,
            node=f.node or "",
            kind=f.kind,
            exit_code=1,
            message=f.message,
            step=f.step,
            phase=f.phase,
            fingerprint=f.fingerprint,
            time=f.time or 0.0,
        )
        for f in ranks
        if f.rank in said
    ]
    dumped = next((f for f in ranks if f.kind == "segfault" and f.rank not in said), None)
    nodes = {rank: node for rank, (node, _) in clocks.items()}
    told = [{**said[v.rank], "time": v.time} for v in spoken]
    return decide.Facts(
        state="X" if record.get("state") == "FAIL" else record.get("state", "X"),
        launcher_exit=record.get("launcher_exit") or 1,
        step=record.get("step"),
        verdicts=tuple(spoken),
        crash=None if dumped is None else decide.Crash(dumped.rank, dumped.message, dumped.fingerprint or ""),
        death=deaths.find(run_dir, record, spoken, until),
        ended_first=deaths.ended_first(record, spoken, until),
        suspect=hang.suspect(told, len(ranks), nodes),
        signals=tuple(record.get("signals") or ()),
    )


def _first_silent(ranks: Sequence[Fate], cause: Optional[str]) -> Optional[Fate]:
    """Of the ranks that left no word, the one whose log ends first: where others report that somebody went
    away, or nothing else is known."""
    silent = [f for f in ranks if f.kind in ("silent", "killed", "torn")]
    if not silent or cause in ("done", "cancelled", "user", "late"):
        return None
    if len(silent) == len(ranks) and len(ranks) > 1 and not any(f.kind == "killed" for f in silent):
        return None  # all at once: no rank is to blame
    first = min(silent, key=lambda f: (f.kind == "silent", f.time is None, f.time or 0.0, f.rank))
    if first.kind != "silent" or first.node is None:
        return first
    mates = [f for f in ranks if f.node == first.node]
    gone = [f for f in mates if f.kind == "silent"]  # their last lines' order says nothing
    if 1 < len(gone) == len(mates):
        words = f"none of the {len(mates)} ranks of {first.node} left a word: the node is gone"
        return dataclasses.replace(gone[0], message=words)
    return gone[0]


def _as_noticed(first: Fate, ranks: Sequence[Fate]) -> Fate:
    """When, and at which step, the others noticed that it had gone: its own last line may be much older."""
    noticed = [f for f in ranks if f.kind == "peer" and f.time is not None and f.phase]
    if not noticed:
        return first
    other = min(noticed, key=lambda f: f.time or 0.0)
    step = max((f.step for f in noticed if f.step is not None), default=first.step)
    return dataclasses.replace(first, time=other.time, step=step, phase=first.phase or other.phase)


def _mark_hung(fate: Fate, cause: Optional[str], first: Optional[Fate]) -> Fate:
    """The ranks that waited for the one that hung have verdicts of their own, and only followed; so have
    those whose watchdog was faster than the news of another rank's end."""
    if fate.kind != "hang" or first is None or fate.rank == first.rank:
        return fate
    if cause not in ("hang", "killed") and not hang.waits(fate.traceback):
        return fate
    return dataclasses.replace(fate, follows="waited for it, until the watchdog ended them")
