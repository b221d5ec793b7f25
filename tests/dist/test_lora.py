"""Runs with adapters against formulas in fp64, on any number of ranks, in any batches, and interrupted.

The truth runs each sequence alone through transformers in fp64, adds s B A (mask x) to the outputs of its
linear layers by hooks, and draws the masks by an implementation of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from strop.data import plan
from strop.slurm import attempts
from tests import toy as t

LORA = {"rank": 4, "alpha": 6.0}
SCALE = 6.0 / 4
LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]
OPTIM = {"lr": 2e-2, "schedule": "constant"}
"""Large, so that adapters matter after a step."""


@pytest.fixture(scope="module")
def untied(toy, tmp_path_factory):
    """The toy with a head of its own."""
    directory = tmp_path_factory.mktemp("untied")
    t.make(directory)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    model.config.tie_word_embeddings = False
    torch.manual_seed(5)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    model.save_pretrained(directory / "model")
    return directory


def run(ranks, toy, tmp_path, algo, name, world_size=1, words=(), **sections):
    sections = {"lora": LORA, "optim": OPTIM, **sections}
    config = t.config(toy, algo, tmp_path / f"{name}.yaml", **sections)
    return ranks.run(algo, config, f"{tmp_path.name}-{name}", *words, world_size=world_size).run_dir


# ------------------------------------------------------------------------------------------- the truth


def splitmix(x):
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def kept(seed, step, row, length, layer, num_in, p):
    """Which inputs of an adapter survive, bool [length, num_in], with Python's integers and unsigned ones."""
    keys = []
    for place in range(length):
        key = splitmix(seed)
        for number in (step, row, place):
            key = splitmix(key ^ ((number + 1) * 0x9E3779B97F4A7C15) % 2**64)
        keys.append(key >> 32)
    salt = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")

    def murmur(h):  # its published finaliser, less the last shift
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        return (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)

    feature = murmur((np.arange(num_in, dtype=np.uint32) * np.uint32(0x9E3779B9)) ^ np.uint32(salt))
    drawn = murmur(np.array(keys, dtype=np.uint32)[:, None] ^ feature[None, :])
    # signed comparison: the lowest signed number is 2^31 as an unsigned one
    return (drawn ^ np.uint32(2**31)).astype(np.int64) >= round(p * 2**32)


class Truth:
    """transformers in fp64 with adapters by hooks."""

    def __init__(self, model_dir, weights, scale=SCALE, p=0.0, whole=()):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
        self.model.requires_grad_(False)
        self.weights = {n: w.double().requires_grad_() for n, w in weights.items() if ".lora_" in n}
        self.p, self.row, self.step = p, None, None
        layers = {re.sub(r"\.lora_[AB]\.weight", "", n) for n in self.weights}
        for layer in layers:
            a, b = (self.weights[f"{layer}.lora_{x}.weight"] for x in "AB")
            self.model.get_submodule(layer).register_forward_hook(self._hook(layer, a, b, scale))
        for name in whole:
            parameter = self.model.get_parameter(name)
            parameter.data = weights[name].double()
            parameter.requires_grad_(True)
            self.weights[name] = parameter

    def _hook(self, layer, a, b, scale):
        def add(module, args, output):
            x = args[0]
            if self.p and self.row is not None:
                keep = kept(42, self.step, self.row, x.shape[1], layer, x.shape[2], self.p)
                x = x * torch.from_numpy(keep) / (1 - self.p)
            return output + scale * (x @ a.T) @ b.T

        return add

    def logps(self, store, row, step):
        self.row, self.step = int(row), step
        return [t.token_logprobs(self.model, *seq)[0] for seq in store.sequences(row)]


