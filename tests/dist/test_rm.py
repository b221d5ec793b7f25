"""Reward models through the trainer: against transformers in fp64, in any batches and on any ranks, resumed,
exported. The truth begins at the token store and at the head that a seed gives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from strop.models import reward
from strop.models.export import export_checkpoint, find_checkpoint
from strop.slurm import attempts
from tests import toy as t
from tests.dist.test_step import BATCHES, FREE, rows_of_step
from tools.convert_dcp_to_hf import read_config

GOLDEN = [
    0.9458337624867758,
    0.9354615211486816,
    1.372005005677541,
    0.9020739793777466,
    0.9742873509724935,
    1.09994109471639,
]
"""fp32 on an x86 CPU; other kernels round the last digits otherwise."""
CENTRE = 0.05


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    """The toy's pairs, two in three of them with a margin."""
    folder = tmp_path_factory.mktemp("margins")
    for name, count in (("training", t.NUM_TRAIN), ("validation", t.NUM_VALIDATION)):
        rows = t.preference_rows(count, name)
        t.write_jsonl(
            folder / f"{name}.jsonl",
            [row | ({"margin": 0.25 * (i % 5)} if i % 3 else {}) for i, row in enumerate(rows)],
        )
    return folder


def config(toy, data, path, **sections):
    sections.setdefault("rm", {"center_rewards_coefficient": CENTRE})
    sections["data"] = {"train": str(data), "max_length": 256} | sections.get("data", {})
    return t.config(toy, "rm", path, **sections)


def run(ranks, toy, data, tmp_path, name, world_size=1, words=(), **sections):
    file = config(toy, data, tmp_path / f"{name}.yaml", **sections)
    return ranks.run("rm", file, f"{tmp_path.name}-{name}", *words, world_size=world_size).run_dir


def model64(toy):
    """The toy's backbone, and the head of seed 42."""
    model = AutoModelForSequenceClassification.from_pretrained(
        toy / "model", num_labels=1, dtype=torch.float64, pad_token_id=None
    ).eval()
    lm = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float64)
    model.model.load_state_dict(lm.model.state_dict())
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(42)) / math.sqrt(65)
    model.score.weight = torch.nn.Parameter(head.double())
    return model


def scores_of(model, store, row):
    return torch.cat(
        [model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids, _ in store.sequences(row)]
    )


def truth(model, store, rows):
    """fp64 (mean loss over the pairs, scores [P, 2])."""
    losses, scores = [], []
    for row in rows:
        c, d = scores_of(model, store, row)
        margin = 0.0 if math.isnan(store.values_R[row]) else float(store.values_R[row])
        losses.append(-F.logsigmoid(c - d - margin) + CENTRE * (c + d) ** 2)
        scores.append([float(c.detach()), float(d.detach())])
    return torch.stack(losses).mean(), np.array(scores)


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_loss_and_gradient_of_a_step_equal_plain_fp64(ranks, toy, data, tmp_path, attention):
    """AdamW's first moment after one step is (1 - β1) times the gradient of every parameter."""
    run_dir = run(
        ranks, toy, data, tmp_path, "one", 2,
        train=FREE | {"max_steps": 1, "micro_batch_size": 2},
        model={"path": str(toy / "model"), "attention": attention},
    )  # fmt: skip
    store = t.stores(run_dir)["train"]
    assert [0.25 * (i % 5) if i % 3 else None for i in range(21)] == [
        None if math.isnan(v) else float(v) for v in store.values_R
    ]
    model = model64(toy)
    loss, _ = truth(model, store, rows_of_step(store, 0))
    loss.backward()
    assert t.metrics(run_dir)[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    choices = json.loads((run_dir / "data" / "choices.json").read_text())
    assert (choices["head"], choices["shared_prefix"]) == ("score", attention == "packed")
    assert "score.weight" in dict(model.named_parameters())
    t.assert_gradients(model, run_dir)


def test_ranks_micro_batches_padding_and_sharing_change_nothing(ranks, toy, data, tmp_path):
    """21 rows in batches of 6: the fourth step has 3 rows; two more steps are of the second epoch."""
    lines = []
    variants = [*BATCHES, (2, "padded")]
    for i, (world_size, train) in enumerate(variants):
        padded = train == "padded"
        run_dir = run(
            ranks, toy, data, tmp_path, f"v{i}", world_size,
            train={} if padded else train,
            model={"path": str(toy / "model"), "attention": "padded" if padded else "packed"},
            validation={"at_start": True, "at_end": True},
        )  # fmt: skip
        lines.append(t.metrics(run_dir))
    assert [line["step"] for line in lines[0]] == [0, 1, 2, 3, 4, 5, 6, 6]
    for other, variant in zip(lines[1:], variants[1:]):
        for a, b in zip(lines[0], other):
            tolerance = 1e-5 if a["step"] <= 1 else 5e-4
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), (variant, a["step"])


