"""NEFTune, blends of rows and cut rows: ranks, packing and stops change nothing about them.

The truth of a step is plain transformers in fp64 on one sequence at a time, as in test_step.py; the noise is
taken from its own unit test's function of (seed, step, row, position, channel).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from strop.data import plan
from strop.slurm import attempts
from tests import toy as t
from tests.unit.test_neftune import draw

ALPHA = 5.0


def noisy_logprobs(model, tokens, trained, row, step):
    """fp64 log-probs of the trained tokens with NEFTune's noise on the embeddings."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    embeddings = model.get_input_embeddings()(ids)
    n, hidden = embeddings.shape
    size = ALPHA / math.sqrt(n * hidden)
    noise = [[size * draw(42, step, row, p, h) for h in range(hidden)] for p in range(n)]
    where = torch.from_numpy(np.array(trained)).nonzero()[:, 0]
    logits = model(inputs_embeds=(embeddings + torch.tensor(noise, dtype=torch.float64))[None]).logits[0]
    return torch.log_softmax(logits[where - 1], dim=-1).gather(1, ids[where][:, None])[:, 0]


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_a_step_with_noise_equals_plain_fp64(ranks, toy, tmp_path, attention):
    """Loss and gradient of the first step; validation is without noise."""
    validation = {"at_start": True}
    plain, noisy = (
        t.run(
            ranks, toy, tmp_path, "sft", name, 2,
            train={"max_grad_norm": None, "max_steps": 1, "micro_batch_size": 2},
            model={"path": str(toy / "model"), "attention": attention},
            validation=validation,
            sft={"neftune_alpha": alpha},
        )
        for name, alpha in (("plain", None), ("noisy", ALPHA))
    )  # fmt: skip
    store = t.stores(noisy)["train"]
    model = t.model64(toy / "model")
    model.zero_grad()
    rows = plan.step_rows(store.num_rows, 6, 42, 0)
    logps = [noisy_logprobs(model, *seq, int(row), 0) for row in rows for seq in store.sequences(row)]
    loss = -torch.cat(logps).mean()
    loss.backward()
    first, line = t.metrics(noisy)
    assert first == t.metrics(plain)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert abs(line["loss"] - t.metrics(plain)[1]["loss"]) > 1e-3
    t.assert_gradients(model, noisy)


@pytest.fixture
def blend(toy, tmp_path):
    """Two sources of rows, the smaller one with the larger share; short epochs, noise, cut prompts."""
    pairs = t.preference_rows(5, "own")
    own = {
        "dpo": t.write_jsonl(tmp_path / "own-dpo.jsonl", pairs),
        "sft": t.write_jsonl(
            tmp_path / "own-sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
        ),
    }

    def sections(algo):
        train = [str(toy / t.FOLDERS[algo] / "training.jsonl"), str(own[algo])]
        return {
            "data": {
                "train": train,
                "weights": [1, 2],
                "max_length": 50,
                "over_length": "truncate_prompt_left",
            },
            "train": {"max_steps": 9, "micro_batch_size": 2},
            "sft": {"neftune_alpha": ALPHA},
            "optim": {"schedule": "wsd", "decay_steps": 3, "warmup_steps": 2},
            "checkpoint": {"every": 4},
        }

    return sections


@pytest.mark.parametrize("algo", ["sft", "dpo"])
def test_interrupted_twice_equals_undisturbed(ranks, toy, tmp_path, blend, algo):
    """Nine steps are two epochs; DPO has a reference for the rows of the second one too."""
    whole = t.run(ranks, toy, tmp_path, algo, "whole", 2, **blend(algo))
    config = t.config(toy, algo, tmp_path / "again.yaml", **blend(algo))
    name = f"{tmp_path.name}-again"
    for stop_at in (9, 7):
        job = ranks.run(algo, config, name, world_size=2, stop_at=stop_at)
        last = attempts.read_all(job.run_dir)[-1]
        assert (last["state"], 0 < last["step"] < 9) == ("YIELD", True)
    job = ranks.run(algo, config, name, world_size=2)
    t.assert_equal_checkpoints(whole, job.run_dir, 9)
    assert (whole / "metrics.jsonl").read_bytes() == (job.run_dir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("algo", ["sft", "dpo"])
def test_ranks_and_micro_batches_change_nothing(ranks, toy, tmp_path, blend, algo):
    lines = []
    for world_size, size in ((1, 6), (2, 1), (3, 2)):
        sections = blend(algo)
        sections["train"]["micro_batch_size"] = size
        lines.append(t.metrics(t.run(ranks, toy, tmp_path, algo, f"w{world_size}", world_size, **sections)))
    for other in lines[1:]:
        for a, b in zip(lines[0], other, strict=True):
            assert a == pytest.approx(b, rel=5e-4, abs=5e-4)


@pytest.mark.parametrize("algo", ["sft", "dpo"])
def test_rows_of_a_blend_are_those_of_the_plan(ranks, toy, tmp_path, blend, algo):
    """26 rows an epoch, 9 of the first source (1/3 of 26 is 8.67) and 17 of the second; counted by tokens."""
    run_dir = t.run(ranks, toy, tmp_path, algo, "count", 2, **blend(algo))
    store = t.stores(run_dir)["train"]
    assert store.part_rows == (t.NUM_TRAIN, 5)
    seen, drawn = 0, []
    for line in t.metrics(run_dir):
        slots = plan.step_rows(26, 6, 42, line["step"] - 1)
        rows = plan.blend(slots, (21, 5), (1, 2), 42, (line["step"] - 1) // 5)
        drawn.append(rows)
        seen += int(store.row_lengths[rows].sum())
        assert line["num_tokens"] == seen
    epoch = np.concatenate(drawn[:5])
    assert ((epoch < 21).sum(), (epoch >= 21).sum()) == (9, 17)
    counts = np.bincount(epoch, minlength=26)
    assert set(counts[:21]) == {0, 1}
    assert sorted(counts[21:]) == [3, 3, 3, 4, 4]


def test_dpo_with_limited_epochs_has_a_reference_for_every_row(ranks, toy, tmp_path):
    """Two steps an epoch: the second epoch's rows are others than the first one's."""
    run_dir = t.run(ranks, toy, tmp_path, "dpo", "limit", 2, train={"max_steps": 6, "limit_train_batches": 2})
    assert all(math.isfinite(line["loss"]) for line in t.metrics(run_dir))
    store = t.stores(run_dir)["train"]
    rows = [plan.step_rows(store.num_rows, 6, 42, step, 2) for step in range(6)]
    assert len({int(r) for own in rows[2:] for r in own} - {int(r) for own in rows[:2] for r in own}) > 0


def test_a_blend_without_rows_of_an_entry(ranks, toy, tmp_path):
    own = t.write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "completion": "b " * 300}])
    train = [str(toy / "sft" / "training.jsonl"), str(own)]
    data = {"train": train, "weights": [1, 1], "max_dropped_fraction": 0.5}
    config = t.config(toy, "sft", tmp_path / "c.yaml", data=data)
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-none")
    assert code == 78
    assert f"data.train: no row of {own} is left, which data.weights counts on" in text
    config = t.config(toy, "sft", tmp_path / "d.yaml", data={**data, "train": [train[0], train[0]]})
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-twice")
    assert code == 78
    assert f"data.train names {train[0]} twice" in text
    data = {"train": [train[0], str(toy / "sft" / "validation.jsonl")], "weights": [1, 1e-6]}
    config = t.config(toy, "sft", tmp_path / "e.yaml", data=data)
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-less")
    assert code == 78
    assert "data.weights: 1e-06 of an epoch of 28 rows is less than one row" in text
