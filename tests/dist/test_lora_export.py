"""Adapters as PEFT loads them, and merged models, against the trained weights in fp64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from strop import files
from strop.config import LoraConfig
from strop.errors import StorageError, UserError
from strop.models import hf
from strop.models.export import export_checkpoint, find_checkpoint
from tests import toy as t
from tests.dist.lora_helpers import LORA, OPTIM, Truth, weights_of
from tools.convert_dcp_to_hf import read_config

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[5, 9, 120, 33, 7, 300, 2, 18], [301, 4, 4, 17, 250, 6, 90, 41]])

VARIANTS = {
    "all": (LORA, ()),
    "rslora": (LORA | {"rslora": True, "targets": r".*layers\.1\..*(q|down)_proj", "dropout": 0.1}, ()),
    "tied": (LORA | {"modules_to_save": ["embed_tokens"]}, ("model.embed_tokens.weight",)),
    "head": (
        LORA | {"targets": ["lm_head", "k_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
        ("model.embed_tokens.weight", "model.norm.weight"),
    ),
    "gpt2": (LORA | {"targets": ["c_attn", "c_proj"]}, ()),
}


@pytest.fixture(scope="module")
def runs(ranks, toy, untied, tmp_path_factory):
    """variant -> (run directory of two ranks, base model)."""
    work = tmp_path_factory.mktemp("lora-export")
    gpt2 = work / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    torch.manual_seed(3)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    out = {}
    for name, (lora, _) in VARIANTS.items():
        base = {"head": untied / "model", "gpt2": gpt2}.get(name, toy / "model")
        config = t.config(toy, "sft", work / f"{name}.yaml", lora=lora, optim=OPTIM,
                          model={"path": str(base)}, train={"max_steps": 3})  # fmt: skip
        out[name] = ranks.run("sft", config, f"{work.name}-{name}", world_size=2).run_dir, base
    return out


def truth(run_dir, base, name):
    """fp64 logits of the trained model, and those of its base."""
    lora, whole = VARIANTS[name]
    scale = lora["alpha"] / (lora["rank"] ** 0.5 if lora.get("rslora") else lora["rank"])
    model = Truth(base, weights_of(t.checkpoint(run_dir, 3)), scale, whole=whole).model
    with torch.no_grad():
        return model(IDS).logits, t.model64(base)(IDS).logits


def export(run_dir, out, **options):
    config = read_config(run_dir / "config.yaml")
    export_checkpoint(find_checkpoint(run_dir, "latest"), config.model, out, lora=config.lora, **options)


def test_the_base_is_not_read_again_for_its_digest(runs, tmp_path, monkeypatch):
    """The cache of the training knows it, or that of an earlier export."""
    read, sha256 = [], files.sha256
    monkeypatch.setattr(hf.files, "sha256", lambda path: read.append(path.name) or sha256(path))
    monkeypatch.setattr(hf, "SETTLED_NS", 0)
    run_dir, _ = runs["all"]
    for number in range(2):
        export(run_dir, tmp_path / str(number), adapter=True, cache=tmp_path / "cache")
        assert read.count("model.safetensors") == 1


def close(logits, expected):
    return torch.allclose(logits.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_and_the_merged_model_give_the_trained_models_logits(runs, tmp_path, name):
    run_dir, base = runs[name]
    expected, before = truth(run_dir, base, name)
    assert not torch.allclose(expected, before, rtol=0.01, atol=0.01)  # something was learnt
    export(run_dir, tmp_path / "adapter", adapter=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert close(loaded(IDS).logits, expected)
    # every tensor of the file is used: PEFT would be silent about one that is not
    state = peft.get_peft_model_state_dict(loaded)
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert file.keys() == {key for key in state if ".base_layer." not in key}
    # the whole model that PEFT would make by itself, from the file's own words
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        assert close(auto(IDS).logits, expected)

    export(run_dir, tmp_path / "merged", dtype="fp32", max_shard_bytes=60_000)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert close(merged(IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_merging_rounds_once(runs, tmp_path):
    """bf16: the fp32 sum of weight and adapter, rounded."""
    run_dir, base = runs["all"]
    export(run_dir, tmp_path / "merged", dtype="bf16")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    saved, plain = t.checkpoint(run_dir, 3), load_file(base / "model.safetensors")
    assert stored.keys() == plain.keys()
    for name, tensor in stored.items():
        layer = f"model.{name.removesuffix('.weight')}"
        expected = plain[name]
        if f"{layer}.lora_A.weight" in saved:
            expected = expected + 1.5 * (saved[f"{layer}.lora_B.weight"] @ saved[f"{layer}.lora_A.weight"])
            assert not torch.equal(tensor, plain[name].bfloat16())
        assert torch.equal(tensor, expected.bfloat16()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_the_adapters_configuration(runs, tmp_path, name):
    """target_modules in few words where they mean no other layer."""
    run_dir, base = runs[name]
    export(run_dir, tmp_path / "adapter", adapter=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 6.0, "CAUSAL_LM")
    targets, whole = {
        "all": (["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], None),
        "rslora": (["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"], None),
        "tied": (["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
                 ["model.embed_tokens", "lm_head"]),
        "head": (["k_proj", "lm_head"], ["model.embed_tokens", "model.norm"]),
        "gpt2": (["c_attn", "c_proj"], None),
    }[name]  # fmt: skip
    assert (config["target_modules"], config["modules_to_save"]) == (targets, whole)
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(x.dtype == torch.float32 for x in file.values())


def test_what_does_not_belong_together_is_not_exported(runs, ranks, toy, tmp_path):
    run_dir, base = runs["all"]
    step, config = find_checkpoint(run_dir, "latest"), read_config(run_dir / "config.yaml")
    with pytest.raises(UserError, match=r"does not fit the lora section of its configuration: .*lora_A"):
        export_checkpoint(step, config.model, tmp_path / "out", lora=LoraConfig(rank=3))
    with pytest.raises(UserError, match="does not fit the model"):
        export_checkpoint(step, config.model, tmp_path / "out")
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    own = type(config.model)(path=str(other))
    for adapter in (True, False):
        with pytest.raises(UserError, match=r"are not those that the adapters in .* were trained beside"):
            export_checkpoint(step, own, tmp_path / "out", lora=config.lora, adapter=adapter)
    plain = t.config(toy, "sft", tmp_path / "full.yaml", train={"max_steps": 1})
    full = ranks.run("sft", plain, f"{tmp_path.name}-full").run_dir
    with pytest.raises(UserError, match=r"--adapter: .* holds all weights and no adapters"):
        export(full, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
    copy = tmp_path / "step-000003"
    copy.mkdir()
    for file in step.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    piece = next(copy.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(StorageError, match="missing or truncated"):
        export_checkpoint(copy, config.model, tmp_path / "out", lora=config.lora, adapter=True)


def test_command_line(runs):
    run_dir, _ = runs["all"]
    for words in (["--adapter"], []):
        command = [sys.executable, "-m", "tools.convert_dcp_to_hf", "--run", str(run_dir), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    step = run_dir / "export" / "step-000003"
    assert (step / "model.safetensors").is_file()
    assert (step.with_name("step-000003-adapter") / "adapter_config.json").is_file()
    assert json.loads((step / "config.json").read_text())["dtype"] == "float32"
    # In the merged model's place the adapters are something else, though of the same checkpoint.
    update = ["--run", str(run_dir), "--adapter", "--update", "--out", str(step)]
    for told in (f"wrote {step}", f"{step} is of {run_dir / 'checkpoints/step-000003'} already"):
        command = [sys.executable, "-m", "tools.convert_dcp_to_hf", *update]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr
        assert (step / "adapter_model.safetensors").is_file()
        assert not (step / "model.safetensors").exists()
