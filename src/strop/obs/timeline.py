"""Who did what when: every rank's phases over all attempts, and ranks that lived alike as one band.

The phases come from the structured lines: a phase lasts from its first line to the first line of the next
one, or to the rank's end. Ranks with the same phases, begun at about the same times, and the same kind of
end in every attempt make one band, so that 512 ranks become a handful of rows in which the one that failed
stands alone. Times are by rank 0's clock.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.obs import fates, log_line
from strop.obs.fates import Fate, Fates, unix_time
from strop.slurm import attempts

NO_SIGN = "no sign"
"""From a silent rank's last line to the end of the attempt."""
HEAD_BYTES = TAIL_BYTES = 2 << 20
"""Of a longer file the middle is left out: what it holds is more of the same phases."""
LAST_BYTES = 1 << 17
"""The last line begins within them: a writer shortens longer ones."""
LINE = re.compile(
    rb'\{"time":"([0-9T:.+-]{19,26}Z)","rank":\d+,"node":(?:"[^"]*"|null),"attempt":\d+,'
    rb'"step":(\d+|null),"phase":"([^"\\]*)"'
)
MOST_BANDS = 24
MOST_SPANS = 60
"""Of a band within one attempt; shorter ones are taken into what surrounds them."""
LATE_SHARE, LATE_S = 0.2, 2.0
"""Ranks that come to a phase later than the others by this share of the way to it live apart."""


@dataclass(frozen=True)
class Span:
    phase: str
    begin: float
    end: float
    first_step: Optional[int] = None
    last_step: Optional[int] = None


@dataclass(frozen=True)
class Life:
    """One rank in one attempt."""

    attempt: int
    rank: int
    node: Optional[str]
    spans: tuple[Span, ...]
    end: str
    """done, first (it failed first), failed (by itself too), followed, silent, or "" while it runs."""


@dataclass(frozen=True)
class Band:
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    lives: tuple[Life, ...]
    """Of its lowest rank in each attempt: it stands for the others."""

    @property
    def is_culprit(self) -> bool:
        return any(life.end == "first" for life in self.lives)


def bands(
    run_dir: Path, rows: Sequence[tuple[int, float, Optional[float]]], found: Mapping[int, Fates], now: float
) -> list[Band]:
    """rows: (attempt, began, ended) by time; found: the fates of each attempt."""
    lives: dict[int, list[Life]] = {}
    keys: dict[int, list[Any]] = {}
    for number, began, ended in rows:
        own = _lives(run_dir, number, began, ended, found[number], now)
        middle = _usual_begins(own)
        for life in own:
            lives.setdefault(life.rank, []).append(life)
            keys.setdefault(life.rank, []).append(_key(life, middle, began))
    groups: dict[Any, list[int]] = {}
    for rank in sorted(lives):
        groups.setdefault(tuple(keys[rank]), []).append(rank)
    made = [_band(ranks, lives) for ranks in groups.values()]
    return sorted(_fewer(made, lives), key=lambda band: band.ranks)


def _band(ranks: Sequence[int], lives: Mapping[int, Sequence[Life]]) -> Band:
    nodes = sorted({life.node for rank in ranks for life in lives[rank] if life.node})
    return Band(tuple(ranks), tuple(nodes), tuple(lives[min(ranks)]))


def _fewer(made: list[Band], lives: Mapping[int, Sequence[Life]]) -> list[Band]:
    """At most MOST_BANDS: culprits and the largest stay, the rest becomes one."""
    if len(made) <= MOST_BANDS:
        return made
    ordered = sorted(made, key=lambda band: (not band.is_culprit, -len(band.ranks), band.ranks))
    rest = sorted(rank for band in ordered[MOST_BANDS - 1 :] for rank in band.ranks)
    return [*ordered[: MOST_BANDS - 1], _band(rest, lives)]


def _usual_begins(own: Sequence[Life]) -> dict[str, float]:
    """The median time at which ranks began each phase first."""
    begins: dict[str, list[float]] = {}
    for life in own:
        for phase, begin in _first_begins(life).items():
            begins.setdefault(phase, []).append(begin)
    return {phase: statistics.median(times) for phase, times in begins.items()}


def _first_begins(life: Life) -> dict[str, float]:
    found: dict[str, float] = {}
    for span in life.spans:
        found.setdefault(span.phase, span.begin)
    return found