def step_loss(truth, store, algo, step, reference=None):
    """Mean loss of optimiser step `step` (from 0)."""
    rows = plan.step_rows(store.num_rows, 6, 42, step)
    logps = {int(row): truth.logps(store, row, step) for row in rows}
    if algo == "sft":
        return -torch.cat([x for seqs in logps.values() for x in seqs]).mean()
    losses = []
    for row, (chosen, rejected) in logps.items():
        c, d = (t.token_logprobs(reference, *seq)[0].sum() for seq in store.sequences(row))
        losses.append(-F.logsigmoid(0.1 * ((chosen.sum() - c) - (rejected.sum() - d))))
    return torch.stack(losses).mean()


def weights_of(saved):
    return {name.removeprefix("model."): x for name, x in saved.items() if name.startswith("model.")}


# --------------------------------------------------------------------------------------------- one step


CASES = [
    ("sft", 1, {}, {}),
    ("sft", 2, {"dropout": 0.3}, {}),
    ("dpo", 1, {"dropout": 0.3}, {}),
    ("dpo", 2, {}, {}),
    ("sft", 2, {"dropout": 0.3}, {"model": "padded"}),
    ("sft", 2, {"dropout": 0.3}, {"train": {"activation_checkpointing": "full"}}),
    ("sft", 3, {"targets": ["q_proj", "model.layers.1.mlp.up_proj"], "rank": 1, "alpha": 1.5}, {}),
    ("dpo", 2, {"targets": r".*layers\.0.*(k|down)_proj", "rslora": True, "alpha": 3.0}, {}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_second_step_equals_fp64(ranks, toy, tmp_path, case):
    """At the first one B is 0, and A has no gradient. AdamW's first moments of two steps give the second
    gradient. Rank 1 on three ranks leaves two of them without a piece of A."""
    algo, world_size, lora, other = CASES[case]
    lora = {**LORA, **lora}
    model = {"path": str(toy / "model"), "attention": other.get("model", "auto")}
    train = {"max_steps": 2, "max_grad_norm": None, "micro_batch_size": 2, **other.get("train", {})}
    run_dir = run(
        ranks, toy, tmp_path, algo, "two", world_size,
        lora=lora, model=model, train=train, checkpoint={"every": 1},
    )  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    scale = lora["alpha"] / (math.sqrt(lora["rank"]) if lora.get("rslora") else lora["rank"])
    truth = Truth(toy / "model", weights_of(before), scale, lora.get("dropout", 0.0))
    store = t.stores(run_dir)["train"]
    loss = step_loss(truth, store, algo, 1, t.model64(toy / "model"))
    loss.backward()
    line = t.metrics(run_dir)[1]
    assert line["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert abs(line["loss"] - t.metrics(run_dir)[0]["loss"]) > 1e-3
    norm = math.sqrt(sum(float(w.grad.square().sum()) for w in truth.weights.values()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert len(truth.weights) == {6: 2 * 3, 7: 2 * 2}.get(case, 28)
    for name, w in truth.weights.items():
        key = f"optim.{name}.exp_avg"
        ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
        assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max())), name
        assert w.grad.any()


def test_head_adapter_and_whole_modules_are_really_trained(ranks, untied, tmp_path):
    """Head by an adapter with dropout, the embedding and one norm whole; also the gradient of each."""
    whole = ["model.embed_tokens.weight", "model.norm.weight"]
    lora = LORA | {"targets": ["lm_head", "v_proj"], "modules_to_save": ["embed_tokens", "model.norm"]}
    run_dir = run(
        ranks, untied, tmp_path, "sft", "head", 2, lora=lora | {"dropout": 0.2},
        train={"max_steps": 2, "max_grad_norm": None, "micro_batch_size": 2}, checkpoint={"every": 1},
    )  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    truth = Truth(untied / "model", weights_of(before), p=0.2, whole=whole)
    loss = step_loss(truth, t.stores(run_dir)["train"], "sft", 1)
    loss.backward()
    assert t.metrics(run_dir)[1]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert sorted(truth.weights) == sorted(
        [*whole, *(f"{n}.lora_{x}.weight" for n in ("lm_head", *LAYERS[2::7]) for x in "AB")]
    )
    for name, w in truth.weights.items():
        key = f"optim.{name}.exp_avg"
        ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
        assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max())), name


def test_a_tied_embedding_trained_whole_is_the_head_too(ranks, toy, tmp_path):
    lora = LORA | {"modules_to_save": "embed_tokens"}
    run_dir = run(ranks, toy, tmp_path, "sft", "tied", 2, lora=lora, checkpoint={"every": 1},
                  train={"max_steps": 2, "max_grad_norm": None})  # fmt: skip
    before, after = t.checkpoint(run_dir, 1), t.checkpoint(run_dir, 2)
    truth = Truth(toy / "model", weights_of(before), whole=["model.embed_tokens.weight"])
    loss = step_loss(truth, t.stores(run_dir)["train"], "sft", 1)
    loss.backward()
    assert t.metrics(run_dir)[1]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    w = truth.weights["model.embed_tokens.weight"]
    key = "optim.model.embed_tokens.weight.exp_avg"
    ours = (after[key].double() - 0.9 * before[key].double()) / 0.1
    assert torch.allclose(ours, w.grad, rtol=1e-3, atol=2e-5 * float(w.grad.abs().max()))


def test_a_is_drawn_from_seed_and_name(ranks, toy, tmp_path):
    """Nothing is learnt at a learning rate of 0, so the checkpoint holds what was drawn: by its formula, the
    same on any number of ranks, other numbers for another layer and another seed."""
    drawn = []
    for world_size, words in ((1, ()), (3, ()), (1, ("train.seed=43",))):
        run_dir = run(
            ranks, toy, tmp_path, "sft", f"drawn{len(drawn)}", world_size, words,
            train={"max_steps": 1}, optim={"lr": 0.0},
        )  # fmt: skip
        drawn.append(t.checkpoint(run_dir, 1))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0] if name.startswith("model."))
    seen = []
    for layer in LAYERS:
        a = drawn[0][f"model.{layer}.lora_A.weight"]
        seed = int.from_bytes(hashlib.sha256(f"42 {layer}".encode()).digest()[:8], "big") >> 1
        bound = a.shape[1] ** -0.5
        own = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed)) * 2 * bound - bound
        assert torch.allclose(a, own, atol=1e-6)
        assert not torch.equal(a, drawn[2][f"model.{layer}.lora_A.weight"])
        assert not drawn[0][f"model.{layer}.lora_B.weight"].any()
        assert not any(a.shape == b.shape and torch.equal(a, b) for b in seen)
        seen.append(a)


