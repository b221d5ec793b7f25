"""A training step against plain transformers in fp64, on any number of ranks and in any batches."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from strop.data import plan
from tests import toy as t

FREE = {"max_grad_norm": None}
BATCHES = [
    (1, {}),
    (2, {}),
    (4, {}),  # 4 ranks, the last batch of an epoch has 3 rows: a rank has none
    (1, {"micro_batch_size": 1}),
    (2, {"micro_batch_size": 2}),
    (2, {"shared_prefix": False}),  # a pair's prompt twice; the toy's prompts pay, so elsewhere it is once
    (1, {"micro_batch_tokens": 1}),  # every row is longer: a batch of its own
    (1, {"micro_batch_tokens": 100000}),
]


def rows_of_step(store, step, batch=6, seed=42):
    return plan.step_rows(store.num_rows, batch, seed, step)


def dpo_truth(model, store, rows, h_of_reference=None, beta=0.1):
    """fp64 mean loss over the rows with the reference's sequence log-probs given, and what metrics hold."""
    sums, losses, margins, logps = [], [], [], []
    for row in rows:
        pair = [t.token_logprobs(model, *seq)[0].sum() for seq in store.sequences(row)]
        ref = [x.detach() for x in pair] if h_of_reference is None else h_of_reference[int(row)]
        h = (pair[0] - ref[0]) - (pair[1] - ref[1])
        losses.append(-F.logsigmoid(beta * h))
        margins.append(beta * h.detach())
        logps.append([float(x.detach()) for x in pair])
        sums.append([x.detach() for x in pair])
    return torch.stack(losses).mean(), margins, logps, dict(zip(map(int, rows), sums))


def sft_truth(model, store, rows):
    """fp64 mean over all trained tokens of the rows."""
    logp = torch.cat([t.token_logprobs(model, *seq)[0] for row in rows for seq in store.sequences(row)])
    return -logp.mean()


@pytest.mark.parametrize("algo", ["dpo", "sft"])
@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_loss_and_gradient_of_a_step_equal_plain_fp64(ranks, toy, tmp_path, algo, attention):
    """AdamW's first moment after one step is (1 - β1) times the gradient of every parameter."""
    run_dir = t.run(
        ranks, toy, tmp_path, algo, "one", 2,
        train=FREE | {"max_steps": 1, "micro_batch_size": 2},
        model={"path": str(toy / "model"), "attention": attention},
    )  # fmt: skip
    store = t.stores(run_dir)["train"]
    model = t.model64(toy / "model")
    model.zero_grad()
    rows = rows_of_step(store, 0)
    loss = dpo_truth(model, store, rows)[0] if algo == "dpo" else sft_truth(model, store, rows)
    loss.backward()
    line = t.metrics(run_dir)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    choices = json.loads((run_dir / "data" / "choices.json").read_text())
    assert choices["shared_prefix"] == (algo == "dpo" and attention == "packed")
    assert len(list(model.parameters())) == 20
    t.assert_gradients(model, run_dir)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_adamw_and_schedule_against_torch_in_fp64(ranks, toy, tmp_path):
    """Three SFT steps with warm-up, decay, clipping and weight decay, redone with torch's own AdamW."""
    optim = {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1, "min_lr_ratio": 0.1}
    run_dir = t.run(ranks, toy, tmp_path, "sft", "adamw", train={"max_steps": 4}, optim=optim)
    store = t.stores(run_dir)["train"]
    model = t.model64.__wrapped__(toy / "model")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], eps=1e-8
    )
    rates = [0.5e-3, 1e-3, 1e-3, 1e-3 * (0.1 + 0.9 * 0.5)]
    for step, rate in enumerate(rates):
        loss = sft_truth(model, store, rows_of_step(store, step))
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        line = t.metrics(run_dir)[step]
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    saved = t.checkpoint(run_dir, 4)
    for name, p in model.named_parameters():
        assert torch.allclose(saved[f"model.{name}"].double(), p, rtol=0, atol=2e-5), name


@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_ranks_micro_batches_and_padding_change_nothing(ranks, toy, tmp_path, algo):
    """21 rows in batches of 6: the fourth step has 3 rows; two more steps are of the second epoch."""
    validation = {"at_start": True, "at_end": True}
    weights = {"sft_loss_weight": 0.5} if algo == "dpo" else {}
    lines = []
    variants = [*BATCHES, (2, "padded")]
    for i, (world_size, train) in enumerate(variants):
        padded = train == "padded"
        run_dir = t.run(
            ranks, toy, tmp_path, algo, f"v{i}", world_size,
            train={} if padded else train,
            model={"path": str(toy / "model"), "attention": "padded" if padded else "packed"},
            validation=validation,
            dpo=weights,
        )  # fmt: skip
        lines.append(t.metrics(run_dir))
    first = lines[0]
    assert [line["step"] for line in first] == [0, 1, 2, 3, 4, 5, 6, 6]
    for other, variant in zip(lines[1:], variants[1:]):
        for a, b in zip(first, other):
            assert a.keys() == b.keys()
            # AdamW turns the rounding of small gradients into small differences of weights
            tolerance = 2e-6 if a["step"] <= 1 else 2e-4
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (
                    variant,
                    a["step"],
                    key,
                )


