"""The doctor's arithmetic against torch's own books, and its findings on models and data made on the spot."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from adapter_rows import helpsteer3
from data_helpers import CHATML, tiny_tokenizer, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from strop.config import ModelConfig
from strop.doctor import examine, model, place
from strop.doctor.checks import Checks
from strop.doctor.examine import Question
from strop.slurm import attempts
from tests.unit.doctor_helpers import LLAMA


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """A model whose tokenizer knows ChatML, with weights."""
    folder = tmp_path_factory.mktemp("assets") / "m"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pair(question: str, good: str = "Yes.", bad: str = "Perhaps.") -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


@pytest.fixture
def ask(assets, tmp_path, monkeypatch):
    """ask("key=value", nodes=2) -> the answer, for a small sound run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place.shutil, "which", lambda name: None)  # no Slurm
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "training.jsonl", [pair(f"Is {n} a number?") for n in range(40)])
    write_jsonl(data / "validation.jsonl", [pair(f"Is {n} one?") for n in range(8)])
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {assets}}}\ndata: {{train: data, max_length: 200}}\n"
        "train: {global_batch_size: 8}\ncheckpoint: {every: 2}\n"
    )

    def run(*words: str, algo: str = "dpo", **question):
        return examine.examine(Question(algo, ("--config", "c.yaml", *words), **question))

    return run


def found(answer, level: str) -> list[tuple[str, str]]:
    """Without what depends on this host (Slurm, uncommitted code)."""
    return [(c.name, c.text) for c in answer.checks if c.level == level and c.name not in ("slurm", "code")]


