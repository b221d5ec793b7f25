"""The cache of the reference's log-probs, with a policy that says a number of its own at every pass."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from strop.algos import reference
from strop.data.store import TokenisedRow, TokenStore

ALONE = SimpleNamespace(
    rank=0,
    is_main=True,
    device=torch.device("cpu"),
    broadcast=lambda value: value,
    gather=lambda value: [value],
    barrier=lambda: None,
)


@pytest.fixture
def store(tmp_path):
    """Three rows of two sequences of two tokens."""
    half = (np.array([1, 2]), np.array([False, True]))
    rows = [TokenisedRow("a", line, [half, half]) for line in (1, 2, 3)]
    return TokenStore.write(tmp_path / "s", iter(rows), kind="preference", digest="x")


def compute(store, path, bins, value, stopped=lambda: False):
    def policy(batch):
        return SimpleNamespace(logp_T=torch.full((len(batch.tokens_T),), value))

    bins = [[np.array(rows) for rows in bins]]
    words = (ALONE, "run", stopped, lambda done, total: None)
    return reference.compute(policy, store, bins, path, *words)  # type: ignore[arg-type]


def test_values_that_are_there_stay_when_rows_are_packed_anew(store, tmp_path):
    """Rows 0 and 1 were computed for a shorter run; a longer one on other ranks packs 0 with 2."""
    path = tmp_path / "reference.npy"
    assert compute(store, path, [[0, 1]], -1.0)
    assert reference.missing(path, store, np.array([0, 1, 2]))
    assert compute(store, path, [[2, 0], [1]], -2.0)
    assert np.load(path).tolist() == [-1.0] * 8 + [-2.0] * 4
    assert not reference.missing(path, store, np.array([0, 1, 2]))


def test_a_pass_that_was_stopped_goes_on_where_it_was(store, tmp_path):
    path = tmp_path / "reference.npy"
    assert not compute(store, path, [[0], [1], [2]], -1.0, stopped=lambda: True)
    assert not path.exists()
    assert compute(store, path, [[0, 2], [1]], -2.0)
    assert np.load(path).tolist() == [-1.0] * 4 + [-2.0] * 8
