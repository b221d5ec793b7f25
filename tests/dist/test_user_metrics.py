"""A user's own metric sees every row of a validation set once and in order, whatever the ranks and batches,
with the values that plain transformers give in fp64; what it returns counts as any other metric."""

from __future__ import annotations

import json
from zlib import crc32

import pytest
import torch

from tests import toy as t


def config(toy, tmp_path, algo, *functions, best=None, train=None, **validation):
    metrics = [f"tests.own_metrics:{function}" for function in functions]
    return t.config(
        toy,
        algo,
        tmp_path / "c.yaml",
        train={"max_steps": 2, **(train or {})},
        validation={"at_start": True, "at_end": True, "metrics": metrics, **validation},
        checkpoint={"every": None, "best_metric": best},
    )


def validations(run_dir):
    return [line for line in t.metrics(run_dir) if "eval_loss" in line]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 3])  # 7 rows in batches of 200 tokens; each rank has some
def test_every_row_of_dpo(ranks, toy, tmp_path, world_size):
    run = ranks.run(
        "dpo", config(toy, tmp_path, "dpo", "everything", "steps", best="eval_steps"), tmp_path.name,
        world_size=world_size,
    ).run_dir  # fmt: skip
    first, last = validations(run)
    rows = read(toy / "preference" / "validation.jsonl")
    assert first["eval_rows"] == len(rows) == 7
    store, model = t.stores(run)["validation"], t.model64(toy / "model")
    for i, row in enumerate(rows):
        assert first[f"eval_line/{i}"] == i + 1
        for s, side in enumerate(("chosen", "rejected")):
            at = f"{i}/{s}"
            assert first[f"eval_text/{at}"] == crc32((row["prompt"] + row[side]).encode())
            # the prompt as it was, but for a character that lies in the completion's first token
            assert 0 <= len(row["prompt"]) - first[f"eval_prompt/{at}"] <= 1
            with torch.no_grad():
                logp, _ = t.token_logprobs(model, *store.sequences(i)[s])
            assert first[f"eval_logp/{at}"] == pytest.approx(float(logp.sum()), rel=1e-5)
            assert first[f"eval_trained/{at}"] == len(logp)
            assert first[f"eval_ref/{at}"] == last[f"eval_ref/{at}"] == first[f"eval_logp/{at}"]
            assert first[f"eval_reward/{at}"] == 0
            difference = last[f"eval_logp/{at}"] - last[f"eval_ref/{at}"]
            assert last[f"eval_reward/{at}"] == pytest.approx(0.1 * difference, abs=1e-5)
    for s, side in enumerate(("chosen", "rejected")):
        mean = sum(last[f"eval_reward/{i}/{s}"] for i in range(7)) / 7
        assert mean == pytest.approx(last[f"eval_rewards/{side}"], rel=1e-4)
    assert json.loads((run / "checkpoints" / "BEST.json").read_text()) == {
        "step": 2,
        "metric": "eval_steps",
        "value": 2.0,
    }


def test_sft_with_a_limit_and_a_set_watched_beside(ranks, toy, tmp_path):
    """The sum over the rows is the loss; limit_val_batches shows the first 6 rows of 7 only."""
    path = toy / "sft" / "validation.jsonl"
    text = config(
        toy, tmp_path, "sft", "everything", train={"limit_val_batches": 1}, watch={"own": str(path)}
    )  # fmt: skip
    run = ranks.run("sft", text, tmp_path.name, world_size=2).run_dir
    for line in validations(run):
        assert line["eval_rows"] == line["eval_own_rows"] == 6
        trained = sum(line[f"eval_trained/{i}/0"] for i in range(6))
        logp = sum(line[f"eval_logp/{i}/0"] for i in range(6))
        assert line["eval_loss"] == pytest.approx(-logp / trained, rel=1e-5)
        assert "eval_reward/0/0" not in line


def test_an_error_in_it_ends_all_ranks(ranks, toy, tmp_path):
    job = ranks.start("sft", config(toy, tmp_path, "sft", "broken"), tmp_path.name, world_size=2)
    assert ranks.wait(job) == [78, 78]
    told = job.text()
    assert (
        "validation.metrics: tests.own_metrics:broken failed on the validation set at step 0: IndexError"
        in told
    )
    assert 'in broken: return {"third": float(rows.completions[0][2])}' in told
    assert "Traceback" not in told


def test_what_is_not_there_is_said_before_the_data(ranks, toy, tmp_path):
    code, told = ranks.fail(
        "sft", config(toy, tmp_path, "sft", "everythin"), tmp_path.name, "data.train=x.jsonl"
    )
    assert code == 78
    assert "validation.metrics: tests.own_metrics (" in told
    assert "has no everythin; did you mean everything?" in told