def test_a_sound_run(ask, assets):
    answer = ask(nodes=2)
    assert found(answer, "FAIL") == []
    # The tokenizer's eos is </s>, and ChatML ends a turn with another token.
    assert [name for name, _ in found(answer, "warn")] == ["end of turn"]
    params = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**LLAMA)).parameters())
    assert answer.numbers["num_params"] == params
    assert (answer.numbers["steps"], answer.numbers["train_rows"]) == (5, 40)
    assert answer.numbers["memory_bytes"]["optimizer"] == 8 * -(-params // 2)
    (title, pieces), _ = answer.previews
    assert title == "chosen"
    assert pieces == [
        ("<|im_start|>user\nIs 0 a number?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>\n", True),
    ]


def test_a_run_with_adapters(ask):
    """Rank 2 on q and v of three layers: 2 (32 + 32) + 2 (32 + 16) numbers each, of 12 bytes in a save."""
    answer = ask("lora.rank=2", "lora.targets=[q_proj,v_proj]")
    trained = 3 * 2 * ((32 + 32) + (32 + 16))
    assert any(
        n == "adapters" and f"trainable parameters {trained:,} of" in t for n, t in found(answer, "ok")
    )
    assert answer.numbers["checkpoint_bytes"] == 12 * trained
    assert answer.numbers["memory_bytes"]["optimizer"] == 8 * trained


def test_a_reward_model(ask, assets, tmp_path):
    """A head of 32 numbers in place of the logits, new where the weights are a language model's, missing
    where they should have one; nothing about learning to stop."""
    answer = ask(algo="rm", nodes=2)
    assert found(answer, "FAIL") + found(answer, "warn") == []
    lm = LlamaForCausalLM(LlamaConfig(**LLAMA))
    assert answer.numbers["num_params"] == sum(p.numel() for p in lm.parameters()) + 32
    assert answer.numbers["memory_bytes"]["head"] == 0
    assert [text for name, text in found(answer, "ok") if name == "weights" and "29 tensors" in text]
    config = json.loads((assets / "config.json").read_text())
    changes = {
        "LlamaForSequenceClassification": ("warn", "weights", "1 of 30 weights are not in the files"),
        "Classes": ("FAIL", "model", "sorts into 3 classes; a reward model has one"),
        "Mamba": ("FAIL", "model", "transformers has no MambaForSequenceClassification (model_type mamba)"),
    }
    for change, (level, name, told) in changes.items():
        copy = tmp_path / change
        shutil.copytree(assets, copy)
        other = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
        if change == "Classes":
            other["id2label"] = {str(i): "x" for i in range(3)}
        facts = {"model_type": "mamba"} if change == "Mamba" else config | other
        (copy / "config.json").write_text(json.dumps(facts))
        texts = [text for n, text in found(ask(f"model.path={copy}", algo="rm"), level) if n == name]
        assert [t for t in texts if told in t], (change, texts)


def test_the_tools_preview():
    from tools import doctor

    text = doctor.preview("chosen", [("a ", False), ("b", True)], colour=False)
    assert text.plain == "--- chosen ([[trained]])\na [[b]]"


BROKEN = [
    # words, name of the FAIL, what it says
    (["optim.lrr=1"], "configuration", "command line: unknown key optim.lrr; did you mean optim.lr?"),
    (["model.path=./nothing"], "model", "model.path: ./nothing does not exist"),
    (["data.train=data/trainin.jsonl"], "train data", "data.train: no such file or directory"),
    (["model.chat_template={{ x"], "train data", "model.chat_template: line 1"),
    (
        ["lora.rank=4", "lora.targets=[q_prog]"],
        "adapters",
        "no layer is called 'q_prog'; did you mean q_proj",
    ),
    (["data.max_length=4"], "train data", "40 of 40 rows of the train set (100.0%) were dropped"),
    (["data.max_length=4", "data.over_length=error"], "train data", "40 rows over_length; the first: data/"),
    (
        ["optim.schedule=wsd", "optim.decay_steps=6"],
        "schedule",
        "optim.warmup_steps=0, optim.decay_steps=6, 5 steps in all",
    ),
    (["data.prompt_template={x"], "train data", "data.prompt_template: expected '}' before end of string"),
    (["model.tokenizer=./nothing"], "tokenizer", "model.tokenizer: no tokenizer in './nothing'"),
    (
        ["data.adapter=hlpsteer3"],
        "train data",
        "data.adapter: no adapter is called 'hlpsteer3'; did you",
    ),
    (["data.train=gsm8k"], "train data", "data.train: gsm8k holds answers to be learnt and text, and this"),
    (
        ["data.adapter=squad"],
        "train data",
        "data.adapter: squad holds answers to be learnt, and this",
    ),
    (["validation.metrics=[not_here:f]"], "validation metrics", "there is no module not_here"),
]


@pytest.mark.parametrize(("words", "name", "text"), BROKEN)
def test_what_would_fail(ask, words, name, text):
    fails = found(ask(*words), "FAIL")
    assert [t for n, t in fails if n == name and text in t], fails


def test_bad_rows_are_named(ask, tmp_path):
    rows = [pair("a?"), {"prompt": "x", "chosen": "y"}, pair("b?", "same", "same"), pair("c?")]
    write_jsonl(tmp_path / "data" / "training.jsonl", rows)
    fails = [text for _, text in found(ask(), "FAIL")]
    assert any("1 rows wrong_fields; the first: data/training.jsonl, line 2" in t for t in fails)
    assert any("1 rows same_pair; the first: data/training.jsonl, line 3" in t for t in fails)
    warns = [text for _, text in found(ask("data.on_bad_row=skip"), "warn")]
    assert any("same_pair" in t for t in warns)


def test_labels_of_unpaired_rows(ask, tmp_path):
    """Pairs are balanced; with three more desirable rows they are not; and one row has no others."""
    question = Question("kto", ("--config", "c.yaml"))
    answer = examine.examine(question)
    assert ("labels", "40 of 80 rows are desirable") in found(answer, "ok")
    assert [title for title, _ in answer.previews] == ["desirable"]
    good = [{"prompt": f"{n}?", "completion": "Yes.", "label": True} for n in range(3)]
    write_jsonl(tmp_path / "data" / "training.jsonl", [pair("a?"), pair("b?"), *good])
    warns = [text for name, text in found(examine.examine(question), "warn") if name == "labels"]
    assert [text.partition(",")[0] for text in warns] == ["5 desirable and 2 undesirable rows"]
    write_jsonl(tmp_path / "data" / "training.jsonl", good[:1])
    assert ("labels", "a single row cannot be compared with others") in found(
        examine.examine(question), "FAIL"
    )


def test_rows_of_a_known_set(ask, tmp_path):
    """Every third row is a tie: left out, and no reason to stop."""
    for name, count in (("training", 30), ("validation", 6)):
        rows = [helpsteer3(n % 3, context=f"{name} {n}") for n in range(count)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    answer = ask("data.adapter=helpsteer3", "validation.metrics=json:dumps")
    assert found(answer, "FAIL") == []
    told = [c.text for c in answer.checks if c.level == "ok"]
    assert "all 30 of 30 rows looked at, 20 usable" in told
    assert "10 rows left out as tie" in told
    assert "json:dumps can be imported" in told
    assert answer.numbers["train_rows"] == 20


def test_text_and_its_blocks(ask, tmp_path):
    """Blocks of 32 tokens predict 31 each; noise is told, a line that is no JSON fails; half of the documents
    give an estimate that is right for documents of one length."""
    texts = [f"{n} apples and {n} shells are {n} things on the shore." for n in range(10, 50)]
    write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in [*texts, "", "!?" * 40]])
    words = ("--config", "c.yaml", "data.train=t.jsonl", "data.max_length=32", "prepare.max_symbols=0.5")
    answer = examine.examine(Question("cpt", words, rows=None))
    assert found(answer, "FAIL") == []
    tokenizer = tiny_tokenizer()
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert answer.numbers["train_rows"] == -(-tokens // 31)
    oks = [text for _, text in found(answer, "ok")]
    assert "1 documents left out as empty" in oks
    assert "1 documents left out as symbols" in oks
    half = examine.examine(Question("cpt", words, rows=20))
    assert half.numbers["train_rows"] == pytest.approx(answer.numbers["train_rows"], rel=0.1)
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write("{")
    fails = found(examine.examine(Question("cpt", words, rows=None)), "FAIL")
    assert any("1 rows not_json; the first: t.jsonl, line 43" in text for _, text in fails)


def test_only_the_first_rows_are_read(ask, tmp_path):
    """Line 30 is broken: not seen among 20 rows, seen among all; the rows are counted all the same."""
    lines = (tmp_path / "data" / "training.jsonl").read_text().splitlines()
    lines[29] = "{"
    (tmp_path / "data" / "training.jsonl").write_text("\n".join(lines) + "\n\n")
    few = ask(rows=20)
    assert found(few, "FAIL") == []
    assert ("train data", "the first 20 of 40 rows looked at, 20 usable") in found(few, "ok")
    assert few.numbers["steps"] == 5
    assert any("line 30: not JSON" in text for _, text in found(ask(rows=None), "FAIL"))


def test_rows_in_both_sets(ask, tmp_path):
    both = [pair("Is 7 a number?"), pair("Is 8 a number?"), pair("new?"), pair("Is 8 a number?")]
    write_jsonl(tmp_path / "data" / "validation.jsonl", both)
    twice, text = (text for name, text in found(ask(), "warn") if name == "validation data")
    assert text.startswith("3 of 4 validation rows are training rows too")
    assert text.endswith("data/validation.jsonl, line 1 is data/training.jsonl, line 8")
    assert twice == "1 rows are equal to an earlier one"


@pytest.mark.parametrize(
    ("words", "name", "text"),
    [
        (["optim.warmup_steps=5"], "warm-up", "optim.warmup_steps=5, but the run has 5 steps"),
        (
            ["data.max_length=20", "data.over_length=truncate_prompt_left", "data.max_dropped_fraction=1"],
            "train data",
            " rows cut by truncate_prompt_left; the first: data/training.jsonl, line ",
        ),
        (["validation.every=6"], "validation", "validation.every=6 is more than the run's 5 steps"),
        (["checkpoint.every=6"], "checkpoints", "checkpoint.every=6 is more than the run's 5 steps"),
        (
            ["checkpoint.best_metric=eval_loss", "validation.at_end=false"],
            "checkpoints",
            "after step 0",
        ),
        (["train.micro_batch_tokens=8"], "steps", "the longest row has"),
        (["data.max_length=300"], "train data", "data.max_length=300, the model was made for 256"),
        (["model.path=owner/model"], "model", "neither a directory nor in the hub cache"),
    ],
)
def test_warnings(ask, monkeypatch, words, name, text):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    warns = found(ask(*words), "warn")
    assert [t for n, t in warns if n == name and text in t], warns


def test_a_template_without_end_of_turn_or_with_bos_twice(ask):
    no_end = CHATML.replace("<|im_end|>\n", "\n").replace("\n", "\\n")
    warns = found(ask(f"model.chat_template={no_end}"), "warn")
    assert [t for n, t in warns if n == "end of turn" and "80 of 80 sequences end without" in t], warns
    fails = found(ask(f"model.chat_template=<s><s>{CHATML}"), "FAIL")
    assert [t for n, t in fails if n == "bos" and "80 of 80 sequences begin with it twice" in t], fails


def test_an_existing_run(ask, tmp_path):
    """The same configuration resumes; another one is refused with its differences; other code too."""
    from strop import config

    settled = config.load("dpo", tmp_path / "c.yaml", ["run.name=r"])
    run = tmp_path / "runs" / "r"
    number = attempts.begin(
        run, job_id=None, restart_count=0, nodes=["n"], code={"digest": "other", "commit": None}
    )
    (run / "config.yaml").write_text(config.dump_yaml(settled))
    attempts.finish(run, number, "YIELD", step=3)
    [text] = [text for name, text in found(ask("run.name=r"), "ok") if name == "run"]
    assert text == f"resumes {run} (1 attempts, committed up to step None)"
    [text] = [text for name, text in found(ask("run.name=r", "optim.lr=1"), "FAIL") if name == "run"]
    assert text.splitlines()[1:] == ["  optim.lr: 1e-06 -> 1.0"]
    (run / "checkpoints" / "step-000003").mkdir(parents=True)
    (run / "checkpoints" / "step-000003" / "COMMITTED.json").write_text("{}")
    [code] = [c for c in ask("run.name=r").checks if c.name == "code" and c.level == "FAIL"]
    assert "digest other then" in code.text
    (tmp_path / "runs" / "foreign").mkdir()
    (tmp_path / "runs" / "foreign" / "x").touch()
    assert "is no run of strop" in found(ask("run.name=foreign"), "FAIL")[0][1]


def test_host(ask, tmp_path):
    variables = {
        "HOST_PYTHON": "/nowhere/python3",
        "CONTAINER": str(tmp_path / "image.sif"),
        "MOUNTS": f"{tmp_path}:/a,/nowhere:/b",
        "STROP_IFNAME": "none0",
    }
    answer = ask(variables=variables)
    assert [name for name, _ in found(answer, "FAIL")] == ["host python", "container", "mounts"]
    assert "network" in [name for name, _ in found(answer, "warn")]
    (tmp_path / "image.sif").touch()
    assert found(ask(variables={"CONTAINER": str(tmp_path / "image.sif")}), "FAIL") == []


@pytest.mark.parametrize(("gpu_mem", "level"), [(0.001, "FAIL"), (100.0, "ok")])
def test_gpu_memory(ask, gpu_mem, level):
    assert "memory" in [name for name, _ in found(ask(gpu_mem_gib=gpu_mem), level)]


def test_damaged_weights(assets, tmp_path):
    file = tmp_path / "w.safetensors"
    whole = (assets / "model.safetensors").read_bytes()
    file.write_bytes(whole)
    assert model.read_header(file)["model.norm.weight"] == ("BF16", [32])
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="damaged or cut off"):
        model.read_header(file)
    for content in (b"", b"abc", struct.pack("<Q", 2**40) + b"{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            model.read_header(file)


def test_weights_that_do_not_belong(assets, tmp_path):

    copy = tmp_path / "m"
    shutil.copytree(assets, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    checks = Checks()

    model.look(ModelConfig(path=str(copy)), checks, offline=True)
    [fail] = [c for c in checks.found if c.level == "FAIL"]
    assert "gate_proj.weight is [64, 32] in the file, config.json makes it [96, 32]" in fail.text