def test_metrics_are_exact_over_the_validation_set(ranks, toy, data, tmp_path):
    """Batches of 1, 3 and 7 rows, the last shared out to two ranks: means, and both extremes."""
    lines = []
    for size, world_size in ((1, 1), (3, 1), (7, 2)):
        train = {"max_steps": 1, "micro_batch_size": size}
        run_dir = run(
            ranks, toy, data, tmp_path, f"e{size}", world_size, train=train,
            validation={"at_start": True, "watch": {"again": str(data / "training.jsonl")}},
        )  # fmt: skip
        lines.append(t.metrics(run_dir)[0])
    stores = t.stores(run_dir)
    model = model64(toy)
    with torch.no_grad():
        for prefix, store in (("eval_", stores["validation"]), ("eval_again_", stores["again"])):
            loss, scores = truth(model, store, range(store.num_rows))
            c, d = scores.T
            expected = {
                "loss": float(loss), "accuracy": np.mean(c > d), "margin": np.mean(c - d),
                "min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max(),
            }  # fmt: skip
            assert 0 < expected["accuracy"] < 1
            for line in lines:
                for key, value in expected.items():
                    assert line[prefix + key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_interrupted_twice_equals_undisturbed(ranks, toy, data, tmp_path):
    sections = {
        "train": {"max_steps": 9, "micro_batch_size": 2},
        "validation": {"at_start": True, "every": 2},
        "checkpoint": {"every": 3, "best_metric": "eval_accuracy"},
    }
    whole = run(ranks, toy, data, tmp_path, "whole", 2, **sections)
    file = config(toy, data, tmp_path / "again.yaml", **sections)
    name = f"{tmp_path.name}-again"
    for stop_at in (7, 19):
        job = ranks.run("rm", file, name, world_size=2, stop_at=stop_at)
        assert attempts.read_all(job.run_dir)[-1]["state"] == "YIELD"
    job = ranks.run("rm", file, name, world_size=2)
    t.assert_equal_checkpoints(whole, job.run_dir, 9)
    assert (whole / "metrics.jsonl").read_bytes() == (job.run_dir / "metrics.jsonl").read_bytes()
    best = [json.loads((d / "checkpoints" / "BEST.json").read_text()) for d in (whole, job.run_dir)]
    assert best[0] == best[1]


def test_golden_loss_curve(ranks, toy, data, tmp_path):
    """The same model, pairs and seed give these losses; twice on one machine to the last bit."""
    optim = {"lr": 1e-4}  # a larger one would make more of the last digits of other kernels
    first, second = (run(ranks, toy, data, tmp_path, name, 2, optim=optim) for name in ("a", "b"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert [line["loss"] for line in t.metrics(first)] == pytest.approx(GOLDEN, rel=1e-6)


@pytest.fixture(scope="module")
def trained(ranks, toy, data, tmp_path_factory):
    """A run of six steps and its export in fp32."""
    work = tmp_path_factory.mktemp("trained")
    run_dir = run(ranks, toy, data, work, "run", 2, validation={"at_end": True})
    step = find_checkpoint(run_dir, "latest")
    export_checkpoint(step, read_config(run_dir / "config.yaml").model, work / "hf", dtype="fp32")
    return run_dir, work / "hf"


def test_export_loads_and_gives_the_trainers_scores(trained):
    """Padded to the left and to the right. In the toy's tokenizer the pad token is eos, which ends the rows:
    exported like that, every padded row would be scored one token too early."""
    run_dir, out = trained
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    facts = json.loads((out / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForSequenceClassification"]
    assert (model.config.num_labels, facts["problem_type"], facts["id2label"]) == (
        1,
        "regression",
        {"0": "LABEL_0"},
    )
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "generation_config.json").exists()
    store = t.stores(run_dir)["validation"]
    sequences = [ids.tolist() for row in range(store.num_rows) for ids, _ in store.sequences(row)]
    truth64 = AutoModelForSequenceClassification.from_pretrained(
        out, dtype=torch.float64, pad_token_id=None
    ).eval()
    with torch.no_grad():
        alone = torch.cat([truth64(torch.tensor([ids])).logits[0] for ids in sequences]).float()
        assert float(alone.std()) > 0.05
        for side in ("left", "right"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
            assert (batch["attention_mask"] == 0).any()
            assert torch.allclose(model(**batch).logits[:, 0], alone, rtol=1e-5, atol=1e-5), side
    line = t.metrics(run_dir)[-1]  # the same set by the trainer
    assert line["eval_mean_reward"] == pytest.approx(float(alone.mean()), rel=1e-5, abs=1e-5)
    assert line["eval_max_reward"] == pytest.approx(float(alone.max()), rel=1e-5, abs=1e-5)
    assert line["eval_accuracy"] == pytest.approx(float((alone[0::2] > alone[1::2]).float().mean()))


def test_exported_weights_are_the_checkpoints(trained):
    run_dir, out = trained
    saved = t.checkpoint(run_dir, 6)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved[f"model.{name}"], tensor), name


def test_the_pipeline_of_transformers_gives_scores_and_no_probabilities(trained):
    _, out = trained
    [answer] = pipeline("text-classification", model=str(out), device="cpu")(["the quick brown fox</s>"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        ids = tokenizer("the quick brown fox</s>", return_tensors="pt")
        score = AutoModelForSequenceClassification.from_pretrained(out)(**ids).logits[0, 0]
    assert answer["score"] == pytest.approx(float(score), abs=1e-5)


def test_a_reward_model_goes_on_from_a_reward_model(ranks, toy, data, tmp_path, trained):
    """Its head is loaded, not drawn: the first validation is the last one of the run that it comes from."""
    run_dir, out = trained
    model = {"path": str(out)}
    again = run(
        ranks,
        toy,
        data,
        tmp_path,
        "on",
        1,
        model=model,
        train={"max_steps": 1},
        validation={"at_start": True},
    )
    last, first = t.metrics(run_dir)[-1], t.metrics(again)[0]
    assert {k: v for k, v in first.items() if k != "step"} == pytest.approx(
        {k: v for k, v in last.items() if k != "step"}, rel=1e-5, abs=1e-6
    )
    out2 = tmp_path / "hf2"
    export_checkpoint(
        find_checkpoint(again, "1"), read_config(again / "config.yaml").model, out2, dtype="fp32"
    )
    assert json.loads((out2 / "config.json").read_text())["problem_type"] == "regression"


# ------------------------------------------------------------------------------------------ bad input

GOOD = {"prompt": "the fox", "chosen": "jumps", "rejected": "sleeps"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "it has the fields prompt, completion; needed: chosen and rejected",
        ),
        (GOOD | {"margin": "large"}, "margin is 'large', not a finite number"),
        (GOOD | {"margin": math.nan}, "margin is nan, not a finite number"),
        (GOOD | {"margin": True}, "margin is True, not a finite number"),
        (GOOD | {"margin": 1e39}, "margin is 1e+39, not a finite number"),
        (GOOD | {"margin": 65537}, "margin is 65537; scores would not count beside more than 65,536"),
        (GOOD | {"margin": -1e30}, "margin is -1e+30; scores would not count beside more than 65,536"),
    ],
)
def test_bad_rows(ranks, toy, tmp_path, row, message):
    file = t.write_jsonl(tmp_path / "rows.jsonl", [GOOD | {"margin": 1}, row])
    code, text = ranks.fail("rm", config(toy, file, tmp_path / "c.yaml"), f"{tmp_path.name}-bad")
    assert code == 78
    assert f"{file}, line 2: {message}" in text


def test_an_architecture_that_cannot_score(ranks, toy, tmp_path, data):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(toy / "model", folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "model_type": "granite"}))
    file = config(toy, data, tmp_path / "c.yaml", model={"path": str(folder)})
    code, text = ranks.fail("rm", file, f"{tmp_path.name}-granite")
    assert code == 78
    assert f"model.path: '{folder}' cannot become a reward model" in text
    assert "transformers has no GraniteForSequenceClassification" in text


def test_the_new_head_is_the_one_documented(toy):
    assert torch.equal(reward.new_head(64, 42).double(), model64(toy).score.weight)
