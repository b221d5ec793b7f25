"""The picture has the asked size and ink in every panel; the CSV is metrics.jsonl again."""

import csv
import json

import pytest
from matplotlib import image

from strop.errors import UserError
from tools import plot


def make_run(directory, num_steps=6, attempts=(1,), **extra):
    directory.mkdir()
    metrics, timing = [], []
    for step in range(num_steps + 1):
        if step:
            row = {"step": step, "loss": 0.7 - 0.1 / 3 * step, "learning_rate": 1e-5 / step, **extra}
            metrics.append({**row, "rewards/accuracies": 0.1 * step, "rewards/margins": 0.05 * step})
            attempt = attempts[(step - 1) * len(attempts) // num_steps]
            timing.append(
                {"step": step, "tokens_per_s": 100.0 + step, "mem_peak_gib": 1.5, "attempt": attempt}
            )
        if step % 3 == 0:
            metrics.append(
                {"step": step, "eval_loss": 0.69 - 0.03 * step, "eval_rewards/accuracies": 0.15 * step}
            )
    _write(directory / "metrics.jsonl", metrics)
    _write(directory / "timing.jsonl", timing)
    return metrics


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_picture_has_ink_in_every_panel(tmp_path):
    make_run(tmp_path / "a", attempts=(1, 2))
    (tmp_path / "a" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "BEST.json").write_text(
        '{"step": 6, "metric": "eval_loss", "value": 0.51}'
    )
    out = tmp_path / "new" / "curves.png"
    plot.draw([plot.read_run(tmp_path / "a")], out)
    pixels = image.imread(out)[:, :, :3]
    height, width = pixels.shape[:2]
    # 13 x 7.2 inches at 130 dots an inch: six panels. Some matplotlibs round 936 down.
    assert width == 1690
    assert height in (935, 936)
    for row in range(2):
        for column in range(3):
            panel = pixels[
                row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3
            ]
            coloured = panel.max(axis=2) - panel.min(axis=2) > 0.2  # the curves; axes and text are grey
            assert coloured.sum() > 200, (row, column)


def test_the_panels_of_a_reward_model(tmp_path):
    (tmp_path / "a").mkdir()
    names = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    lines = [{"step": 1, **dict.fromkeys(names, 0.5)}, {"step": 1, **{f"eval_{n}": 0.5 for n in names}}]
    _write(tmp_path / "a" / "metrics.jsonl", lines)
    panels = plot._panels([plot.read_run(tmp_path / "a")])
    assert [(p.train, p.eval) for p in panels] == [
        (name, f"eval_{name}") for name in ("loss", "accuracy", "margin", "mean_reward")
    ]


def test_csv_is_the_same_table(tmp_path):
    rows = make_run(tmp_path / "a", entropy=1 / 3)
    path = plot.write_csv(plot.read_run(tmp_path / "a"))
    with open(path) as file:
        read = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items() if value != ""} for row in read] == rows


def test_restarts_and_repeated_steps(tmp_path):
    make_run(tmp_path / "a")
    done = [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]  # step 3 was not committed and is done again
    _write(
        tmp_path / "a" / "timing.jsonl", [{"step": s, "attempt": a, "tokens_per_s": 10 * a} for s, a in done]
    )
    run = plot.read_run(tmp_path / "a")
    assert run.restarts == [2.5]
    assert run.series("tokens_per_s") == ([1, 2, 3, 4], [10, 10, 20, 20])


def test_torn_last_line_is_left_out(tmp_path):
    rows = make_run(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert plot.read_run(tmp_path / "a").metrics == rows


def test_bad_line_is_named(tmp_path):
    make_run(tmp_path / "a")
    path = tmp_path / "a" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = "{oops"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 3: not JSON"):
        plot.read_run(tmp_path / "a")


def test_nothing_to_plot(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        plot.read_run(tmp_path / "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no metrics yet"):
        plot.read_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics yet"):
        plot.read_run(tmp_path / "a")


def test_one_point_and_several_runs(tmp_path):
    make_run(tmp_path / "a", num_steps=1)
    make_run(tmp_path / "b")
    plot.draw([plot.read_run(tmp_path / "a")], tmp_path / "one.png")
    plot.draw([plot.read_run(tmp_path / name) for name in "ab"], tmp_path / "two.png")
    loss = image.imread(tmp_path / "one.png")[:450, :560, :3]
    assert (loss.max(axis=2) - loss.min(axis=2) > 0.2).sum() > 20  # a single point is a visible dot
    two = image.imread(tmp_path / "two.png")[:, :, :3]
    blue, orange = (
        abs(two - colour).max(axis=2) < 0.15 for colour in ([0.23, 0.43, 0.66], [0.82, 0.38, 0.17])
    )
    assert blue.sum() > 50
    assert orange.sum() > 200