def _key(life: Life, middle: Mapping[str, float], began: float) -> Any:
    """Equal for ranks that lived alike."""
    when = []
    for phase, begin in _first_begins(life).items():
        late_s = max(LATE_S, LATE_SHARE * (middle[phase] - began))
        when.append((phase, round((begin - middle[phase]) / (2 * late_s))))
    return life.attempt, life.end, tuple(when)


def _lives(
    run_dir: Path, number: int, began: float, ended: Optional[float], found: Fates, now: float
) -> list[Life]:
    logs = attempts.log_dir(run_dir, number)
    files = log_line.files_by_rank(logs, raw=False)
    offsets = fates.clock_offsets(run_dir, number)
    last = now if ended is None else ended
    lives = []
    for fate in found.ranks:
        marks = [m for path in files.get(fate.rank, []) for m in phase_marks(path)]
        offset_s = offsets.get(fate.rank, 0.0)
        marks = [(at - offset_s, phase, step) for at, phase, step in marks]
        end = fate.time if fate.time is not None and fate.kind != "done" else last
        if ended is None:
            end = now
        spans = _spans(marks, began, max(end, marks[-1][0] if marks else began), fate.phase)
        if fate.kind in ("silent", "killed") and end < last:
            spans = (*spans, Span(NO_SIGN, end, last))
        lives.append(Life(number, fate.rank, fate.node, spans, _end(fate, found, ended)))
    return lives


def _end(fate: Fate, found: Fates, ended: Optional[float]) -> str:
    if ended is None:
        return ""
    if found.first is not None and fate.rank == found.first.rank:
        return "first"
    if fate.follows:
        return "followed"
    return fate.kind if fate.kind in ("done", "silent") else "silent" if fate.kind == "killed" else "failed"


def phase_marks(path: Path) -> list[tuple[float, str, Optional[int]]]:
    """(unix time, phase, step) of a file's lines where the phase changes, and of its last line."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(HEAD_BYTES)
            if size > HEAD_BYTES:
                file.seek(max(HEAD_BYTES, size - TAIL_BYTES))
                data += b"\n" + file.read()
    except OSError:
        return []
    marks = list(_changes(data))
    last = next(filter(None, (LINE.match(line) for line in reversed(data[-LAST_BYTES:].split(b"\n")))), None)
    if last is not None and (not marks or last[0] != marks[-1][0]):
        marks.append(last)
    return [
        (at, m[3].decode(errors="replace"), None if m[2] == b"null" else int(m[2]))
        for m in marks
        if (at := unix_time(m[1].decode())) is not None
    ]


def _changes(data: bytes) -> Iterator[re.Match[bytes]]:
    """The lines with another phase than the line before. Between them only the key is searched for: in a
    message its quotes would be escaped."""
    key, at = re.compile(rb'"phase":"'), 0
    while found := key.search(data, at):
        at = found.end()
        line = LINE.match(data, data.rfind(b"\n", 0, found.start()) + 1)
        if line is not None:
            yield line
            key = re.compile(rb'"phase":"(?!' + re.escape(line[3]) + rb'")')


def _spans(
    marks: Sequence[tuple[float, str, Optional[int]]], began: float, end: float, phase: Optional[str]
) -> tuple[Span, ...]:
    """From the attempt's begin to the rank's end; before the first line the rank was starting."""
    if not marks:
        return (Span(phase or "unknown", began, max(end, began)),)
    spans = [] if marks[0][1] == "start" else [Span("start", began, max(marks[0][0], began))]
    for i, (at, name, step) in enumerate(marks):
        until = marks[i + 1][0] if i + 1 < len(marks) else end
        begin = began if i == 0 and name == "start" else at
        span = Span(name, begin, max(until, begin), step, step)
        if spans and spans[-1].phase == name:
            span = Span(name, spans[-1].begin, span.end, spans[-1].first_step, step)
            spans.pop()
        spans.append(span)
    return tuple(_coarser(spans, MOST_SPANS))


def _coarser(spans: list[Span], most: int) -> list[Span]:
    """Without the shortest ones, whose time goes to the span before."""
    if len(spans) <= most:
        return spans
    shortest = sorted(s.end - s.begin for s in spans)[len(spans) - most]
    kept: list[Span] = []
    for s in spans:
        if kept and (s.end - s.begin < shortest or s.phase == kept[-1].phase):
            before = kept.pop()
            kept.append(Span(before.phase, before.begin, s.end, before.first_step, s.last_step))
        else:
            kept.append(s)
    return kept
