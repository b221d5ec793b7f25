"""The curves of a report as SVG: metrics.jsonl and timing.jsonl, made thin enough to carry in a page.

A long run has more points than a picture has columns: of each column the lowest and the highest are kept,
so that a spike stays visible. A timing line of a step that was done again replaces the earlier one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Point = tuple[float, float]
Row = TypeVar("Row", bound=Mapping[str, Any])
WIDTH, HEIGHT = 400, 176
LEFT, RIGHT, TOP, BOTTOM = 46, 392, 8, 152
COLUMNS = 260


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    train: str
    eval: str = ""
    scale: float = 1.0
    timing: bool = False


PANELS = (
    Panel("Loss", "nats", "loss", "eval_loss"),
    Panel("Reward accuracy", "%", "rewards/accuracies", "eval_rewards/accuracies", 100),
    Panel("Reward margin", "", "rewards/margins", "eval_rewards/margins"),
    Panel("Accuracy", "%", "accuracy", "eval_accuracy", 100),
    Panel("Margin", "", "margin", "eval_margin"),
    Panel("Mean reward", "", "mean_reward", "eval_mean_reward"),
    Panel("Token accuracy", "%", "mean_token_accuracy", "eval_mean_token_accuracy", 100),
    Panel("Gradient norm", "before clipping", "grad_norm"),
    Panel("Learning rate", "", "learning_rate"),
    Panel("Throughput", "tokens/s", "tokens_per_s", timing=True),
    Panel("Seconds a step", "", "step_s", timing=True),
    Panel("Memory of rank 0", "GiB, peak", "mem_peak_gib", timing=True),
    Panel("GPU use", "%", "gpu_util", timing=True),
)


@dataclass(frozen=True)
class Curve:
    panel: Panel
    train: list[Point]
    eval: list[Point]
    restarts: list[float]


def curves(metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The panels that the run has values for."""
    once = newest(timing)
    trained = newest([row for row in metrics if "loss" in row])
    validated = newest([row for row in metrics if "loss" not in row])
    between = restarts(timing)
    preference = any("rewards/accuracies" in row for row in metrics)
    found = []
    for panel in PANELS:
        if preference and panel.train == "mean_token_accuracy":
            continue
        rows = once if panel.timing else trained
        train = _points(rows, panel.train, panel.scale)
        validation = _points(validated, panel.eval, panel.scale) if panel.eval else []
        if train or validation:
            found.append(Curve(panel, train, validation, between))
    return found


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last line of each step, by step: a step may have been done again."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def restarts(timing: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where an attempt after the first begins, between two steps."""
    pairs = zip(timing, timing[1:])
    return [later["step"] - 0.5 for before, later in pairs if before.get("attempt") != later.get("attempt")]


def _points(rows: Sequence[Mapping[str, Any]], key: str, scale: float) -> list[Point]:
    return [
        (float(row["step"]), float(value) * scale)
        for row in rows
        if isinstance(value := row.get(key), (int, float)) and math.isfinite(value)
    ]


def thin(points: list[Point], columns: int = COLUMNS) -> list[Point]:
    """Of each column the lowest and the highest point, in order."""
    if len(points) <= 2 * columns:
        return points
    low, high = points[0][0], points[-1][0]
    kept: dict[int, list[Point]] = {}
    for p in points:
        kept.setdefault(int((p[0] - low) / (high - low) * (columns - 1)), []).append(p)
    out: list[Point] = []
    for column in kept.values():
        out += sorted({min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])})
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.1e}".replace("e-0", "e-") if size < 1e-3 else f"{value:.4g}"


def svg(curve: Curve, name: str) -> tuple[str, dict[str, Any]]:
    """(a figure with its heading, what the page's script needs for it)."""
    train, validation = thin(curve.train), curve.eval
    both = [*curve.train, *validation]
    x_low, x_high = min(p[0] for p in both), max(p[0] for p in both)
    y_low, y_high = _limits([p[1] for p in both], from_zero=curve.panel.timing)
    span_x, span_y = x_high - x_low or 1.0, y_high - y_low

    def at(p: Point) -> str:
        x = LEFT + (p[0] - x_low) / span_x * (RIGHT - LEFT)
        return f"{x:.1f},{BOTTOM - (p[1] - y_low) / span_y * (BOTTOM - TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(curve.panel.title)}">']
    for tick in ticks(y_low, y_high):
        y = BOTTOM - (tick - y_low) / span_y * (BOTTOM - TOP)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in [t for t in ticks(x_low, x_high, 6) if t == int(t)]:
        x = float(at((tick, y_low)).split(",")[0])
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{int(tick)}</text>')
    for step in curve.restarts:
        x = float(at((step, y_low)).split(",")[0])
        parts.append(f'<line class="restart" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
    for points, kind in ((train, "train"), (validation, "eval")):
        if len(points) > 1:
            parts.append(f'<polyline class="{kind}" points="{" ".join(map(at, points))}"/>')
        for p in points if kind == "eval" or len(points) == 1 else ():
            cx, cy = at(p).split(",")
            parts.append(f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="2.6"/>')
    parts.append("</svg>")
    told = {
        **{"train": train, "eval": validation, "low": x_low, "high": x_low + span_x, "width": WIDTH},
        **{"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    }
    return f'<div class="card chart" data-curve="{name}">{_heading(curve)}{"".join(parts)}</div>', told


def _heading(curve: Curve) -> str:
    unit = f"<small>{html.escape(curve.panel.unit)}</small>" if curve.panel.unit else ""
    key = ""
    if curve.train and curve.eval:
        key = (
            '<span class="key"><i style="background:var(--train-line)"></i>training</span>'
            '<span class="key"><i style="background:var(--eval-line)"></i>validation</span>'
        )
    last = (curve.train or curve.eval)[-1][1]
    return f'<h3>{html.escape(curve.panel.title)} {unit}{key}<span class="last">{number(last)}</span></h3>'


def _limits(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """A little room around the values; a value alone stands in the middle."""
    low, high = min(values), max(values)
    if from_zero:
        return 0.0, high * 1.08 or 1.0
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room, high + room
