"""Numbers that are no numbers, full disks, overflow: what a run does when training itself goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from strop.data import plan
from strop.models import policy
from strop.slurm import attempts
from tests import toy as t


@pytest.mark.parametrize("algo", ["dpo", "sft"])
@pytest.mark.parametrize("weight", ["model.norm.weight", "model.embed_tokens.weight"])
def test_nan_ends_the_run_and_commits_nothing(ranks, toy, tmp_path, algo, weight):
    """In a norm the probe meets it; in the embedding of a token of the data, the first step does."""
    path = tmp_path / "nan"
    shutil.copytree(toy / "model", path)
    weights = load_file(path / "model.safetensors")
    token = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("Ġthe")
    assert token not in policy.probe_batch(len(weights["model.embed_tokens.weight"]), "cpu").tokens_T
    weights[weight][token if "embed" in weight else 3] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    # untied, so that the NaN of one token is not in every token's normalisation
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights["lm_head.weight"] = load_file(toy / "model" / "model.safetensors")["model.embed_tokens.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = t.config(toy, algo, tmp_path / "c.yaml", model={"path": str(path)})
    job = ranks.start(algo, config, f"{tmp_path.name}-{algo}", world_size=2)
    assert set(ranks.wait(job)) <= {79, -9}
    verdict = attempts.read_verdicts(job.run_dir, 1)[0]
    assert (verdict["kind"], verdict["exit_code"]) == ("diverged", 79), verdict["message"]
    assert ("step 1: loss nan" in verdict["message"]) == ("embed" in weight)
    assert not list((job.run_dir / "checkpoints").glob("step-*"))


def test_divergence_in_the_middle_names_its_rows_and_keeps_what_was_committed(ranks, toy, tmp_path):
    """A learning rate that throws the weights out of fp32's range within a few steps."""
    config = t.config(
        toy, "sft", tmp_path / "c.yaml",
        optim={"lr": 3e37, "schedule": "constant", "warmup_steps": 0},
        train={"max_grad_norm": None, "max_steps": 9},
        checkpoint={"every": 1},
    )  # fmt: skip
    job = ranks.start("sft", config, f"{tmp_path.name}-lr", world_size=2)
    assert set(ranks.wait(job)) <= {79, -9}
    committed = attempts.committed_step(job.run_dir)
    assert committed is not None
    dump = json.loads((job.run_dir / "logs" / "0001" / f"diverged-step-{committed + 1:06d}.json").read_text())
    store = t.stores(job.run_dir)["train"]
    rows = plan.step_rows(store.num_rows, 6, 42, committed)
    assert sorted((r["source"], r["line"]) for r in dump["rows"]) == sorted(map(store.row_id, rows))
    message = attempts.read_verdicts(job.run_dir, 1)[0]["message"]
    assert message.startswith(f"step {committed + 1}: loss ")
    assert all(m["step"] <= committed for m in t.metrics(job.run_dir))


