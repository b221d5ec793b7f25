"""What the watchdogs of an attempt leave behind, and who is to blame for the hang.

logs/NNNN/hang.json is made by the first rank that notices; the others look for it. `suspect` reads the
verdicts afterwards. When everybody waits for one rank, the verdicts of those who wait say little. The one to
name is a rank that did not run for a while, or left no verdict at all (it is stopped, or its node is gone);
else the only one whose main thread is not inside a collective; else the few that stand elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop import files
from strop.slurm import attempts

SHOWN = 8
STOPPED = "ProcessStopped"
"""In the verdict of a rank that ran again after the others had given up: Slurm sends CONT before it kills."""
LATE_S = 3.0
"""A rank that runs sees the others go within a moment; one that says so only later did not run meanwhile."""
COLLECTIVE = re.compile(r"/torch/distributed/(?!checkpoint/)|/strop/dist\.py$|/strop/slurm/rendezvous\.py$")


@dataclass(frozen=True)
class Suspect:
    rank: int
    node: Optional[str]
    message: str
    silent: bool = False
    """It left no verdict: it is stopped, or gone with its node."""


def announcement(run_dir: Path, attempt: int) -> Path:
    return attempts.log_dir(run_dir, attempt) / "hang.json"


def announce(run_dir: Path, attempt: int, facts: dict[str, Any]) -> None:
    """Say that this rank is hung, unless another one has said so: whole, and never replaced."""
    path = announcement(run_dir, attempt)
    aside = path.with_name(f"hang.{facts['rank']:05d}.tmp")
    files.write_json(aside, facts)
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()


def suspect(
    verdicts: Sequence[Mapping[str, Any]], world_size: int, nodes: Mapping[int, str]
) -> Optional[Suspect]:
    """The rank that the others hang on, if the verdicts (their times by one clock) tell; `nodes` says where
    ranks run that left none."""
    said = {v["rank"]: v for v in verdicts}
    hung = [v for v in verdicts if v["kind"] == "hang"]
    if not hung or world_size == 1:
        return None
    given_up = max(v.get("time", 0.0) for v in hung)
    stopped = [
        v
        for v in verdicts
        if v.get("exception") == STOPPED or (v["kind"] == "peer" and v.get("time", 0.0) > given_up + LATE_S)
    ]
    if stopped:
        return _apart(stopped, "was stopped", nodes)
    silent = [rank for rank in range(world_size) if rank not in said]
    if silent:
        text = f"{_named(silent, nodes)} left no stacks: stopped, or its node is lost"
        return Suspect(silent[0], nodes.get(silent[0]), text, silent=True)
    busy = [v for v in hung if not waits(v.get("traceback"))]
    waiting = len(hung) - len(busy)
    if busy and waiting:
        return _apart(busy, "not inside a collective, which the others wait in", nodes)
    places = Counter(map(_place, hung))
    common, number = places.most_common(1)[0]
    apart = [v for v in hung if _place(v) != common]
    if apart and number > len(hung) / 2:
        return _apart(apart, "not where the others are", nodes)
    return None


def _apart(verdicts: Sequence[Mapping[str, Any]], how: str, nodes: Mapping[int, str]) -> Suspect:
    first = min(verdicts, key=lambda v: v["rank"])
    nodes = {**nodes, **{v["rank"]: v["node"] for v in verdicts}}
    ranks = sorted(v["rank"] for v in verdicts)
    return Suspect(first["rank"], first["node"], f"{_named(ranks, nodes)}: {how}; {first['message']}")


def _named(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    shown = [f"rank {r}" + (f" on {nodes[r]}" if r in nodes else "") for r in ranks[:SHOWN]]
    return ", ".join(shown) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")


def waits(stack: Optional[str]) -> bool:
    """Whether the main thread is inside a collective: it waits for others."""
    frames = re.findall(r'File "([^"]+)", line \d+', stack or "")
    return bool(frames) and COLLECTIVE.search(frames[-1]) is not None


def _place(verdict: Mapping[str, Any]) -> tuple[Any, ...]:
    return verdict["phase"], verdict["step"], verdict["fingerprint"]