# --------------------------------------------------------------------------------- ranks, batches, rounds


@pytest.mark.parametrize("algo", ["dpo", "sft", "cpt"])
def test_ranks_and_batches_change_nothing_with_dropout(ranks, toy, tmp_path, algo):
    variants = [
        (1, {}, "packed"), (2, {}, "packed"), (4, {}, "packed"), (1, {"micro_batch_size": 1}, "packed"),
        (2, {"micro_batch_size": 2}, "padded"), (1, {"shared_prefix": False}, "packed"),
    ]  # fmt: skip
    lines = []
    for i, (world_size, train, attention) in enumerate(variants):
        run_dir = run(
            ranks, toy, tmp_path, algo, f"v{i}", world_size,
            lora=LORA | {"dropout": 0.4}, optim={"lr": 1e-3, "schedule": "constant"},
            train=train, model={"path": str(toy / "model"), "attention": attention},
            validation={"at_start": True, "at_end": True},
        )  # fmt: skip
        lines.append(t.metrics(run_dir))
    for other, variant in zip(lines[1:], variants[1:]):
        for a, b in zip(lines[0], other, strict=True):
            tolerance = 3e-6 if a["step"] <= 1 else 2e-4
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), (variant, a["step"])
    plain = run(ranks, toy, tmp_path, algo, "plain", optim={"lr": 1e-3, "schedule": "constant"},
                validation={"at_start": True, "at_end": True})  # fmt: skip
    without = t.metrics(plain)
    assert lines[0][3]["loss"] != pytest.approx(without[3]["loss"], rel=1e-5)
    assert lines[0][0] == pytest.approx(without[0], rel=2e-6, abs=2e-6)


