"""Checkpoints of adapters: what they hold, resumes, what they are refused for, and other bad input."""

from __future__ import annotations

import json
import re

import pytest
import torch

from strop.slurm import attempts
from tests import toy as t
from tests.dist.lora_helpers import (
    LAYERS,
    LORA,
    OPTIM,
    run,
)

# ------------------------------------------------------------------------------------ checkpoints, resume


def test_a_checkpoint_holds_adapters_and_nothing_else(ranks, toy, tmp_path):
    run_dir = run(ranks, toy, tmp_path, "sft", "small", 2, train={"max_steps": 1})
    saved = t.checkpoint(run_dir, 1)
    trained = [f"{layer}.lora_{x}.weight" for layer in LAYERS for x in "AB"]
    assert sorted(saved) == sorted(
        [f"model.{n}" for n in trained]
        + [f"optim.{n}.{m}" for n in trained for m in ("exp_avg", "exp_avg_sq")]
    )
    assert all(x.dtype == torch.float32 for x in saved.values())
    state = json.loads((run_dir / "checkpoints" / "step-000001" / "state.json").read_text())
    assert set(state["frozen"]) == {"base", "trained"}
    log = "".join(p.read_text() for p in (run_dir / "logs" / "0001").glob("*.jsonl"))
    found = re.search(r"LoRA on 14 layers: trainable parameters ([\d,]+) of ([\d,]+) \((.*?) %\)", log)
    assert found is not None
    count = sum(saved[f"model.{n}"].numel() for n in trained)
    total = count + sum(p.numel() for p in t.model64(toy / "model").parameters())
    assert found.groups() == (f"{count:,}", f"{total:,}", f"{100 * count / total:.2f}")


@pytest.mark.parametrize("algo", ["sft", "dpo"])
def test_interrupted_equals_undisturbed_with_dropout(ranks, toy, tmp_path, algo):
    sections = {
        "lora": LORA | {"dropout": 0.3, "modules_to_save": ["model.norm"]},
        "optim": OPTIM,
        "train": {"max_steps": 6, "micro_batch_size": 2},
        "validation": {"at_start": True, "every": 2, "at_end": True},
        "checkpoint": {"every": 3},
    }
    config = t.config(toy, algo, tmp_path / "c.yaml", **sections)
    whole = ranks.run(algo, config, f"{tmp_path.name}-whole", world_size=2).run_dir
    name = f"{tmp_path.name}-broken"
    stopped = set()
    for stop_at in (9, 12, 20):
        job = ranks.run(algo, config, name, world_size=2, stop_at=stop_at)
        stopped.add(attempts.committed_step(job.run_dir))
    assert len(stopped) > 1
    broken = ranks.run(algo, config, name, world_size=2).run_dir
    t.assert_equal_checkpoints(whole, broken, 6)
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    # With other numbers of ranks: the same batches, the same masks.
    name = f"{tmp_path.name}-reshaped"
    for world_size, words in ((1, ["train.max_steps=2"]), (3, ["train.max_steps=4"]), (2, [])):
        job = ranks.run(algo, config, name, *words, world_size=world_size)
    lines = t.metrics(job.run_dir)
    for a, b in zip(lines, t.metrics(whole), strict=True):
        assert a == pytest.approx(b, rel=3e-3, abs=3e-4)


def test_other_frozen_weights_or_other_adapters_are_refused(ranks, toy, tmp_path):
    own = tmp_path / "own"
    t.make(own)
    config = t.config(own, "sft", tmp_path / "c.yaml", lora=LORA)
    name = f"{tmp_path.name}-base"
    job = ranks.run("sft", config, name, "train.max_steps=2")
    code, text = ranks.fail("sft", config, name, "lora.rank=2")
    assert code == 78
    assert "lora.rank: 4 -> 2" in text
    for words, expected in (
        (("lora.rank=2",), "with other adapters"),
        (("lora.modules_to_save=model.norm",), "with other adapters, or modules trained whole"),
        (("lora.rank=null", "lora.alpha=32"), "with other adapters"),
    ):
        code, text = ranks.fail("sft", config, name, "run.allow_config_change=true", *words)
        assert code == 78
        assert f"lora: {job.run_dir} began {expected}" in text
    file = next((own / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, text = ranks.fail("sft", config, name)
    assert code == 78
    assert f"model.path: the weights in {own / 'model'} are not those that {job.run_dir} began with" in text
    content[-1] ^= 1
    file.write_bytes(content)
    ranks.run("sft", config, name)
    assert attempts.committed_steps(job.run_dir / "checkpoints")[-1] == 6


def test_a_full_run_cannot_go_on_with_adapters(ranks, toy, tmp_path):
    config = t.config(toy, "sft", tmp_path / "c.yaml")
    job = ranks.run("sft", config, f"{tmp_path.name}-full", "train.max_steps=1")
    words = ("run.allow_config_change=true", "lora.rank=2", "train.max_steps=2")
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-full", *words)
    assert code == 78
    assert f"lora: {job.run_dir} began without adapters" in text


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets=[q_porj]"], "lora.targets: no layer is called 'q_porj'; did you mean q_proj"),
        (["lora.targets=[q_proj,query]"], "no layer is called 'query'; there are q_proj, k_proj, v_proj"),
        (["lora.targets=q_proj"], "no layer's whole name matches 'q_proj'; write [q_proj]?"),
        (["lora.targets=.*gate_prj"], "no layer's whole name matches '.*gate_prj'; did you mean gate_proj"),
        (["lora.targets=[embed_tokens]"], "model.embed_tokens is an embedding, which gets no adapter"),
        (["lora.targets=[lm_head]"], "lm_head has the weight of the embedding"),
        (["lora.targets=[mlp]"], "model.layers.0.mlp is a LlamaMLP and no linear layer"),
        (["lora.targets=[]"], "lora.targets is []; it must name a layer"),
        (["lora.targets=[1]"], "lora.targets is [1]; it must be the name of a layer or a list of names"),
        (["lora.targets='(q'"], "is no regular expression"),
        (["lora.rank=0"], "lora.rank is 0; it must be greater than 0"),
        (["lora.rank=33"], "33 is larger than model.layers.0.self_attn.k_proj (64 inputs, 32 outputs)"),
        (["lora.alpha=0"], "lora.alpha is 0.0; it must be greater than 0"),
        (["lora.dropout=1"], "lora.dropout is 1.0; it must lie in [0, 1)"),
        (["lora.dropout=-0.1"], "must lie in [0, 1)"),
        (["lora.modules_to_save=[scores]"], "lora.modules_to_save: no layer is called 'scores'"),
        (["lora.rank=null", "lora.alpha=32", "lora.dropout=0.1"], "lora.dropout is 0.1; it needs lora.rank"),
        (["lora.rang=3"], "unknown key lora.rang; did you mean lora.rank?"),
    ],
)  # fmt: skip
def test_bad_input(ranks, toy, tmp_path, words, message):
    config = t.config(toy, "sft", tmp_path / "c.yaml", lora=LORA)
    job = ranks.start("sft", config, f"{tmp_path.name}-bad", *words, launched=False)
    assert ranks.wait(job) == [78]
    assert message in job.text()
    assert "Traceback" not in job.text()


def test_an_adapter_directory_is_no_model(ranks, toy, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    config = t.config(toy, "sft", tmp_path / "c.yaml", model={"path": str(tmp_path / "adapter")})
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-adapter")
    assert code == 78
    assert "holds an adapter and no model: merge it with its base" in text
