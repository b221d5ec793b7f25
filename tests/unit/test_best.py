"""Which validation counts as the best one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from strop import loop
from strop.config import CheckpointConfig, Config


@pytest.mark.parametrize(
    ("metric", "values", "best", "misses"),
    [
        ("eval_loss", [3.0, 2.0, 2.5], (2, 2.0), 1),
        ("eval_gap", [1.0, 3.0, 2.0, 1.0], (2, 3.0), 2),
        ("eval_gap", [math.nan, 1.0, math.nan, 2.0, math.nan], (4, 2.0), 1),
        ("eval_gap", [math.nan, math.nan], (None, None), 2),
    ],
)
def test_the_best_is_a_number(metric, values, best, misses):
    state = SimpleNamespace(step=0, best_value=None, best_step=None, misses=0)
    t: Any = SimpleNamespace(config=Config(checkpoint=CheckpointConfig(best_metric=metric)), state=state)
    for step, value in enumerate(values, start=1):
        state.step = step
        loop._note_best(t, {metric: value})
    assert (state.best_step, state.best_value) == best
    assert state.misses == misses
