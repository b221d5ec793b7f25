"""What a user's mistake gets: one message that names the place, exit 78, and nothing written over.

The processes are the real `python -m strop.train` but for its imports, which are forked; configuration errors
come before torch, and one of them is timed in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from strop.slurm import attempts
from tests import toy as t

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def refused(ranks, toy, tmp_path):
    """refused(algo, *words, **sections) -> the message on stderr of a direct run."""

    def run(algo, *words, name=None, **sections):
        config = t.config(toy, algo, tmp_path / "c.yaml", **sections)
        job = ranks.start(algo, config, name or tmp_path.name, *words, launched=False)
        begin = time.monotonic()
        codes = ranks.wait(job)
        assert codes == [78], job.text()
        assert time.monotonic() - begin < 10
        text = job.text()
        assert "Traceback" not in text
        return text.partition("\nlooks: ")[0].rpartition("error: ")[2].strip()

    return run


def rows(tmp_path, *items):
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return {"train": str(path), "max_length": 256}


GOOD = {"prompt": "the fox", "chosen": "jumps", "rejected": "sleeps"}


def test_configuration_errors_come_before_torch(tmp_path):
    command = [sys.executable, "-m", "strop.train", "dpo", "--config", "nowhere.yaml"]
    begin = time.monotonic()
    variables = {"PYTHONPATH": str(REPO / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=variables,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("error: ")
    assert "nowhere.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - begin < 5  # torch alone takes longer than that here
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_step=3"], "train.max_steps"),
        (["train.max_steps=three"], "train.max_steps"),
        (["dpo.label_smoothing=0.7"], "dpo.label_smoothing is 0.7; it must lie in [0, 0.5)"),
        (["model.path=null"], "model.path is not set"),
        (["optim.schedule=cosin"], "must be one of constant, linear, cosine"),
    ],
)
def test_a_wrong_key_or_value(refused, words, message):
    assert message in refused("dpo", *words)


def test_no_such_model(refused, tmp_path):
    assert refused("dpo", model={"path": "/no/model"}) == "model.path: /no/model does not exist"
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refused("dpo", model={"path": str(folder)}) == (
        f"model.path: {folder} has no config.json: not a model directory"
    )


def test_a_mistyped_directory_that_looks_like_a_hub_name(refused, toy):
    """Told within `refused`'s ten seconds, by a hub that does not know it or where none can be reached."""
    assert refused("dpo", model={"path": "modles/llama"}).startswith(
        f"model.path: 'modles/llama' is no directory (looked in {Path.cwd()}), "
    )
    other = {"path": str(toy / "model"), "tokenizer": "modles/llama"}
    assert refused("dpo", model=other).startswith("model.tokenizer: 'modles/llama' is no directory")
    assert refused("dpo", dpo={"reference": "modles/llama"}).startswith("dpo.reference: 'modles/llama'")


def test_model_directory_without_weights(refused, toy, tmp_path):
    folder = tmp_path / "config-only"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy / "model" / name, folder)
    assert refused("dpo", model={"path": str(folder)}) == (
        f"model.path: {folder} has a config.json but no weights (*.safetensors or *.bin)"
    )


