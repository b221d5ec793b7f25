"""Runs with adapters against formulas in fp64, on any number of ranks, in any batches, and interrupted.

The truth runs each sequence alone through transformers in fp64, adds s B A (mask x) to the outputs of its
linear layers by hooks, and draws the masks by an implementation of its own.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from strop.data import plan
from tests import toy as t
from tests.dist.lora_helpers import (
    LAYERS,
    LORA,
    Truth,
    run,
    step_loss,
    weights_of,
)

# --------------------------------------------------------------------------------------------- one step


CASES = [
    ("sft", 1, {}, {}),
    ("sft", 2, {"dropout": 0.3}, {}),
    ("dpo", 1, {"dropout": 0.3}, {}),
    ("dpo", 2, {}, {}),
    ("sft", 2, {"dropout": 0.3}, {"model": "padded"}),
    ("sft", 2, {"dropout": 0.3}, {"train": {"activation_checkpointing": "full"}}),
    ("sft", 3, {"targets": ["q_proj", "model.layers.1.mlp.up_proj"], "rank": 1, "alpha": 1.5}, {}),
    ("dpo", 2, {"targets": r".*layers\.0.*(k|down)_proj", "rslora": True, "alpha": 3.0}, {}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_second_step_equals_fp64(ranks, toy, tmp_path, case):
    """At the first one B is 0, and A has no gradient. AdamW's first moments of two steps give the second
    gradient. Rank 1 on three ranks leaves two of them without a piece of A."""
    algo, world_size, lora, other = CASES[case]
    lora = {**LORA, **lora}
    model = {"path": str(toy / "model"), "attention": other.get("model", "auto")}
    train = {"max_steps": 2, "max_grad_norm": None, "micro_batch_size": 2, **other.get("train", {})}
    run_dir = run(
        ranks, toy, tmp_path, algo, "two", world_size,
        lora=lora, model=model, train=train, checkpoint={"every": 1},
    )  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    scale = lora["alpha"] / (math.sqrt(lora["rank"]) if lora.get("rslora") else lora["rank"])
    truth = Truth(toy / "model", weights_of(before), scale, lora.get("dropout", 0.0))
    store = t.stores(run_dir)["train"]
    loss = step_loss(truth, store, algo, 1, t.model64(toy / "model"))
    loss.backward()
    line = t.metrics(run_dir)[1]
    assert line["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert abs(line["loss"] - t.metrics(run_dir)[0]["loss"]) > 1e-3
    norm = math.sqrt(sum(float(w.grad.square().sum()) for w in truth.weights.values()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert len(truth.weights) == {6: 2 * 3, 7: 2 * 2}.get(case, 28)
    for name, w in truth.weights.items():
        key = f"optim.{name}.exp_avg"
        ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
        assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max())), name
        assert w.grad.any()


def test_head_adapter_and_whole_modules_are_really_trained(ranks, untied, tmp_path):
    """Head by an adapter with dropout, the embedding and one norm whole; also the gradient of each."""
    whole = ["model.embed_tokens.weight", "model.norm.weight"]
    lora = LORA | {"targets": ["lm_head", "v_proj"], "modules_to_save": ["embed_tokens", "model.norm"]}
    run_dir = run(
        ranks, untied, tmp_path, "sft", "head", 2, lora=lora | {"dropout": 0.2},
        train={"max_steps": 2, "max_grad_norm": None, "micro_batch_size": 2}, checkpoint={"every": 1},
    )  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    truth = Truth(untied / "model", weights_of(before), p=0.2, whole=whole)
    loss = step_loss(truth, t.stores(run_dir)["train"], "sft", 1)
    loss.backward()
    assert t.metrics(run_dir)[1]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert sorted(truth.weights) == sorted(
        [*whole, *(f"{n}.lora_{x}.weight" for n in ("lm_head", *LAYERS[2::7]) for x in "AB")]
    )
    for name, w in truth.weights.items():
        key = f"optim.{name}.exp_avg"
        ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
        assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max())), name


def test_a_tied_embedding_trained_whole_is_the_head_too(ranks, toy, tmp_path):
    lora = LORA | {"modules_to_save": "embed_tokens"}
    run_dir = run(ranks, toy, tmp_path, "sft", "tied", 2, lora=lora, checkpoint={"every": 1},
                  train={"max_steps": 2, "max_grad_norm": None})  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    truth = Truth(toy / "model", weights_of(before), whole=["model.embed_tokens.weight"])
    loss = step_loss(truth, t.stores(run_dir)["train"], "sft", 1)
    loss.backward()
    assert t.metrics(run_dir)[1]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    w = truth.weights["model.embed_tokens.weight"]
    key = "optim.model.embed_tokens.weight.exp_avg"
    ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
    assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max()))


def test_a_is_drawn_from_seed_and_name(ranks, toy, tmp_path):
    """Nothing is learnt at a learning rate of 0, so the checkpoint holds what was drawn: by its formula, the
    same on any number of ranks, other numbers for another layer and another seed."""
    drawn = []
    for world_size, words in ((1, ()), (3, ()), (1, ("train.seed=43",))):
        run_dir = run(
            ranks, toy, tmp_path, "sft", f"drawn{len(drawn)}", world_size, words,
            train={"max_steps": 1}, optim={"lr": 0.0},
        )  # fmt: skip
        drawn.append(t.checkpoint(run_dir, 1))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0] if name.startswith("model."))
    seen = []
    for layer in LAYERS:
        a = drawn[0][f"model.{layer}.lora_A.weight"]
        seed = int.from_bytes(hashlib.sha256(f"42 {layer}".encode()).digest()[:8], "big") >> 1
        bound = a.shape[1] ** -0.5
        own = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed)) * 2 * bound - bound
        assert torch.allclose(a, own, atol=1e-6)
        assert not torch.equal(a, drawn[2][f"model.{layer}.lora_A.weight"])
        assert not drawn[0][f"model.{layer}.lora_B.weight"].any()
        assert not any(a.shape == b.shape and torch.equal(a, b) for b in seen)
        seen.append(a)


# --------------------------------------------------------------------------------- ranks, batches, rounds


@pytest.mark.parametrize("algo", ["dpo", "sft", "cpt"])
def test_ranks_and_batches_change_nothing_with_dropout(ranks, toy, tmp_path, algo):
    variants = [
        (1, {}, "packed"), (2, {}, "packed"), (4, {}, "packed"), (1, {"micro_batch_size": 1}, "packed"),
        (2, {"micro_batch_size": 2}, "padded"), (1, {"shared_prefix": False}, "packed"),
    ]  # fmt: skip
    lines = []
    for i, (world_size, train, attention) in enumerate(variants):
        run_dir = run(
            ranks, toy, tmp_path, algo, f"v{i}", world_size,
            lora=LORA | {"dropout": 0.4}, optim={"lr": 1e-3, "schedule": "constant"},
            train=train, model={"path": str(toy / "model"), "attention": attention},
            validation={"at_start": True, "at_end": True},
        )  # fmt: skip
        lines.append(t.metrics(run_dir))
    for other, variant in zip(lines[1:], variants[1:]):
        for a, b in zip(lines[0], other, strict=True):
            tolerance = 3e-6 if a["step"] <= 1 else 2e-4
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), (variant, a["step"])
    plain = run(ranks, toy, tmp_path, algo, "plain", optim={"lr": 1e-3, "schedule": "constant"},
                validation={"at_start": True, "at_end": True})  # fmt: skip
    without = t.metrics(plain)
    assert lines[0][3]["loss"] != pytest.approx(without[3]["loss"], rel=1e-5)
    assert lines[0][0] == pytest.approx(without[0], rel=2e-6, abs=2e-6)


def test_validation_drops_nothing(ranks, toy, tmp_path):
    """After a step in which adapters came to matter, the validation's loss is that of the weights."""
    run_dir = run(
        ranks, toy, tmp_path, "sft", "eval", 2,
        lora=LORA | {"dropout": 0.5}, train={"max_steps": 1}, validation={"at_end": True},
    )  # fmt: skip
    truth = Truth(toy / "model", weights_of(t.checkpoint(run_dir, 1)))
    store = t.stores(run_dir)["validation"]
    with torch.no_grad():
        logps = [x for row in range(store.num_rows) for x in truth.logps(store, row, 0)]
        before = [
            t.token_logprobs(t.model64(toy / "model"), *s)[0]
            for row in range(7)
            for s in store.sequences(row)
        ]
    found = t.metrics(run_dir)[-1]["eval_loss"]
    assert found == pytest.approx(float(-torch.cat(logps).mean()), rel=2e-6)
    assert abs(found + float(torch.cat(before).mean())) > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_dpo_begins_at_ln_2_with_the_reference_of_full_training(ranks, toy, tmp_path, precision, world_size):
    """h is 0 to the last bit, with dropout too, since B is 0; full training reads the very same file."""
    data = {"train": str(toy / "preference"), "max_length": 256}
    sections = {"train": {"precision": precision, "max_steps": 1}, "validation": {"at_start": True}}
    choices = []
    for name, lora in (("lora", LORA | {"dropout": 0.5}), ("full", {})):
        own = data | {"cache_dir": str(tmp_path / name)}
        run_dir = run(ranks, toy, tmp_path, "dpo", name, world_size, lora=lora, data=own, **sections)
        choices.append(json.loads((run_dir / "data" / "choices.json").read_text())["reference"])
        evaluation, first = t.metrics(run_dir)
        for line, prefix in ((evaluation, "eval_"), (first, "")):
            assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert line[f"{prefix}rewards/margins"] == line[f"{prefix}rewards/chosen"] == 0.0
    for kind in ("train", "validation"):
        a, b = (np.load(choice[kind]) for choice in choices)
        assert choices[0][kind].rpartition("/")[2] == choices[1][kind].rpartition("/")[2]
        assert np.array_equal(a, b, equal_nan=True)
        assert np.isfinite(a).any()


