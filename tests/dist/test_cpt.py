"""Continued pretraining against plain transformers in fp64, and its resume.

The truth begins at the texts: it encodes them itself, lays them side by side, and cuts the stretch of tokens
that a block predicts by arithmetic of its own.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from strop.data import plan
from strop.slurm import attempts
from tests import toy as t
from tests.unit.data_helpers import tiny_tokenizer

EOS = tiny_tokenizer().eos_token_id
GOLDEN = [
    7.3057261037302546,
    7.176756783817591,
    7.012004380815484,
    6.827821731567383,
    6.227996994777279,
    6.191290658279504,
]
"""fp32 on an x86 CPU; other kernels round the last digits otherwise."""


def documents(path):
    tokenizer = tiny_tokenizer()
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in rows]


def pieces(docs, length, cross=False):
    """[block] -> the sequences that are run alone. Block b predicts tokens [b S, (b+1) S), S = length - 1."""
    if cross:
        docs = [[token for doc in docs for token in doc]]
    total, blocks, begin = sum(map(len, docs)), [], 0
    while begin < total:
        end, at, block = begin + length - 1, 0, []
        for doc in docs:
            low, high = max(begin - 1 - at, 0), min(end - at, len(doc))
            if at + len(doc) > begin and at < end and high - low > 1:
                block.append(doc[low:high])
            at += len(doc)
        blocks.append(block)
        begin = end
    return blocks


def truth(model, sequences):
    """fp64 mean over all predicted tokens, each sequence in a forward of its own."""
    logps = []
    for ids in sequences:
        ids = torch.tensor(ids)
        logits = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
        logps.append(logits.gather(1, ids[1:, None])[:, 0])
    return -torch.cat(logps).mean()


def run(ranks, toy, tmp_path, name, world_size=1, words=(), **sections):
    return t.run(ranks, toy, tmp_path, "cpt", name, world_size, words, **sections)


@pytest.mark.parametrize("case", ["masked", "padded", "crossing", "whole"])
def test_loss_and_gradient_of_a_step_equal_plain_fp64(ranks, toy, tmp_path, case):
    """whole: one block with all documents uncut, so that the truth runs each document alone. AdamW's first
    moment after one step is (1 - β1) times the gradient of every parameter."""
    docs = documents(toy / "text" / "training.jsonl")
    length = 600 if case == "whole" else 32
    data = {"train": str(toy / "text"), "max_length": length}
    run_dir = run(
        ranks, toy, tmp_path, "one", 2,
        data=data,
        train={"max_steps": 1, "max_grad_norm": None, "micro_batch_tokens": 100},
        model={"path": str(toy / "model"), "attention": "padded" if case == "padded" else "packed"},
        cpt={"cross_documents": case == "crossing"},
    )  # fmt: skip
    blocks = pieces(docs, length, cross=case == "crossing")
    rows = plan.step_rows(len(blocks), 6, 42, 0)
    if case == "whole":
        assert sorted(map(len, docs)) == sorted(len(d) for b in blocks for d in b)
    model = t.model64(toy / "model")
    model.zero_grad()
    loss = truth(model, [sequence for row in rows for sequence in blocks[row]])
    loss.backward()
    line = t.metrics(run_dir)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    t.assert_gradients(model, run_dir)


def test_evaluation_sets_and_perplexity(ranks, toy, tmp_path):
    """The validation set beside the training set, and one watched beside both; exact over each."""
    own = t.write_jsonl(tmp_path / "own.jsonl", t.texts(5, "own"))
    run_dir = run(
        ranks, toy, tmp_path, "eval", 2,
        train={"max_steps": 1},
        validation={"at_start": True, "watch": {"own": str(own)}},
    )  # fmt: skip
    line = t.metrics(run_dir)[0]
    with torch.no_grad():
        for path, prefix in ((toy / "text" / "validation.jsonl", "eval_"), (own, "eval_own_")):
            sequences = [s for block in pieces(documents(path), 32) for s in block]
            loss = float(truth(t.model64(toy / "model"), sequences))
            assert line[f"{prefix}loss"] == pytest.approx(loss, rel=1e-6)
            assert line[f"{prefix}perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_sft_watches_other_sets_too(ranks, toy, tmp_path):
    """The validation set under another name has the same loss; DPO refuses."""
    watch = {"watch": {"again": str(toy / "sft" / "validation.jsonl")}, "at_start": True}
    config = t.config(toy, "sft", tmp_path / "s.yaml", train={"max_steps": 1}, validation=watch)
    line = t.metrics(ranks.run("sft", config, f"{tmp_path.name}-sft").run_dir)[0]
    assert line["eval_again_loss"] == line["eval_loss"]
    config = t.config(toy, "dpo", tmp_path / "d.yaml", validation=watch)
    code, text = ranks.fail("dpo", config, f"{tmp_path.name}-dpo")
    assert (code, "validation.watch: not for DPO with dpo.loss=sigmoid" in text) == (78, True)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_dpo_without_a_reference_watches_other_sets_too(ranks, toy, tmp_path, loss):
    """With prompts shared and not: the same metrics of the same rows under both names."""
    for shared in (True, False):
        config = t.config(
            toy, "dpo", tmp_path / f"{shared}.yaml",
            train={"max_steps": 1, "shared_prefix": shared},
            dpo={"loss": loss},
            validation={"at_start": True, "watch": {"again": str(toy / "preference" / "validation.jsonl")}},
        )  # fmt: skip
        line = t.metrics(ranks.run("dpo", config, f"{tmp_path.name}-{loss}-{shared}", world_size=2).run_dir)[
            0
        ]
        again = {name.replace("again_", ""): value for name, value in line.items() if "again_" in name}
        assert again == {name: line[name] for name in again}
        assert again.keys() >= {"eval_loss", "eval_rewards/accuracies"}


@pytest.fixture
def blend(toy, tmp_path):
    """A new source, and a replay of an old one by weight; short epochs."""
    own = t.write_jsonl(tmp_path / "own.jsonl", t.texts(9, "own"))
    return {
        "data": {"train": [str(toy / "text" / "training.jsonl"), str(own)], "max_length": 32},
        "cpt": {"weights": [3, 1]},
        "train": {"max_steps": 9, "micro_batch_size": 2},
        "validation": {"at_start": True, "every": 2, "watch": {"own": str(own)}},
        "checkpoint": {"every": 3},
    }


def test_a_blend_interrupted_twice_equals_undisturbed(ranks, toy, tmp_path, blend):
    whole = run(ranks, toy, tmp_path, "whole", 2, **blend)
    config = t.config(toy, "cpt", tmp_path / "again.yaml", **blend)
    name = f"{tmp_path.name}-again"
    for stop_at in (11, 19):
        job = ranks.run("cpt", config, name, world_size=2, stop_at=stop_at)
        assert attempts.read_all(job.run_dir)[-1]["state"] == "YIELD"
    job = ranks.run("cpt", config, name, world_size=2)
    t.assert_equal_checkpoints(whole, job.run_dir, 9)
    assert (whole / "metrics.jsonl").read_bytes() == (job.run_dir / "metrics.jsonl").read_bytes()


def test_ranks_and_micro_batches_change_nothing(ranks, toy, tmp_path, blend):
    lines = []
    for world_size, size in ((1, 6), (2, 1), (3, 2)):
        blend["train"]["micro_batch_size"] = size
        lines.append(t.metrics(run(ranks, toy, tmp_path, f"w{world_size}", world_size, **blend)))
    for other in lines[1:]:
        for a, b in zip(lines[0], other, strict=True):
            assert a == pytest.approx(b, rel=5e-4, abs=5e-4)


def test_golden_loss_curve(ranks, toy, tmp_path):
    """The same model, texts and seed give these losses; twice on one machine to the last bit."""
    first, second = (run(ranks, toy, tmp_path, name, 2) for name in ("a", "b"))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert [line["loss"] for line in t.metrics(first)] == pytest.approx(GOLDEN, rel=1e-6)


def test_a_store_made_beforehand_and_one_of_another_tokenizer(ranks, toy, tmp_path):
    """data.train names what a first run has prepared: the same losses. With another tokenizer: refused."""
    first = run(ranks, toy, tmp_path, "first", data={"train": str(toy / "text" / "training.jsonl"),
                "max_length": 32, "cache_dir": str(tmp_path / "cache")})  # fmt: skip
    [store] = (tmp_path / "cache").glob("text-*")
    data = {"train": str(store), "max_length": 32}
    again = run(ranks, toy, tmp_path, "again", data=data)
    assert t.metrics(first) == t.metrics(again)
    meta = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**meta, "tokenizer": "0" * 64}))
    ours = meta["tokenizer"][:12]
    config = t.config(toy, "cpt", tmp_path / "other.yaml", data=data)
    code, text = ranks.fail("cpt", config, f"{tmp_path.name}-other")
    assert code == 78
    assert f"data.train: {store} was prepared with another tokenizer (digest 000000000000) than" in text
    assert f"that of {toy / 'model'} ({ours}): prepare it again" in text
    code, text = ranks.fail("sft", config, f"{tmp_path.name}-sft")
    assert code == 78
