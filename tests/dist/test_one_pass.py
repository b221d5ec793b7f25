"""Training where each micro batch's head is taken in parts, beside plain transformers in fp64 and the same
training with everything kept: on several ranks, with sharded and tied weights, and interrupted."""

from __future__ import annotations

import pytest
import torch

from strop.slurm import attempts
from tests import toy as t
from tests.dist.test_resume import assert_equal_runs
from tests.dist.test_step import FREE, dpo_truth, rows_of_step, sft_truth

VOCAB = 420
MOST = {"dpo": 24, "sft": 8, "cpt": 20, "kto": 12}
"""Tokens whose exponentials are kept: some pairs and rows fit, some do not, few micro batches do."""
KINDS = {
    "sft": ("sft", {}),
    "cpt": ("cpt", {}),
    "dpo": ("dpo", {"dpo": {"sft_loss_weight": 0.5}}),
    "twice": ("dpo", {"train": {"shared_prefix": False}}),
    "bco": ("dpo", {"dpo": {"loss": "bco_pair"}}),
    "orpo": ("dpo", {"dpo": {"loss": "orpo", "beta": 0.5}}),
    "simpo": ("dpo", {"dpo": {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0}}),
    "kto": ("kto", {"kto": {"desirable_weight": 1.5}}),
}


def start(ranks, toy, tmp_path, algo, name, world_size, *, in_parts=True, stop_at=None, **sections):
    config = t.config(toy, algo, tmp_path / f"{name}.yaml", **sections)
    size = 2 if sections["train"].get("precision") == "bf16" else 4
    kept_bytes = MOST[algo] * VOCAB * size if in_parts else 2**40
    run = f"{tmp_path.name}-{name}"
    job = ranks.run(algo, config, run, world_size=world_size, kept_bytes=kept_bytes, stop_at=stop_at)
    if stop_at is None:
        assert (max(parts_of(job), default=0) > 1) == in_parts
    return job


def parts_of(job, rank=0):
    return [int(line[len("parts: ") :]) for line in job.text(rank).splitlines() if line.startswith("parts: ")]


@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_loss_and_gradient_of_a_step_equal_plain_fp64(ranks, toy, tmp_path, algo):
    """Two ranks, two micro batches each; AdamW's first moment is (1 - β1) times the gradient."""
    train = FREE | {"max_steps": 1, "micro_batch_size": 2}
    job = start(ranks, toy, tmp_path, algo, "parts", 2, train=train)
    store, model = t.stores(job.run_dir)["train"], t.model64.__wrapped__(toy / "model")
    rows = rows_of_step(store, 0)
    loss = dpo_truth(model, store, rows)[0] if algo == "dpo" else sft_truth(model, store, rows)
    loss.backward()
    assert t.metrics(job.run_dir)[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    saved = t.checkpoint(job.run_dir, 1)
    for name, p in model.named_parameters():
        ours = saved[f"optim.{name}.exp_avg"].double() / 0.1
        assert torch.allclose(ours, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_change_nothing(ranks, toy, tmp_path, kind):
    """Three steps: gradients and metrics of the first, and what follows from them."""
    algo, sections = KINDS[kind]
    sections = {**sections, "train": {"max_steps": 3, **sections.get("train", {})}}
    whole = start(ranks, toy, tmp_path, algo, "whole", 2, in_parts=False, **sections)
    parts = start(ranks, toy, tmp_path, algo, "parts", 2, **sections)
    for a, b in zip(t.metrics(whole.run_dir), t.metrics(parts.run_dir), strict=True):
        tolerance = 1e-5 if a["step"] == 1 else 2e-4
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    left, right = t.checkpoint(whole.run_dir, 3), t.checkpoint(parts.run_dir, 3)
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-5), name


def test_hybrid_sharding(ranks, toy, tmp_path):
    """2 copies x 2 shards."""
    train = {"max_steps": 2}
    whole = start(ranks, toy, tmp_path, "dpo", "whole", 1, in_parts=False, train=train)
    parts = start(ranks, toy, tmp_path, "dpo", "parts", 4, train=train, dist={"shard_size": 2})
    for a, b in zip(t.metrics(whole.run_dir), t.metrics(parts.run_dir), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_interrupted_equals_undisturbed(ranks, toy, tmp_path, algo):
    """Bit for bit, in bf16."""
    sections = {
        "train": {"max_steps": 8, "micro_batch_size": 2, "precision": "bf16"},
        "validation": {"at_start": True, "every": 2, "at_end": True},
        "checkpoint": {"every": 2, "best_metric": "eval_loss"},
    }
    whole = start(ranks, toy, tmp_path, algo, "whole", 2, **sections)
    for stop_at in (9, 7):
        start(ranks, toy, tmp_path, algo, "cut", 2, stop_at=stop_at, **sections)
    job = start(ranks, toy, tmp_path, algo, "cut", 2, **sections)
    steps = [record["step"] for record in attempts.read_all(job.run_dir)]
    assert 0 < steps[0] < steps[1] < steps[2] == 8
    assert_equal_runs(whole.run_dir, job.run_dir, 8)
