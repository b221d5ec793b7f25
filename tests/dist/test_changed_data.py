"""Data that changed since a run began: a resume on other rows, a store written to while ranks read it."""

from __future__ import annotations

import json
import time

import pytest

from strop.slurm import attempts
from tests import toy as t

STEPS = {"max_steps": 3, "micro_batch_size": 2}


@pytest.fixture
def own(toy, tmp_path):
    """(rows that a test may change, configuration of a run on them)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((toy / "sft" / "training.jsonl").read_bytes())
    data = {"train": str(rows), "max_length": 256, "cache_dir": str(tmp_path / "cache")}
    config = t.config(toy, "sft", tmp_path / "c.yaml", train=STEPS, data=data, checkpoint={"every": 1})
    return rows, config


def turn_round(rows):
    """Other rows in a file of the same size."""
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))


def test_a_resume_on_other_rows_is_refused(ranks, own, tmp_path):
    rows, config = own
    name = tmp_path.name
    job = ranks.run("sft", config, name)
    as_it_was = rows.read_text()
    turn_round(rows)
    code, text = ranks.fail("sft", config, name, "train.max_steps=6")
    assert code == 78
    assert f"the rows of the train set are not those that {job.run_dir} was started with" in text
    rows.write_text(as_it_was)
    ranks.run("sft", config, name, "train.max_steps=4")
    turn_round(rows)
    job = ranks.run("sft", config, name, "train.max_steps=6", "run.allow_config_change=true")
    assert "DATA CHANGED: the rows of the train set" in job.text()
    assert attempts.committed_step(job.run_dir) == 6
    ranks.run("sft", config, name, "train.max_steps=7")  # the rows that were allowed are its own now


def test_rows_may_be_mended_as_long_as_nothing_is_committed(ranks, own, tmp_path):
    rows, config = own
    with open(rows, "a") as file:
        file.write(json.dumps({"prompt": "?"}) + "\n")
    code, text = ranks.fail("sft", config, tmp_path.name)
    assert code == 78
    assert "it has the fields prompt" in text
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    ranks.run("sft", config, tmp_path.name)


def test_a_store_that_is_written_to_ends_the_run_before_the_next_commit(ranks, own, tmp_path):
    _, config = own
    job = ranks.start("sft", config, tmp_path.name, "train.max_steps=100000")
    while not attempts.committed_step(job.run_dir):
        time.sleep(0.05)
    [tokens] = (tmp_path / "cache").glob("sft-train-*/tokens.bin")
    content = tokens.read_bytes()
    with open(tokens, "r+b") as file:
        file.write(content[4:] + content[:4])  # tokens of the vocabulary, each one place to the left
    assert set(ranks.wait(job)) == {78}
    assert f"{tokens} was written to while this run was reading it: delete {tokens.parent}" in job.text()
    code, text = ranks.fail("sft", config, tmp_path.name)
    assert code == 78
    assert f"{tokens} is damaged (its content is not what was written)" in text
