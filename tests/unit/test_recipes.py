"""A recipe: attributes in, one configuration file and one call of the submission out."""

import subprocess
import sys
import types

import pytest
import yaml

import strop
from strop.config import load
from strop.errors import UserError


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """Stands in for strop.submission and records its calls; the real one needs a cluster."""
    monkeypatch.chdir(tmp_path)
    calls = []
    fake = types.ModuleType("strop.submission")
    fake.submit = lambda algo, args, **options: calls.append((algo, args, options)) or "job"
    monkeypatch.setitem(sys.modules, "strop.submission", fake)
    return calls


def test_a_recipe_is_changed_by_attribute_and_submitted_once(submitted, tmp_path):
    r = strop.recipes.dpo(model="m", nodes=2, data=["a.jsonl", "b.jsonl"], max_steps=5, lr=1e-5)
    r.dpo.beta = 1
    r.config.train.precision = "bf16"
    r.metadata = {"team": "x"}
    assert (r.optim.lr, r.train.max_steps, r.train.seed) == (1e-5, 5, 42)
    assert r.submit(partition="long", dry_run=True) == "job"
    [(algo, args, options)] = submitted
    assert (algo, args[0]) == ("dpo", "--config")
    assert options == {"nodes": 2, "executor": "slurm", "wait": False, "dry_run": True, "partition": "long"}
    assert args[1].startswith(str(tmp_path / "runs" / ".recipes" / "dpo-"))
    with open(args[1]) as f:
        assert yaml.safe_load(f) == {
            "model": {"path": "m"},
            "data": {"train": ["a.jsonl", "b.jsonl"]},
            "train": {"max_steps": 5, "precision": "bf16"},
            "optim": {"lr": 1e-5},
            "dpo": {"beta": 1.0},
            "cluster": {"nodes": 2},
            "metadata": {"team": "x"},
        }
    c = load("dpo", args[1], [])
    assert (c.optim.lr, c.cluster.nodes, c.metadata) == (1e-5, 2, {"team": "x"})


def test_equal_recipes_share_a_file_and_different_ones_do_not(submitted):
    for lr in (1e-5, 1e-5, 2e-5):
        strop.recipes.sft(model="m", data="d", lr=lr).submit()
    files = [args[1] for _, args, _ in submitted]
    assert files[0] == files[1] != files[2]


def test_recipes_do_not_share_their_defaults():
    a, b = strop.recipes.dpo(), strop.recipes.dpo()
    a.optim.betas[0] = 0.5
    assert b.optim.betas == [0.9, 0.999]
    assert yaml.safe_load(a.to_yaml())["optim"] == {"betas": [0.5, 0.999]}


def test_mistakes_are_found_where_they_are_made(submitted):
    r = strop.recipes.dpo(model="m", data="d")
    with pytest.raises(
        UserError, match=r"^recipe: unknown key train.max_stpes; did you mean train.max_steps\?$"
    ):
        r.train.max_stpes = 3
    with pytest.raises(UserError, match=r"^recipe: optim.lr is 'fast', expected a number$"):
        r.optim.lr = "fast"
    with pytest.raises(AttributeError, match=r"^unknown key train.lr; did you mean optim.lr\?$"):
        _ = r.train.lr
    with pytest.raises(UserError, match=r"^recipe: train is a section"):
        r.train = 3
    with pytest.raises(
        UserError, match=r"^recipe: unknown argument epochs; expected one of data, limit_train"
    ):
        strop.recipes.dpo(model="m", epochs=3)
    r.dpo.loss = "kto"
    with pytest.raises(
        UserError, match=r"dpo.loss is 'kto'; it must be one of sigmoid, hinge, ipo, robust, "
    ):
        r.submit()
    assert submitted == []


def test_a_recipe_without_model_names_the_key(submitted):
    with pytest.raises(UserError, match=r"model.path is not set"):
        strop.recipes.dpo(data="d").submit()


def test_importing_strop_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import strop; print(sorted(set(sys.modules) - before))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": strop.__path__[0] + "/.."},
    )
    assert out.stdout.strip() == "['strop']"