def test_another_model_as_reference(ranks, toy, tmp_path):
    """Its log-probs, not the base's; and the base's weights are back afterwards."""
    other = tmp_path / "other"
    torch.manual_seed(1)
    model = t.llama(t.model64(toy / "model").config.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(other)
    run_dir = run(
        ranks, toy, tmp_path, "dpo", "other", 2, train={"max_steps": 1}, dpo={"reference": str(other)}
    )
    store, base, reference = t.stores(run_dir)["train"], t.model64(toy / "model"), t.model64(other)
    losses = []
    for row in plan.step_rows(store.num_rows, 6, 42, 0):
        h = [
            t.token_logprobs(base, *seq)[0].sum() - t.token_logprobs(reference, *seq)[0].sum()
            for seq in store.sequences(row)
        ]
        losses.append(-F.logsigmoid(0.1 * (h[0] - h[1])))
    expected = float(torch.stack(losses).mean().detach())
    assert abs(expected - math.log(2)) > 1e-3
    assert t.metrics(run_dir)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_low_precision_follows_fp32(ranks, toy, tmp_path):
    """The first steps' losses within what the compute type rounds (fp16 11 bits, bf16 8)."""
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        run_dir = run(
            ranks, toy, tmp_path, "sft", precision, 2, train={"max_steps": 3, "precision": precision}
        )
        losses[precision] = [line["loss"] for line in t.metrics(run_dir)]
    assert losses["fp32"][2] < losses["fp32"][0] - 0.1
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=4e-3)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=3e-2)