def test_fp16_overflow_halves_the_scale_and_changes_no_weight(ranks, toy, tmp_path):
    """One row with two trained tokens a step: their gradients overflow fp16 at a scale of 2^16, and the first
    steps only lower it."""
    rows = [{"prompt": f"{i} fox", "completion": "a"} for i in range(8)]
    config = t.config(
        toy, "sft", tmp_path / "c.yaml",
        data={"train": str(t.write_jsonl(tmp_path / "rows.jsonl", rows))},
        train={"precision": "fp16", "max_steps": 8, "max_grad_norm": None, "global_batch_size": 1},
        checkpoint={"every": 1, "keep_last": 20},
    )  # fmt: skip
    job = ranks.run("sft", config, f"{tmp_path.name}-fp16")
    lines = {m["step"]: m for m in t.metrics(job.run_dir)}
    original = t.checkpoint(job.run_dir, 1)
    scale, updates, last = 2.0**16, 0, None
    for step in range(1, 9):
        state = json.loads((job.run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
        tensors = t.checkpoint(job.run_dir, step)
        overflowed = lines[step]["grad_norm"] is None
        scale, updates = (scale / 2, updates) if overflowed else (scale, updates + 1)
        assert (state["loss_scale"], state["num_updates"]) == (scale, updates)
        if last is not None and overflowed:
            assert all(torch.equal(tensors[k], last[k]) for k in tensors)
        last = tensors
    assert 0 < updates < 8
    assert any(not torch.equal(original[k], last[k]) for k in last)
    # AdamW's own count is of updates, not of steps: interrupted in between, the end is the same
    again = ranks.run("sft", config, f"{tmp_path.name}-again", "train.max_steps=1")
    ranks.run("sft", config, f"{tmp_path.name}-again", "train.max_steps=5")
    ranks.run("sft", config, f"{tmp_path.name}-again")
    t.assert_equal_checkpoints(job.run_dir, again.run_dir, 8)


def test_fp16_and_bf16_follow_fp32(ranks, toy, tmp_path):
    """The first two steps' losses within what the compute type rounds (fp16 11 bits, bf16 8)."""
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        config = t.config(
            toy, "sft", tmp_path / f"{precision}.yaml", train={"precision": precision, "max_steps": 1}
        )
        job = ranks.run("sft", config, f"{tmp_path.name}-{precision}")
        losses[precision] = t.metrics(job.run_dir)[0]["loss"]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=2e-3)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_a_changed_reference_is_computed_anew(ranks, toy, tmp_path):
    """With run.allow_config_change=true another reference takes effect in a resumed run."""
    other = tmp_path / "reference"
    torch.manual_seed(1)
    t.llama(t.model64(toy / "model").config.vocab_size).save_pretrained(other)
    config = t.config(toy, "dpo", tmp_path / "c.yaml")
    name = f"{tmp_path.name}-ref"
    ranks.run("dpo", config, name, "train.max_steps=1")
    changed = ["train.max_steps=2", f"dpo.reference={other}"]
    code, text = ranks.fail("dpo", config, name, *changed)
    assert code == 78
    assert f"dpo.reference: null -> {other}" in text
    job = ranks.run("dpo", config, name, *changed, "run.allow_config_change=true")
    own = ranks.run("dpo", config, f"{name}-own", f"dpo.reference={other}", "train.max_steps=2")
    # both stand one step from the start; of two unlike models the log-ratios are large, of one model small
    assert abs(t.metrics(job.run_dir)[1]["rewards/chosen"]) == pytest.approx(
        abs(t.metrics(own.run_dir)[1]["rewards/chosen"]), rel=0.2
    )


def test_a_full_disk_leaves_the_last_commit(ranks, toy, tmp_path):
    """One rank can write no file above 100 kB, as under a quota: all ranks hear of it, exit 74, nothing half
    is left, and with room again the run goes on to the undisturbed end."""
    config = t.config(toy, "sft", tmp_path / "c.yaml", checkpoint={"every": 3})
    name = f"{tmp_path.name}-full"
    ranks.run("sft", config, name, "train.max_steps=3", world_size=2)
    job = ranks.start("sft", config, name, world_size=2, file_limit=100_000)
    assert set(ranks.wait(job)) <= {74, -9}
    verdict = attempts.read_verdicts(job.run_dir, 2)[0]
    assert verdict["kind"] == "storage"
    assert verdict["message"].count("checkpoint of step 6 could not be written") == 1
    left = sorted(p.name for p in (job.run_dir / "checkpoints").glob("step-*"))
    assert left == ["step-000003"]
    ranks.run("sft", config, name, world_size=2)
    whole = ranks.run("sft", config, f"{name}-whole", world_size=2)
    t.assert_equal_checkpoints(job.run_dir, whole.run_dir, 6)


def direct_run(toy, tmp_path, **environment: str) -> subprocess.Popen[str]:
    """A long run in a process of its own, as typed in a terminal."""
    config = t.config(toy, "sft", tmp_path / "c.yaml", train={"max_steps": 100000})
    words = [f"run.dir={tmp_path}", "run.name=r", "train.max_epochs=100000", "validation.at_start=false"]
    command = [sys.executable, "-m", "strop.train", "sft", "--config", str(config), *words]

    def hear_ctrl_c() -> None:  # a background job of a shell, such as CI's, ignores it and hands that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
        env={**os.environ, **environment},
    )


def test_ctrl_c_commits_and_ends_a_direct_run(toy, tmp_path):
    """Nothing is committed on the way (checkpoint.every is null): what is there is of the Ctrl-C."""
    lines = []
    with direct_run(toy, tmp_path) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            lines.append(line)
            if " step 3/" in line:
                trainer.send_signal(signal.SIGINT)
        assert trainer.wait() == 130
    record = attempts.read(tmp_path / "r", 1)
    assert (record["state"], record["reason"]) == ("YIELD", "Ctrl-C")
    assert record["max_steps"] == 100000
    step = t.metrics(tmp_path / "r")[-1]["step"]
    assert 3 <= step < 100
    assert record["step"] == attempts.committed_step(tmp_path / "r") == step
    assert lines[-1].endswith(f"interrupted at step {step}, committed; run.name=r goes on\n")


def test_a_second_ctrl_c_ends_a_direct_run_at_once(toy, tmp_path):
    """Its second step would last an hour: no safe point comes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "from torch.optim import adamw as module\n"
        "real = module.adamw\n"
        "def adamw(params, grads, first, second, largest, steps, **kwargs):\n"
        "    if any(step == 1 for step in steps):\n"
        "        print('asleep', flush=True)\n"
        "        time.sleep(3600)\n"
        "    return real(params, grads, first, second, largest, steps, **kwargs)\n"
        "module.adamw = adamw\n"
    )
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with direct_run(toy, tmp_path, PYTHONPATH=path) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == "asleep\n":
                break
        trainer.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for the step
            trainer.wait(timeout=3)
        trainer.send_signal(signal.SIGINT)
        assert trainer.wait(timeout=20) == 130
    record = attempts.read(tmp_path / "r", 1)
    assert (record["state"], record["reason"]) == ("FAIL", "interrupted")
