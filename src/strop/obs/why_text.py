"""What `strop.obs.why` found out, as one screen of text: on a terminal in colour, else the same words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from strop.obs import status
from strop.obs.fates import WELL, Fate
from strop.obs.log_text import printable
from strop.obs.nearby import Line
from strop.slurm import decide
from strop.slurm.hostlist import ranges

if TYPE_CHECKING:
    from strop.obs.why import Group, Why

BOLD, RED, YELLOW, DIM, OFF = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
WIDTH = 150
FRAMES = 4
LABEL = 10
GROUPS = 4


def text(why: Why, color: bool = False) -> str:
    """One screen. Plain where color is off."""
    why = printable(why)

    def paint(words: str, *codes: str) -> str:
        return f"{''.join(codes)}{words}{OFF}" if color and words else words

    state_color = RED if why.state in status.BAD else YELLOW if why.state in ("queued", "stopped") else ""
    title = f"{why.run}: {paint(why.state, BOLD, state_color)}"
    rows = [title + (f", {why.detail}" if why.detail else "")]
    if why.attempt is None:
        rows.append("no attempt has failed" if why.num_attempts else "no attempt has begun")
        return "\n".join([*rows, *_row("next", [why.next], paint)]) + "\n"
    rows += [_attempt_line(why), ""]
    rows += _row("cause", _cause(why, paint), paint)
    rows += _row("log", [_log_line(line, paint) for line in why.lines], paint)
    for label, groups in (("others", why.others), ("followed", why.followed), ("silent", why.silent)):
        rows += _row(label, _group_lines(groups), paint)
    rows += _row("slurm", list(why.slurm), paint)
    rows += _row("decision", [why.decision], paint)
    rows += _row("next", why.next.splitlines(), paint)
    rows += _row("note", list(why.notes), paint)
    return "\n".join(rows) + "\n"


def _row(label: str, lines: Sequence[str], paint: Any) -> list[str]:
    shown = [line for line in lines if line]
    heads = [paint(label.ljust(LABEL), BOLD), *[" " * LABEL] * len(shown)]
    return [head + line for head, line in zip(heads, shown)]


def _attempt_line(why: Why) -> str:
    parts = [f"attempt {why.attempt} of {why.num_attempts}"]
    parts += [f"job {why.job_id}"] if why.job_id else []
    parts += [f"{why.num_ranks} ranks on {len(why.nodes)} node{'s' if len(why.nodes) != 1 else ''}"]
    if why.began is not None:
        parts.append(f"began {date(why.began)}")
    if why.ended is not None:
        parts.append(f"ended {date(why.ended)} UTC")
    return ", ".join(parts)


def _cause(why: Why, paint: Any) -> list[str]:
    """What and where, the exception, the end of its traceback."""
    words = decide.WORDS.get(why.cause or "", why.cause or "it runs")
    f = why.first
    if f is None:
        return [paint(words, BOLD, RED if why.cause not in (None, *WELL) else "")]
    lines = [paint(words, BOLD, RED) + f": {where(f)}"]
    message = f.message.strip().splitlines()
    named = f.exception if f.exception and not f.message.startswith(f.exception) else ""
    lines.append(clip(": ".join(filter(None, [named, first_line(f.message)])), WIDTH))
    lines += [clip(line, WIDTH) for line in message[1:3]]
    if f.kind == "silent" and not f.message:
        lost = "no stacks: it was stopped" if why.cause == "hang" else "no word: killed at once"
        lines.append(f"it left {lost}, or its node is gone")
    lines += [paint(clip(line, WIDTH), DIM) for line in trace_end(f.traceback, FRAMES)]
    if why.alike:
        lines.append(f"the same on {named_ranks(why.alike)}")
    return lines


def where(f: Fate) -> str:
    parts = [f"rank {f.rank}" + (f" on {f.node}" if f.node else "")]
    parts += [f"phase {f.phase}"] if f.phase else []
    parts += [f"step {f.step}"] if f.step is not None else []
    if f.time is not None:
        parts.append(f"{'about ' if f.kind in ('silent', 'killed', 'segfault') else ''}{clock(f.time)}")
    return ", ".join(parts)


def trace_end(trace: Optional[str], frames: int) -> list[str]:
    """The last frames of a traceback, one line each: "loop.py:210 in _forward: return t.policy(batch)"."""
    found: list[str] = []
    for line in (trace or "").splitlines():
        stripped = line.strip()
        if stripped.startswith('File "'):
            path, _, rest = stripped[6:].partition('", line ')
            number, _, name = rest.partition(", in ")
            found.append(f"{'/'.join(path.split('/')[-2:])}:{number}" + (f" in {name}" if name else ""))
        elif found and line.startswith("    ") and ": " not in found[-1] and set(stripped) - set("^~ "):
            found[-1] += f": {stripped}"
    return [f"  {line}" for line in found[-frames:]]


def named_ranks(group: Group, limit: int = 12) -> str:
    count = len(group.ranks)
    nodes = f" on {group.nodes[0]}" if len(group.nodes) == 1 else ""
    if count > 1 and len(group.nodes) > 1:
        nodes = f" on {len(group.nodes)} nodes"
    return f"{'rank' if count == 1 else f'{count} ranks:'} {ranges(group.ranks, limit)}{nodes}"


def _group_lines(groups: Sequence[Group]) -> list[str]:
    lines = [clip(f"{named_ranks(g)}  {g.what}", WIDTH) for g in groups[:GROUPS]]
    left = sum(len(g.ranks) for g in groups[GROUPS:])
    return [*lines, *([f"and {left} ranks more"] if left else [])]


def _log_line(line: Line, paint: Any) -> str:
    code = {"ERROR": RED, "CRITICAL": RED, "WARNING": YELLOW}.get(line.level, DIM)
    at = clock(line.time) if line.time is not None else " " * len("03:12:07.412")
    return paint(clip(f"{at} [{line.ranks}] {line.level or 'raw'} {line.message}", WIDTH), code)


def clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def clock(unix_s: float) -> str:
    ms = round(unix_s * 1000)
    return time.strftime("%H:%M:%S", time.gmtime(ms // 1000)) + f".{ms % 1000:03d}"


def date(unix_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(unix_s))


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
