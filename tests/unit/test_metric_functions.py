"""What a user's metric may return, and which keys go with it. The values that it sees: tests/dist."""

from __future__ import annotations

import re
import sys
import types

import numpy as np
import pytest

from strop import config as config_module
from strop.config import Config, ValidationConfig
from strop.errors import UserError
from strop.user_metrics import ValidationRows, _call

ROWS = ValidationRows("validation", 3, [("a", 1)], ["p"], [["c"]], np.ones((1, 1), dtype=np.int64))


@pytest.fixture
def call(monkeypatch):
    """call(value, ...) -> what comes of functions that return these values."""

    def call(*values, taken=()):
        module = types.ModuleType("made_up_metrics")
        for i, value in enumerate(values):
            setattr(module, f"f{i}", lambda rows, value=value: value)
        monkeypatch.setitem(sys.modules, "made_up_metrics", module)
        names = [f"made_up_metrics:f{i}" for i in range(len(values))]
        return _call(ROWS, Config(validation=ValidationConfig(metrics=names)), taken)

    return call


def test_numbers_of_several_functions(call):
    got = call({"a": 1, "b/c": np.float32(0.5)}, {"d.e-f": True}, {})
    assert got == {"a": 1.0, "b/c": 0.5, "d.e-f": 1.0}
    assert {type(value) for value in got.values()} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3.0], "f0 gave float, not a dict of names and numbers"),
        ([{"a": "1"}], "f0 gave str for a, not a number"),
        ([{"a": None}], "f0 gave NoneType for a, not a number"),
        ([{"a b": 1}], "f0 gave the name 'a b'; letters, digits and _ . / - are possible"),
        ([{1: 1}], "f0 gave the name 1; letters"),
        ([{"loss": 1}], "f0 gave loss, which there is already; call it otherwise"),
        ([{"a": 1}, {"a": 1}], "f1 gave a, which there is already; call it otherwise"),
    ],
)
def test_what_cannot_be_written(call, values, message):
    with pytest.raises(UserError, match="^validation.metrics: made_up_metrics:" + re.escape(message)):
        call(*values, taken={"loss"})


def load(algo, *words):
    return config_module.load(algo, None, ["model.path=m", "data.train=d", *words])


def test_keys(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for algo in ("sft", "cpt"):
        (tmp_path / "configs" / f"{algo}.yaml").write_text("model: {path: m}\n")
    monkeypatch.chdir(tmp_path)
    assert load("sft", "validation.metrics=a:b").validation.metrics == "a:b"
    best = load("sft", "validation.metrics=[a:b]", "checkpoint.best_metric=eval_mine").checkpoint.best_metric
    assert best == "eval_mine"
    for words, message in (
        (["sft", "checkpoint.best_metric=eval_mine"], "must be one of eval_loss, "),
        (["sft", "validation.metrics=a:b", "checkpoint.best_metric=mine"], "must be one of eval_loss, "),
        (["sft", "validation.metrics=[3]"], "must be package.module:name or a list of such"),
        (["cpt", "validation.metrics=a:b"], "needs rows with an answer; a block of text has none"),
    ):
        with pytest.raises(UserError, match=message):
            load(*words)
