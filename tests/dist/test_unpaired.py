"""KTO, SimPO, ORPO and BCO against plain transformers in fp64, on any number of ranks, and their resumes.

The truth of KTO begins at the rows: it tokenises them itself, and pairs prompts with other rows' completions
by arithmetic of its own.
"""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from strop.data import plan
from strop.slurm import attempts
from tests import toy as t
from tests.dist.test_resume import assert_equal_runs
from tests.unit.data_helpers import tiny_tokenizer

VARIANTS = [
    (1, {}),
    (2, {"micro_batch_size": 1}),
    (4, {}),  # the last batch of an epoch has 3 rows: a rank has none
    (1, {"micro_batch_tokens": 1}),  # every row is a batch of its own
    (2, "padded"),
]
LOSSES = {
    "kto": ("kto", {"kto": {"desirable_weight": 1.5}}),
    "simpo": ("dpo", {"dpo": {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0}}),
    "orpo": ("dpo", {"dpo": {"loss": "orpo", "beta": 0.5}}),
    "bco": ("dpo", {"dpo": {"loss": "bco_pair"}}),
}
GOLDEN = {
    "kto": [
        0.7083333333333334,
        0.6490888992945353,
        0.6771323482195536,
        0.5359664162000021,
        0.4066188732783,
        0.33918291330337524,
    ],
    "simpo": [
        1.653717080752055,
        1.3113363981246948,
        1.4980470339457195,
        2.630627910296122,
        0.29665498932202655,
        0.1937509427467982,
    ],
    "orpo": [
        7.864626884460449,
        7.549138069152832,
        7.272050539652507,
        8.263977209726969,
        5.5586598714192705,
        6.041275342305501,
    ],
    "bco": [
        1.3862943649291992,
        1.3476529121398926,
        1.3785957495371501,
        1.319419264793396,
        0.7193159262339274,
        0.44273610909779865,
    ],
}
"""fp32 on an x86 CPU; other kernels round the last digits otherwise (1.5e-6 was seen)."""


@pytest.fixture
def other(toy, tmp_path):
    """A reference that is not the policy, and from which it has moved: z0 is above 0."""
    model = t.llama(t.model64(toy / "model").config.vocab_size)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(tmp_path / "reference")
    return tmp_path / "reference"


def labelled(path):
    """[(prompt ids, completion ids with EOS, label)]."""
    tokenizer = tiny_tokenizer()
    rows = []
    for row in map(json.loads, path.read_text().splitlines()):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        assert whole[: len(prompt)] == prompt
        rows.append((prompt, [*whole[len(prompt) :], tokenizer.eos_token_id], row["label"]))
    return rows


def logp(model, prompt, completion):
    """fp64 sum of the completion's log-probs."""
    tokens = np.array(prompt + completion)
    return t.token_logprobs(model, tokens, np.arange(len(tokens)) >= len(prompt))[0].sum()