@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_fewer_rows_than_ranks(ranks, toy, tmp_path, algo):
    """Batches of one row on four ranks: three dummies each, which must not count."""
    train = {"global_batch_size": 1, "max_steps": 3}
    one, four = (
        t.metrics(t.run(ranks, toy, tmp_path, algo, f"w{w}", w, train=train, validation={"at_start": True}))
        for w in (1, 4)
    )
    for a, b in zip(one, four):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_step_0_of_dpo_is_ln_2(ranks, toy, tmp_path, precision, attention):
    """Policy and reference agree to the last bit: h is 0 for every pair, in training and validation."""
    run_dir = t.run(
        ranks, toy, tmp_path, "dpo", "zero", 2,
        train={"precision": precision, "max_steps": 1},
        validation={"at_start": True},
        model={"path": str(toy / "model"), "attention": attention},
    )  # fmt: skip
    evaluation, first = t.metrics(run_dir)
    assert (evaluation["step"], first["step"]) == (0, 1)
    for line, prefix in ((evaluation, "eval_"), (first, "")):
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-7)
        for name in ("chosen", "rejected", "margins", "accuracies"):
            assert line[f"{prefix}rewards/{name}"] == 0.0


def test_validation_metrics_are_exact_over_the_set(ranks, toy, tmp_path):
    """A reference other than the policy gives pairs on both sides of 0; 7 pairs in batches of 1 to 7."""
    other = tmp_path / "reference"
    torch.manual_seed(1)
    model = t.llama(t.model64(toy / "model").config.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(other)
    runs = [
        t.run(
            ranks,
            toy,
            tmp_path,
            "dpo",
            f"e{size}",
            world_size,
            train={"max_steps": 1, "micro_batch_size": size},
            dpo={"reference": str(other)},
            validation={"at_start": True},
        )
        for size, world_size in ((1, 1), (3, 1), (7, 2))
    ]
    store = t.stores(runs[0])["validation"]
    with torch.no_grad():
        references = dpo_truth(t.model64(other), store, range(store.num_rows))[3]
        loss, margins, logps, _ = dpo_truth(
            t.model64(toy / "model"), store, range(store.num_rows), references
        )
        entropies, correct, chosen_logits = [], [], []
        for row in range(store.num_rows):
            for i, (tokens, trained) in enumerate(store.sequences(row)):
                logits = t.token_logprobs(t.model64(toy / "model"), tokens, trained)[1]
                p = logits.softmax(-1)
                entropies += (-(p * p.log()).sum(-1)).tolist()
                correct += (logits.argmax(-1) == torch.from_numpy(tokens[trained])).tolist()
                chosen_logits += logits.mean(-1).tolist() if i == 0 else []
    accuracy = float(np.mean([float(m) > 0 for m in margins]))
    assert 0 < accuracy < 1
    expected = {
        "eval_loss": float(loss),
        "eval_rewards/margins": float(torch.stack(margins).mean()),
        "eval_rewards/accuracies": accuracy,
        "eval_logps/chosen": np.mean([c for c, _ in logps]),
        "eval_logps/rejected": np.mean([r for _, r in logps]),
        "eval_logits/chosen": np.mean(chosen_logits),
        "eval_entropy": np.mean(entropies),
        "eval_mean_token_accuracy": np.mean(correct),
    }
    for run_dir in runs:
        line = t.metrics(run_dir)[0]
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_hybrid_sharding_equals_plain(ranks, toy, tmp_path):
    """2 copies x 2 shards; the gradient is summed over both axes, its norm counts each weight once."""
    plain = t.run(ranks, toy, tmp_path, "dpo", "plain", 4, train={"max_steps": 3})
    hybrid = t.run(ranks, toy, tmp_path, "dpo", "hybrid", 4, train={"max_steps": 3}, dist={"shard_size": 2})
    for a, b in zip(t.metrics(plain), t.metrics(hybrid), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    left, right = t.checkpoint(plain, 3), t.checkpoint(hybrid, 3)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # other kernels
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(ranks, toy, tmp_path, mode, precision):
    common = {"max_steps": 2, "precision": precision}
    plain = t.run(ranks, toy, tmp_path, "dpo", "none", 2, train=common)
    other = t.run(ranks, toy, tmp_path, "dpo", mode, 2, train={**common, "activation_checkpointing": mode})
    t.assert_equal_checkpoints(plain, other, 2)
    assert (plain / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_num_tokens_and_epoch(ranks, toy, tmp_path):
    """Counted by hand from the store: prompts count as seen tokens."""
    run_dir = t.run(ranks, toy, tmp_path, "sft", "count", 2)
    store = t.stores(run_dir)["train"]
    seen = 0
    for line in t.metrics(run_dir):
        seen += int(store.row_lengths[rows_of_step(store, line["step"] - 1)].sum())
        assert line["num_tokens"] == seen
        assert line["epoch"] == line["step"] / 4
    state = json.loads((run_dir / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["num_tokens"] == seen