def test_validation_drops_nothing(ranks, toy, tmp_path):
    """After a step in which adapters came to matter, the validation's loss is that of the weights."""
    run_dir = run(
        ranks, toy, tmp_path, "sft", "eval", 2,
        lora=LORA | {"dropout": 0.5}, train={"max_steps": 1}, validation={"at_end": True},
    )  # fmt: skip
    truth = Truth(toy / "model", weights_of(t.checkpoint(run_dir, 1)))
    store = t.stores(run_dir)["validation"]
    with torch.no_grad():
        logps = [x for row in range(store.num_rows) for x in truth.logps(store, row, 0)]
        before = [
            t.token_logprobs(t.model64(toy / "model"), *s)[0]
            for row in range(7)
            for s in store.sequences(row)
        ]
    found = t.metrics(run_dir)[-1]["eval_loss"]
    assert found == pytest.approx(float(-torch.cat(logps).mean()), rel=2e-6)
    assert abs(found + float(torch.cat(before).mean())) > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_dpo_begins_at_ln_2_with_the_reference_of_full_training(ranks, toy, tmp_path, precision, world_size):
    """h is 0 to the last bit, with dropout too, since B is 0; full training reads the very same file."""
    data = {"train": str(toy / "preference"), "max_length": 256}
    sections = {"train": {"precision": precision, "max_steps": 1}, "validation": {"at_start": True}}
    choices = []
    for name, lora in (("lora", LORA | {"dropout": 0.5}), ("full", {})):
        own = data | {"cache_dir": str(tmp_path / name)}
        run_dir = run(ranks, toy, tmp_path, "dpo", name, world_size, lora=lora, data=own, **sections)
        choices.append(json.loads((run_dir / "data" / "choices.json").read_text())["reference"])
        evaluation, first = t.metrics(run_dir)
        for line, prefix in ((evaluation, "eval_"), (first, "")):
            assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-7)
            assert line[f"{prefix}rewards/margins"] == line[f"{prefix}rewards/chosen"] == 0.0
    for kind in ("train", "validation"):
        a, b = (np.load(choice[kind]) for choice in choices)
        assert choices[0][kind].rpartition("/")[2] == choices[1][kind].rpartition("/")[2]
        assert np.array_equal(a, b, equal_nan=True)
        assert np.isfinite(a).any()


def test_another_model_as_reference(ranks, toy, tmp_path):
    """Its log-probs, not the base's; and the base's weights are back afterwards."""
    other = tmp_path / "other"
    torch.manual_seed(1)
    model = t.llama(t.model64(toy / "model").config.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(other)
    run_dir = run(
        ranks, toy, tmp_path, "dpo", "other", 2, train={"max_steps": 1}, dpo={"reference": str(other)}
    )
    store, base, reference = t.stores(run_dir)["train"], t.model64(toy / "model"), t.model64(other)
    losses = []
    for row in plan.step_rows(store.num_rows, 6, 42, 0):
        h = [
            t.token_logprobs(base, *seq)[0].sum() - t.token_logprobs(reference, *seq)[0].sum()
            for seq in store.sequences(row)
        ]
        losses.append(-F.logsigmoid(0.1 * (h[0] - h[1])))
    expected = float(torch.stack(losses).mean().detach())
    assert abs(expected - math.log(2)) > 1e-3
    assert t.metrics(run_dir)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_low_precision_follows_fp32(ranks, toy, tmp_path):
    """The first steps' losses within what the compute type rounds (fp16 11 bits, bf16 8)."""
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        run_dir = run(
            ranks, toy, tmp_path, "sft", precision, 2, train={"max_steps": 3, "precision": precision}
        )
        losses[precision] = [line["loss"] for line in t.metrics(run_dir)]
    assert losses["fp32"][2] < losses["fp32"][0] - 0.1
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=4e-3)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=3e-2)


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