def kto_truth(model, reference, rows, chosen, beta=0.1, weights=(1.0, 1.0), z0=None):
    """(mean loss over the rows `chosen`, z0, rewards) in fp64; z0 measured unless given."""
    policy = [logp(model, *rows[i][:2]) for i in chosen]
    with torch.no_grad():
        ref = [logp(reference, *rows[i][:2]) for i in chosen]
        shift = round(len(rows) * (3 - math.sqrt(5)) / 2)  # the golden section
        drift = 0.0
        for i in chosen:
            pair = rows[i][0], rows[(i + shift) % len(rows)][1]
            drift += float(logp(model, *pair) - logp(reference, *pair)) / len(chosen)
    z0 = max(0.0, drift) if z0 is None else z0
    losses = []
    for i, p, q in zip(chosen, policy, ref):
        v = torch.sigmoid(beta * (p - q - z0)) if rows[i][2] else torch.sigmoid(beta * (z0 - (p - q)))
        losses.append(weights[0 if rows[i][2] else 1] * (1 - v))
    rewards = [(beta * float((p - q).detach()), rows[i][2]) for i, p, q in zip(chosen, policy, ref)]
    return torch.stack(losses).mean(), z0, rewards


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_step_equals_plain_fp64(ranks, toy, tmp_path, other, loss, attention):
    run_dir = t.run(
        ranks, toy, tmp_path, "kto", "one", 2,
        train={"max_grad_norm": None, "max_steps": 1, "micro_batch_size": 2},
        model={"path": str(toy / "model"), "attention": attention},
        kto={"loss": loss, "reference": str(other), "desirable_weight": 1.3, "undesirable_weight": 0.7},
        validation={"at_start": True},
    )  # fmt: skip
    model, reference = copy.deepcopy(t.model64(toy / "model")), t.model64(other)
    fixed = 0.0 if loss == "apo_zero_unpaired" else None
    options = {"weights": (1.3, 0.7), "z0": fixed}
    evaluation, line = t.metrics(run_dir)
    rows = labelled(toy / "unpaired" / "training.jsonl")
    value, z0, rewards = kto_truth(model, reference, rows, plan.step_rows(21, 6, 42, 0), **options)
    value.backward()
    assert z0 > 0 or fixed == 0.0
    assert line["loss"] == pytest.approx(float(value.detach()), rel=1e-6)
    assert line["kl"] == pytest.approx(z0, rel=1e-5)
    good, bad = ([r for r, label in rewards if label == side] for side in (True, False))
    assert line["rewards/chosen"] == pytest.approx(np.mean(good), rel=1e-5)
    assert line["rewards/rejected"] == pytest.approx(np.mean(bad), rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(np.mean(good) - np.mean(bad), rel=1e-5)
    t.assert_gradients(model, run_dir)
    # validation: z0 is that of the whole set
    rows = labelled(toy / "unpaired" / "validation.jsonl")
    with torch.no_grad():
        value, z0, _ = kto_truth(model, reference, rows, range(7), **options)
    assert evaluation["eval_loss"] == pytest.approx(float(value), rel=1e-6)
    assert evaluation["eval_kl"] == pytest.approx(z0, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_0_of_kto_is_one_half(ranks, toy, tmp_path, precision):
    """Policy and reference agree to the last bit, also on mismatched completions."""
    run_dir = t.run(
        ranks, toy, tmp_path, "kto", "zero", 2,
        train={"precision": precision, "max_steps": 1}, validation={"at_start": True},
    )  # fmt: skip
    for line, prefix in zip(t.metrics(run_dir), ("eval_", "")):
        assert [line[prefix + name] for name in ("loss", "kl", "rewards/chosen", "rewards/rejected")] == [
            0.5, 0.0, 0.0, 0.0,
        ]  # fmt: skip


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_equal_plain_fp64(ranks, toy, tmp_path, loss):
    algo, sections = LOSSES[loss]
    run_dir = t.run(
        ranks, toy, tmp_path, algo, "one", 2,
        train={"max_grad_norm": None, "max_steps": 1, "micro_batch_size": 2}, **sections,
    )  # fmt: skip
    assert "reference" not in json.loads((run_dir / "data" / "choices.json").read_text())
    assert not list((run_dir.parent / ".cache").glob("reference-*partial*"))
    model, store = copy.deepcopy(t.model64(toy / "model")), t.stores(run_dir)["train"]
    losses = []
    for row in plan.step_rows(21, 6, 42, 0):
        c, d = (t.token_logprobs(model, *sequence)[0].mean() for sequence in store.sequences(row))
        if loss == "simpo":
            losses.append(-torch.log(torch.sigmoid(2.0 * (c - d) - 1.0)))
        else:
            odds_c, odds_d = (x.exp() / (1 - x.exp()) for x in (c, d))
            losses.append(-c - 0.5 * torch.log(torch.sigmoid(torch.log(odds_c / odds_d))))
    value = torch.stack(losses).mean()
    value.backward()
    assert t.metrics(run_dir)[0]["loss"] == pytest.approx(float(value.detach()), rel=1e-6)
    t.assert_gradients(model, run_dir)


def test_bco_compares_rewards_with_their_mean_so_far(ranks, toy, tmp_path):
    """The third step, redone in fp64 from the checkpoints of the first two: δ is the mean of all rewards of
    those steps, and the state carries their sum."""
    run_dir = t.run(
        ranks, toy, tmp_path, "dpo", "bco", 2,
        train={"max_steps": 3}, dpo={"loss": "bco_pair", "beta": 0.5},
        checkpoint={"every": 1, "keep_last": 9},
    )  # fmt: skip
    store, initial = t.stores(run_dir)["train"], t.model64(toy / "model")
    ratios = []
    for step in range(3):
        model = copy.deepcopy(initial)
        if step:
            saved = t.checkpoint(run_dir, step)
            model.load_state_dict(
                {k[6:]: v.double() for k, v in saved.items() if k.startswith("model.")}, strict=False
            )
        with torch.no_grad():
            sides = [
                [float((t.token_logprobs(model, *s)[0] - t.token_logprobs(initial, *s)[0]).sum())
                 for s in store.sequences(row)]
                for row in plan.step_rows(21, 6, 42, step)
            ]  # fmt: skip
        ratios.append(0.5 * np.array(sides))
    delta = np.mean(ratios[:2])
    assert abs(delta) > 0.01
    losses = np.log1p(np.exp(delta - ratios[2][:, 0])) + np.log1p(np.exp(ratios[2][:, 1] - delta))
    assert t.metrics(run_dir)[2]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    state = json.loads((run_dir / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["num_rewarded"] == 18
    assert state["reward_sum"] == pytest.approx(6 * sum(r.mean() for r in ratios), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_micro_batches_and_padding_change_nothing(ranks, toy, tmp_path, loss):
    """21 rows in batches of 6: the fourth step has 3 rows; two more steps are of the second epoch."""
    algo, sections = LOSSES[loss]
    lines = []
    for i, (world_size, train) in enumerate(VARIANTS):
        padded = train == "padded"
        run_dir = t.run(
            ranks, toy, tmp_path, algo, f"v{i}", world_size,
            train={} if padded else train,
            model={"path": str(toy / "model"), "attention": "padded" if padded else "packed"},
            validation={"at_start": True, "at_end": True}, **sections,
        )  # fmt: skip
        lines.append(t.metrics(run_dir))
    assert [line["step"] for line in lines[0]] == [0, 1, 2, 3, 4, 5, 6, 6]
    for other_lines, variant in zip(lines[1:], VARIANTS[1:]):
        for a, b in zip(lines[0], other_lines, strict=True):
            # AdamW turns the rounding of small gradients into small differences of weights
            tolerance = 2e-6 if a["step"] <= 1 else 5e-4
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), (variant, a["step"])


@pytest.mark.parametrize("loss", LOSSES)
def test_golden_loss_curve(ranks, toy, tmp_path, loss):
    """The same model, rows and seed give these losses; twice on one machine to the last bit."""
    algo, sections = LOSSES[loss]
    first, second = (t.run(ranks, toy, tmp_path, algo, name, 2, **sections) for name in ("a", "b"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert [line["loss"] for line in t.metrics(first)] == pytest.approx(GOLDEN[loss], rel=1e-5)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_interrupted_again_and_again_equals_undisturbed(ranks, toy, tmp_path, loss):
    """Stopped a little later each time: within the passes of reference and baseline too."""
    algo, sections = LOSSES[loss]
    sections = sections | {
        "train": {"max_steps": 6, "micro_batch_size": 2},
        "validation": {"at_start": True, "every": 2, "at_end": True},
        "checkpoint": {"every": 3, "best_metric": "eval_loss"},
        "data": {
            "train": str(toy / t.FOLDERS[algo]),
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 256,
        },
    }
    whole = t.run(ranks, toy, tmp_path, algo, "whole", 2, **sections)
    for path in (tmp_path / "cache").glob("reference-*"):  # so that the reference pass is stopped as well
        path.unlink()
    config = t.config(toy, algo, tmp_path / "again.yaml", **sections)
    name, steps = f"{tmp_path.name}-again", set()
    for stop_at in range(4, 60, 2):
        job = ranks.run(algo, config, name, world_size=2, stop_at=stop_at)
        record = attempts.read_all(job.run_dir)[-1]
        steps.add(record["step"])
        if record["state"] == "DONE":
            break
    assert record["state"] == "DONE"
    assert len(steps) > 3
    assert_equal_runs(whole, job.run_dir, 6)


def test_pairs_are_taken_apart(ranks, toy, tmp_path):
    """The same rows as pairs and one by one: the same store content, the same losses."""
    pairs = t.preference_rows(9, "pairs")
    halves = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    lines = []
    for name, rows in (("pairs", pairs), ("halves", halves)):
        path = t.write_jsonl(tmp_path / f"{name}.jsonl", rows)
        data = {"train": str(path), "max_length": 256}
        lines.append(t.metrics(t.run(ranks, toy, tmp_path, "kto", name, data=data)))
    assert lines[0] == lines[1]
    assert lines[0][-1]["loss"] < 0.49


def test_what_kto_refuses_and_what_it_tells(ranks, toy, tmp_path):
    """A row without a label, one row, a set to watch; and all rows desirable, which trains with a warning."""
    rows = [{"prompt": f"{i} the", "completion": " fox", "label": True} for i in range(4)]
    bad = [{**rows[0], "label": "yes"}, *rows]
    for name, lines, words, expected in (
        ("text", bad, [], f"{tmp_path / 'text.jsonl'}, line 1: label is 'yes'; it must be true or false"),
        ("one", rows[:1], [], "the train set has one usable row, and kto.loss=kto compares each with"),
        ("watch", rows, [f"validation.watch={{a: {tmp_path / 'watch.jsonl'}}}"], "watch: not for KTO"),
    ):
        data = {"train": str(t.write_jsonl(tmp_path / f"{name}.jsonl", lines)), "max_length": 64}
        config = t.config(toy, "kto", tmp_path / f"{name}.yaml", data=data)
        code, text = ranks.fail("kto", config, f"{tmp_path.name}-{name}", *words, world_size=2)
        assert (code, expected in text) == (78, True), text
    data["train"] = str(tmp_path / "watch.jsonl")
    job = ranks.run("kto", t.config(toy, "kto", tmp_path / "all.yaml", data=data), f"{tmp_path.name}-all")
    assert "all 4 rows are desirable" in job.text()
    assert "rewards/margins" not in t.metrics(job.run_dir)[0]
    data["train"] = str(tmp_path / "one.jsonl")
    config = t.config(toy, "kto", tmp_path / "apo.yaml", data=data)
    ranks.run("kto", config, f"{tmp_path.name}-apo", "kto.loss=apo_zero_unpaired")
