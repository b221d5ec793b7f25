"""Checkpoints that two FSDP2 ranks have written become Hugging Face directories with the same numbers.

The truth is the fp32 state dict from which the ranks started, cast by `Tensor.to` and loaded into a plain
transformers model. The big case (100 million parameters, about 400 MB in fp32) is there to measure memory.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from strop.config import ModelConfig
from strop.errors import StorageError, UserError
from strop.models.export import export_checkpoint, find_checkpoint
from tools import demo_assets, demo_facts
from tools.convert_dcp_to_hf import parse_size, read_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BIG = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
SHARD_MB = 64
CASES = {
    # name: configuration, tied, step
    "tied": (SMALL, True, 7),
    "untied": (SMALL, False, 100),
    "huge": (SMALL, False, 1),  # holds a weight that fp16 cannot
    "big": (BIG, True, 3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories as the trainer leaves them, each with base model, truth and one checkpoint."""
    runs = tmp_path_factory.mktemp("runs")
    demo_assets.VOCABULARY = 500
    tokenizer = demo_assets._train_tokenizer(demo_facts.pairs()["training"][:50])
    for number, (name, (shape, tied, _)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        config = LlamaConfig(**shape, tie_word_embeddings=tied, dtype="bfloat16", eos_token_id=0)
        model = LlamaForCausalLM(config)
        truth = {key: torch.randn_like(value) * 0.05 for key, value in model.state_dict().items()}
        if tied:
            truth["lm_head.weight"] = truth["model.embed_tokens.weight"]
        if name == "huge":
            truth["model.norm.weight"][3] = 1e5
        base = runs / name / "base"
        model.config.save_pretrained(base)
        GenerationConfig(eos_token_id=0, max_length=99).save_pretrained(base)
        tokenizer.save_pretrained(base)
        torch.save(truth, runs / name / "truth.pt")
        (runs / name / "config.yaml").write_text(
            f"algo: sft\nmodel: {{path: {base}}}\ndata: {{train: x.jsonl}}\n"
        )
    _save_on_two_ranks(runs)
    return runs


def _save_on_two_ranks(runs):
    (runs / "logs" / "0001").mkdir(parents=True)  # the rendezvous meets in the attempt's directory
    cases = [f"{name}:{step}" for name, (_, _, step) in CASES.items()]
    common = {"PYTHONPATH": str(ROOT / "src"), "STROP_WORLD_SIZE": "2", "STROP_LOCAL_SIZE": "2"}
    common |= {"STROP_NODE": "here", "STROP_RUN_DIR": str(runs), "STROP_ATTEMPT": "1"}
    common |= {"STROP_JOB_ID": "", "STROP_RESTART_COUNT": "0", "STROP_END_TIME": "", "STROP_IFNAME": ""}
    worker = Path(__file__).with_name("export_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, runs, *cases],
            env={**os.environ, **common, "STROP_RANK": str(rank), "STROP_LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


def _base(runs, name):
    return read_config(runs / name / "config.yaml").model


def _stored(out):
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("tied", None, torch.bfloat16),  # the base model's own type
        ("tied", "fp32", torch.float32),
        ("untied", "fp16", torch.float16),
        ("untied", None, torch.bfloat16),
    ],
)
def test_same_weights_and_logits(runs, tmp_path, name, dtype, expected):
    export_checkpoint(
        find_checkpoint(runs / name, "latest"), _base(runs, name), tmp_path / "out", dtype=dtype
    )
    truth = {key: value.to(expected) for key, value in torch.load(runs / name / "truth.pt").items()}
    if CASES[name][1]:
        del truth["lm_head.weight"]  # a tied weight is stored once
    stored = _stored(tmp_path / "out")
    assert stored.keys() == truth.keys()
    for key, value in truth.items():
        assert stored[key].dtype == expected
        assert torch.equal(stored[key], value), key

    # Made in this type, not cast to it: `.to` would round the rotary frequencies as well.
    config = LlamaConfig.from_pretrained(runs / name / "base")
    original = AutoModelForCausalLM.from_config(config, dtype=expected)
    original.load_state_dict(torch.load(runs / name / "truth.pt"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert converted.dtype == expected
    ids = torch.arange(1, 41).view(2, 20)
    assert torch.equal(converted(ids).logits, original(ids).logits)


def test_companions(runs, tmp_path):
    out = tmp_path / "deep" / "out"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    base = ModelConfig(path=str(runs / "tied" / "base"), chat_template=template)
    export_checkpoint(find_checkpoint(runs / "tied", "7"), base, out)
    assert (out / "chat_template.jinja").read_text() == template
    assert GenerationConfig.from_pretrained(out).max_length == 99
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("Paris.").input_ids == AutoTokenizer.from_pretrained(base.path)("Paris.").input_ids
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


def test_many_shards(runs, tmp_path):
    """40 kB: below the largest tensor (64 kB in bf16), which then has a file of its own."""
    export_checkpoint(
        find_checkpoint(runs / "untied", "latest"),
        _base(runs, "untied"),
        tmp_path / "out",
        max_shard_bytes=40_000,
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            held = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        assert sorted(held) == sorted(key for key, where in index["weight_map"].items() if where == file)
        num_bytes = sum(t.numel() * t.element_size() for t in held.values())
        assert num_bytes <= 40_000 or len(held) == 1
        total += num_bytes
    assert (
        index["metadata"]["total_size"]
        == total
        == 2 * sum(t.numel() for t in torch.load(runs / "untied" / "truth.pt").values())
    )


def test_existing_output_is_refused_and_replaced_on_demand(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    source, base = find_checkpoint(runs / "tied", "latest"), _base(runs, "tied")
    with pytest.raises(UserError, match=r"exists; add --force"):
        export_checkpoint(source, base, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    export_checkpoint(source, base, out, replace=True)
    assert not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damaged_checkpoint(runs, tmp_path):
    shutil.copytree(runs / "tied" / "checkpoints", tmp_path / "run" / "checkpoints")
    source = find_checkpoint(tmp_path / "run", "latest")
    shard = next(source.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StorageError, match=shard.name):
        export_checkpoint(source, _base(runs, "tied"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["verifying", "shard 1", "shard 2", "loading the result"])
def test_a_checkpoint_that_its_run_removes_meanwhile(runs, tmp_path, line):
    """At each stage; the run goes on and keeps its newest checkpoints only."""
    shutil.copytree(runs / "untied", tmp_path / "run")
    directory = find_checkpoint(tmp_path / "run", "latest")

    def say(text):
        if text.startswith(line):
            shutil.rmtree(directory)

    with pytest.raises(UserError, match=r"step-000100 was removed while it was exported: its run goes on"):
        export_checkpoint(directory, _base(runs, "untied"), tmp_path / "out", max_shard_bytes=40_000, say=say)
    assert not (tmp_path / "out").exists()


def test_other_base_model(runs, tmp_path):
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        export_checkpoint(find_checkpoint(runs / "tied", "latest"), _base(runs, "untied"), tmp_path / "out")
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[512, 64\], not \[4096, 1024\]"):
        export_checkpoint(find_checkpoint(runs / "tied", "latest"), _base(runs, "big"), tmp_path / "out")


def test_weight_beyond_fp16(runs, tmp_path):
    source, base = find_checkpoint(runs / "huge", "latest"), _base(runs, "huge")
    with pytest.raises(UserError, match=r"model.norm.weight is not finite as torch.float16"):
        export_checkpoint(source, base, tmp_path / "out", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


def test_which_checkpoint(runs, tmp_path):
    with pytest.raises(UserError, match=r"step 8 has no committed checkpoint; have steps \[7\]"):
        find_checkpoint(runs / "tied", "8")
    with pytest.raises(UserError, match="best_metric"):
        find_checkpoint(runs / "tied", "best")
    with pytest.raises(UserError, match="no committed checkpoint"):
        find_checkpoint(tmp_path, "latest")
    with pytest.raises(UserError, match="--step newest"):
        find_checkpoint(runs / "tied", "newest")
    root = tmp_path / "checkpoints"
    for step in (1, 2, 12):
        (root / f"step-{step:06d}").mkdir(parents=True)
        if step != 12:  # not committed
            (root / f"step-{step:06d}" / "COMMITTED.json").write_text("{}")
    (root / "BEST.json").write_text('{"step": 1, "metric": "eval_loss", "value": 0.1}')
    assert find_checkpoint(tmp_path, "latest").name == "step-000002"
    assert find_checkpoint(tmp_path, "best").name == "step-000001"


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("0.5 GB", 5 * 10**8), ("500mb", 5 * 10**8), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4 apples", "0GB", "-1GB", ".", "1.2.3MB"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)


def _convert(*words):
    """Run the tool; its peak resident memory in bytes, of which getrusage would give the parent's."""
    program = "import runpy, sys; runpy.run_module('tools.convert_dcp_to_hf', run_name='__main__')"
    status = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import atexit; atexit.register(lambda: {status}); {program}",
            *map(str, words),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return int(child.stdout.split()[1]) * 1024


def test_peak_memory_and_command_line(runs, tmp_path):
    """A small model's conversion shows what the interpreter and its libraries take."""
    words = [
        "--config",
        runs / "tied" / "config.yaml",
        "--dcp-ckpt-path",
        runs / "tied/checkpoints/step-000007",
    ]
    baseline = _convert(*words, "--hf-ckpt-path", tmp_path / "small")
    peak = _convert("--run", runs / "big", "--max-shard-size", f"{SHARD_MB}MB")
    files = list((runs / "big" / "export" / "step-000003").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    above = (peak - baseline) / 1e6
    print(f"{sum(sizes) / 1e6:.0f} MB in {len(sizes)} files: peak {above:.0f} MB above the baseline")
    assert sum(sizes) > 150e6
    assert peak - baseline < 2 * max(sizes)
