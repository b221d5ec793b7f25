"""The curves of one run or several as one picture.

    python -m tools.plot runs/NAME [runs/OTHER ...] [--out FILE.png] [--csv]

metrics.jsonl gives loss, reward accuracy and margins (SFT: token accuracy and entropy) of training and
validation, and the learning rate; timing.jsonl gives throughput, memory and device use. Thin vertical lines
show where an attempt of the job ended and the next went on; a star marks the best checkpoint. Without --out
the picture is curves.png in the (first) run's directory. --csv writes metrics.csv beside each metrics.jsonl.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError
from strop.obs import curves
from tools.command_line import command_parser, run

Rows = list[dict[str, Any]]

TRAIN_COLOUR, EVAL_COLOUR = "#3b6ea8", "#d1622b"
RUN_COLOURS = ("#3b6ea8", "#d1622b", "#4a8f5c", "#8a5fa8", "#b8902f", "#5b6770")


@dataclass(frozen=True)
class Run:
    name: str
    directory: Path
    metrics: Rows
    timing: Rows
    """The newest entry of each step, by step: steps that were done again stand once."""
    restarts: list[float]
    """Where an attempt after the first begins, between two steps."""
    best: Optional[dict[str, Any]]
    """{"step", "metric", "value"} of the best checkpoint."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values where `key` was measured."""
        rows = self.timing if key in TIMING_KEYS else self.metrics
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
        return [p[0] for p in points], [p[1] for p in points]


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    train: str
    eval: Optional[str] = None
    scale: float = 1.0


TIMING_KEYS = {"tokens_per_s", "mem_gib", "mem_peak_gib", "gpu_util", "gpu_mem_gib", "gpu_power_w", "step_s"}
PANELS = (
    Panel("Loss", "nats", "loss", "eval_loss"),
    Panel("Reward accuracy", "% of pairs", "rewards/accuracies", "eval_rewards/accuracies", 100),
    Panel("Reward margin", "chosen - rejected", "rewards/margins", "eval_rewards/margins"),
    Panel("Accuracy", "% of pairs", "accuracy", "eval_accuracy", 100),
    Panel("Margin", "chosen - rejected", "margin", "eval_margin"),
    Panel("Mean reward", "", "mean_reward", "eval_mean_reward"),
    Panel("Token accuracy", "% of trained tokens", "mean_token_accuracy", "eval_mean_token_accuracy", 100),
    Panel("Entropy", "nats per token", "entropy", "eval_entropy"),
    Panel("Learning rate", "", "learning_rate"),
    Panel("Throughput", "tokens per second", "tokens_per_s"),
    Panel("Memory of rank 0, peak", "GiB", "mem_peak_gib"),
    Panel("GPU use", "%", "gpu_util"),
    Panel("GPU power", "W", "gpu_power_w"),
)
PREFERENCE_ONLY = ("rewards/accuracies", "rewards/margins")
HIDDEN_FOR_PREFERENCE = ("mean_token_accuracy", "entropy")


def read_jsonl(path: Path) -> Rows:
    """The lines of a file that may still be written to: a torn last line is left out."""
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline behind it: being written at this moment
                break
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def read_run(directory: Path) -> Run:
    """Raises UserError if there is no such run or nothing has been measured yet."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory")
    path = directory / "metrics.jsonl"
    metrics = read_jsonl(path) if path.is_file() else []
    if not metrics:
        raise UserError(f"{directory}: no metrics yet ({path.name} is missing or empty)")
    timing_path = directory / "timing.jsonl"
    timing = read_jsonl(timing_path) if timing_path.is_file() else []
    best_path = directory / "checkpoints" / "BEST.json"
    return Run(
        name=directory.resolve().name,
        directory=directory,
        metrics=metrics,
        timing=curves.newest(timing),
        restarts=curves.restarts(timing),
        best=json.loads(best_path.read_text()) if best_path.is_file() else None,
    )


def write_csv(source: Run) -> Path:
    """metrics.csv: a row per line of metrics.jsonl, a column per name; empty where a line lacks it."""
    columns = sorted({key for row in source.metrics for key in row} - {"step"})
    path = source.directory / "metrics.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(source.metrics)
    return path


def draw(runs: list[Run], out: Path) -> None:
    """All panels for which any run has a value, three a row."""
    import matplotlib  # here: it is slow to import, and bad input should be refused at once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(runs)
    num_rows = -(-len(panels) // 3)
    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titleweight": "bold",
    }
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(
            num_rows, 3, figsize=(13, 3.3 * num_rows + 0.6), squeeze=False, layout="constrained"
        )
        axes = grid.flatten()
        for panel, axis in zip(panels, axes):
            _draw_panel(panel, runs, axis)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(", ".join(r.name for r in runs), fontsize=12)
        note = "star: best checkpoint" if any(r.best for r in runs) else ""
        if any(r.restarts for r in runs):
            note += ("; " if note else "") + "dotted line: interrupted and resumed here"
        if note:
            figure.supxlabel(note, fontsize=8, color="#666666")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
        pyplot.close(figure)


def _panels(runs: list[Run]) -> list[Panel]:
    preference = any(r.series(key)[0] for r in runs for key in PREFERENCE_ONLY)
    return [
        panel
        for panel in PANELS
        if not (preference and panel.train in HIDDEN_FOR_PREFERENCE)
        and any(r.series(key)[0] for r in runs for key in (panel.train, panel.eval) if key)
    ]


def _draw_panel(panel: Panel, runs: list[Run], axis: Any) -> None:
    single = len(runs) == 1
    for number, source in enumerate(runs):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        prefix = "" if single else f"{source.name} "
        steps, values = _scaled(source.series(panel.train), panel.scale)
        if steps:
            marker = "o" if len(steps) == 1 else None
            label = f"{prefix}training".strip() if panel.eval else prefix.strip()
            axis.plot(
                steps,
                values,
                color=TRAIN_COLOUR if single else colour,
                linewidth=1.3,
                alpha=0.85 if panel.eval else 1.0,
                marker=marker,
                markersize=4,
                label=label or None,
            )
        if panel.eval:
            steps, values = _scaled(source.series(panel.eval), panel.scale)
            eval_colour = EVAL_COLOUR if single else colour
            if steps:
                axis.plot(
                    steps,
                    values,
                    "o--",
                    color=eval_colour,
                    markersize=4,
                    linewidth=1.3,
                    label=f"{prefix}validation",
                )
            _mark_best(source, panel, axis, eval_colour)
        for step in source.restarts:
            axis.axvline(step, color="#888888", linewidth=0.8, linestyle=":")
    axis.set_title(panel.title)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel(panel.unit)
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    if panel.train in TIMING_KEYS:
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # a flat line would lie on the edge
    if panel.scale == 100:
        axis.set_ylim(-3, 103)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _scaled(series: tuple[list[float], list[float]], scale: float) -> tuple[list[float], list[float]]:
    return series[0], [value * scale for value in series[1]]


def _mark_best(source: Run, panel: Panel, axis: Any, colour: str) -> None:
    if source.best and source.best["metric"] == panel.eval:
        point = [source.best["step"]], [source.best["value"] * panel.scale]
        axis.plot(*point, "*", markersize=14, color=colour, markeredgecolor="white", zorder=5)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="runs/NAME")
    parser.add_argument("--out", type=Path, help="PNG file; default: curves.png in the first run's directory")
    parser.add_argument("--csv", action="store_true", help="write metrics.csv into each run's directory")
    args = parser.parse_args()
    runs = [read_run(directory) for directory in args.runs]
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    draw(runs, out)
    print(out)
    if args.csv:
        for source in runs:
            print(write_csv(source))
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
