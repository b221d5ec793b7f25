"""What needs no ranks: the disk check, clean-up, and the schedule of the learning rate."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from strop import checkpoint, optim, preflight
from strop.config import OptimConfig
from strop.errors import UserError
from strop.slurm import attempts


def test_a_disk_too_full_for_one_checkpoint(tmp_path, monkeypatch):
    """2^28 parameters take 3 GiB: fp32 weights and two moments."""
    model = torch.nn.Linear(2**14, 2**14, bias=False, device="meta")
    run, dist = SimpleNamespace(dir=tmp_path), SimpleNamespace(broadcast=lambda value: value)
    for free, enough in ((3 * 2**30, True), (3 * 2**30 - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            preflight.check_disk(run, model, dist)
            continue
        with pytest.raises(UserError) as raised:
            preflight.check_disk(run, model, dist)
        assert str(raised.value) == (
            f"run.dir: 3.0 GiB free in {tmp_path}, but one checkpoint of this model takes 3.0 GiB"
        )


def commit(root, *steps):
    for step in steps:
        path = checkpoint.step_dir(root, step)
        path.mkdir(parents=True)
        (path / checkpoint.MARKER).write_text(json.dumps({"step": step}))


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [
        (2, None, [9, 10]),
        (2, 3, [3, 9, 10]),
        (2, 10, [9, 10]),
        (3, 2, [2, 3, 9, 10]),
        (9, None, [1, 2, 3, 9, 10]),
    ],
)
def test_clean_up_keeps_the_newest_and_the_best(tmp_path, keep_last, best, left):
    commit(tmp_path, 1, 2, 3, 9, 10)
    checkpoint.clean_up(tmp_path, keep_last, best)
    assert attempts.committed_steps(tmp_path) == left
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:06d}" for s in left]


def test_rubble_goes_and_what_is_committed_or_set_aside_stays(tmp_path):
    commit(tmp_path, 4, 1234567)
    for name in ("step-000005", "step-000006.a3.tmp", "step-000002.damaged-1", "notes"):
        (tmp_path / name).mkdir()
    checkpoint.remove_rubble(tmp_path)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["notes", "step-000002.damaged-1", "step-000004", "step-1234567"]
    assert attempts.committed_steps(tmp_path) == [4, 1234567]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (4, 0.1), (20, 0.0)])
def test_learning_rate(schedule, warmup, floor):
    """transformers' definition with its step shifted by one: the first step already learns."""
    config = OptimConfig(lr=2e-3, schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor)
    for step in range(20):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            share = (step - warmup) / (20 - warmup)
            falling = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[
                schedule
            ]
            expected = 1.0 if schedule == "constant" else floor + (1 - floor) * falling
        assert optim.learning_rate(config, step, 20) == pytest.approx(2e-3 * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "floor", "rates"),
    [
        (4, 0.0, [0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - 2**-0.5, 1 - 0.75**0.5]),
        (4, 0.2, [0.5, 1, 1, 1, 1, 1, 1, 0.6, 0.2 + 0.8 * (1 - 2**-0.5), 0.2 + 0.8 * (1 - 0.75**0.5)]),
        (0.4, 0.0, [0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - 2**-0.5, 1 - 0.75**0.5]),  # 0.4 of ten steps
        (1, 0.0, [0.5, *[1] * 9]),  # one step of decay begins at the full rate
        (0.01, 0.0, [0.5, *[1] * 9]),  # a share of less than a step is one
        (8, 0.0, [0.5, 1, *(1 - (k / 8) ** 0.5 for k in range(8))]),  # no stable phase at all
    ],
)
def test_warmup_stable_decay(decay, floor, rates):
    """Ten steps, two of warm-up; rates by hand."""
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=2, decay_steps=decay, min_lr_ratio=floor)
    optim.check_schedule(config, 10)
    assert [optim.learning_rate(config, step, 10) for step in range(10)] == pytest.approx(
        [2 * rate for rate in rates], rel=1e-12
    )
    if decay == 4:  # a longer run is the same up to where the shorter one began to decay
        longer = [optim.learning_rate(config, step, 100) for step in range(7)]
        assert longer == [optim.learning_rate(config, step, 10) for step in range(7)]


def test_phases_that_do_not_fit():
    config = OptimConfig(schedule="wsd", warmup_steps=2, decay_steps=9)
    with pytest.raises(
        UserError, match=r"^optim\.decay_steps: 2 steps of warm-up and 9 of decay are more than"
    ):
        optim.check_schedule(config, 10)
    optim.check_schedule(dataclasses.replace(config, schedule="cosine"), 10)