def test_weights_that_are_missing_torn_or_of_another_shape(refused, toy, tmp_path):
    """transformers itself would go on with random numbers in place of missing ones."""
    folder = tmp_path / "wide"
    shutil.copytree(toy / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    assert refused("dpo", model={"path": str(folder)}) == (
        f"model.path: {folder}: cannot load its weights (model.layers.0.mlp.down_proj.weight has shape "
        "(64, 96), but its config.json says (64, 128))"
    )
    shutil.copy(toy / "model" / "config.json", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert refused("dpo", model={"path": str(folder)}) == (
        f"model.path: {folder}: cannot load its weights (1 are missing, such as "
        "model.layers.1.mlp.up_proj.weight)"
    )
    content = (toy / "model" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert refused("dpo", model={"path": str(folder)}).startswith(
        f"model.path: {folder}: cannot load its weights ("
    )


def test_model_that_is_no_language_model(refused, toy, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(toy / "model", folder)
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')
    assert refused("dpo", model={"path": str(folder)}).startswith("model.")


def test_missing_data(refused, tmp_path):
    assert str(tmp_path / "none.jsonl") in refused("dpo", data={"train": str(tmp_path / "none.jsonl")})


def test_a_line_that_does_not_parse(refused, tmp_path):
    data = rows(tmp_path, GOOD, '{"prompt": ')
    message = refused("dpo", data=data)
    assert message.startswith(f"{data['train']}, line 2: ")


def test_a_row_without_fields_and_one_with_equal_sides(refused, tmp_path):
    data = rows(tmp_path, GOOD, {"prompt": "a", "chosen": "b"})
    assert "rejected" in (message := refused("dpo", data=data))
    assert message.startswith(f"{data['train']}, line 2: ")
    data = rows(tmp_path, GOOD, {**GOOD, "rejected": GOOD["chosen"]})
    assert refused("dpo", data=data).startswith(f"{data['train']}, line 2: ")


def test_an_empty_data_set(refused, tmp_path):
    data = rows(tmp_path)
    assert data["train"] in refused("dpo", data=data)


def test_too_many_long_rows(refused, tmp_path):
    long = {**GOOD, "chosen": "fox " * 500}
    message = refused("dpo", data=rows(tmp_path, *[GOOD] * 3, long))
    assert "data.max_dropped_fraction" in message


def test_messages_without_a_chat_template(refused, toy, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(toy / "model", folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    message = {"role": "user", "content": "the fox"}
    answer = {"role": "assistant", "content": "jumps"}
    text = refused("sft", data=rows(tmp_path, {"messages": [message, answer]}), model={"path": str(folder)})
    assert "chat template" in text


def test_resume_with_another_configuration(ranks, refused, toy, tmp_path):
    config = t.config(toy, "sft", tmp_path / "first.yaml", train={"max_steps": 2})
    job = ranks.run("sft", config, tmp_path.name, launched=False)
    before = {p: p.read_bytes() for p in sorted(job.run_dir.rglob("*")) if p.is_file()}
    message = refused("sft", "optim.lr=0.5", "train.max_steps=4", train={"global_batch_size": 3})
    assert message == (
        f"the configuration differs from the one that {job.run_dir} was started with "
        "(run.allow_config_change=true to go on all the same):\n"
        "  train.global_batch_size: 6 -> 3\n  optim.lr: 0.001 -> 0.5"
    )
    message = refused("dpo")
    assert message == f"run.name: {job.run_dir} is a run of sft, not of dpo"
    assert {p: p.read_bytes() for p in before} == before


def test_a_directory_that_is_no_run(refused, ranks, tmp_path):
    folder = ranks.work / "runs" / "thesis"
    folder.mkdir(parents=True)
    (folder / "chapter1.tex").write_text("x")
    assert (
        refused("dpo", name="thesis")
        == f"run.name: {folder} exists and is no run of strop: choose another name"
    )
    assert [p.name for p in folder.iterdir()] == ["chapter1.tex"]


def test_a_run_that_is_held(refused, ranks):
    """A living process (this one) has begun an attempt of it."""
    run_dir = ranks.work / "runs" / "held"
    attempts.begin(run_dir, job_id=None, restart_count=0, nodes=["here"], wait_s=0)
    message = refused("sft", name="held")
    assert message.startswith("run.name: ")
    assert str(run_dir) in message
    assert len(attempts.read_all(run_dir)) == 1


@pytest.mark.parametrize(("name", "left"), [(None, []), ("mine", ["mine"])])
def test_a_refused_start_without_a_name_leaves_nothing(toy, tmp_path, name, left):
    """As direct runs are started: one of a name that was asked for keeps its record."""
    config = t.config(toy, "sft", tmp_path / "c.yaml", run={"dir": str(tmp_path / "runs"), "name": name},
                      data=rows(tmp_path, {"prompt": "a"}))  # fmt: skip
    command = [sys.executable, "-m", "strop.train", "sft", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 78
    assert "rows.jsonl" in done.stderr
    assert [p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")] == left


def test_best_metric_that_is_not_there(refused, tmp_path, toy):
    message = refused("sft", "checkpoint.best_metric=eval_acuracy", validation={"at_start": True})
    assert message == (
        "command line: checkpoint.best_metric is 'eval_acuracy'; it must be one of eval_loss, eval_entropy, "
        "eval_mean_token_accuracy"
    )
    data = rows(tmp_path, *[{"prompt": "a", "completion": "b"}] * 3)
    message = refused("sft", "checkpoint.best_metric=eval_loss", data=data, name=f"{tmp_path.name}-2")
    assert message == (
        "checkpoint.best_metric is eval_loss, but there is no validation set: "
        "give data.validation or data.split, or checkpoint.best_metric=null"
    )


def test_a_shard_size_that_does_not_divide(refused):
    assert refused("sft", "dist.shard_size=2") == "dist.shard_size: 2 does not divide the number of ranks, 1"


def test_a_tracker_that_is_not_installed(refused):
    assert refused("sft", "log.wandb=true").startswith(
        "log.wandb is true, but the Python package wandb is not"
    )
