"""The figures of a benchmark: what became of every kind, where the time of a restart goes, and the ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.faultlib.drive import Result, RunResult


def kinds_table(results: Sequence[Result]) -> list[str]:
    """Markdown: one line a kind."""
    lines = [
        "| fault | count | as it should | cause (times) | action | lost steps, median (most) | "
        "seconds to the first new step, median (most) |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for kind in sorted({r.kind for r in results}):
        of_kind = [r for r in results if r.kind == kind]
        good = sum(not r.complaints for r in of_kind)
        causes = _counted([r.cause or "none: survived in place" for r in of_kind])
        actions = _counted([r.action or "none" for r in of_kind])
        lost = [float(r.lost_steps) for r in of_kind if r.lost_steps is not None]
        seconds = [r.resume_s for r in of_kind if r.resume_s is not None]
        columns = [kind, len(of_kind), good, causes, actions, _spread(lost, 0), _spread(seconds, 1)]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return lines


def restart_table(results: Sequence[Result]) -> list[str]:
    """Where the time from a killed rank to the first new step goes: median and longest."""
    of_kills = [r for r in results if r.kind.startswith("SIGKILL") and r.parts_s]
    if not of_kills:
        return []
    lines = [
        f"| from SIGKILL to the first new step ({len(of_kills)} times) | seconds, median (most) |",
        "|---|---:|",
    ]
    for name in of_kills[0].parts_s:
        lines.append(f"| {name} | {_spread([r.parts_s[name] for r in of_kills], 1)} |")
    total = [r.resume_s for r in of_kills if r.resume_s is not None]
    return [*lines, f"| all | {_spread(total, 1)} |"]


def ratios(results: Sequence[Result], runs: Sequence[RunResult], steps: int, save_every: int) -> list[str]:
    """The share of time that counts, beside (1 - N r (u + Δt/2)) / (1 + w/Δt) (Kokolis et al. 2024).

    N·r is counted here: faults by second in which runs were running or restarting. The formula loses Δt/2 at
    every fault; one that lets the ranks commit loses nothing.
    """
    resumes = [r.resume_s for r in results if r.resume_s is not None]
    lost = [r.lost_steps for r in results if r.lost_steps is not None]
    if not resumes:
        return []
    wall_s, kept_s = sum(r.wall_s for r in runs), sum(r.kept_s for r in runs)
    rate, restart_s = sum(r.faults for r in runs) / wall_s, statistics.mean(resumes)
    stall_s = sum(r.stall_s for r in runs) / max(1, sum(r.saves for r in runs))
    interval_s = save_every * kept_s / (steps * len(runs))
    formula = (1 - rate * (restart_s + interval_s / 2)) / (1 + stall_s / interval_s)
    return [
        f"effective-time ratio {kept_s / wall_s:.3f} ({kept_s:.0f} of {wall_s:.0f} s); "
        f"by the formula {formula:.3f}: a fault every {1 / rate:.0f} s, restart u = {restart_s:.1f} s, "
        f"saves every Δt = {interval_s:.1f} s with a stall w = {stall_s:.3f} s",
        f"repeated steps: {statistics.mean(lost):.1f} a fault, with a save every {save_every}",
    ]


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{word} ({words.count(word)})" for word in sorted(set(words)))


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})"
