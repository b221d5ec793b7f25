"""Reward models: the loss by hand, scores and gradients against fp64, the probe, heads, pads."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from strop import algos, setup
from strop.algos import LARGEST, SMALLEST, rm
from strop.config import Config, DpoConfig, KtoConfig, ModelConfig, RmConfig
from strop.data.batch import Batch, make_batch
from strop.data.store import TokenisedRow, TokenStore
from strop.errors import Diverged, UserError
from strop.loop import Meter
from strop.models import attention, policy, reward
from strop.models.policy import PROBE_TOLERANCE
from strop.models.reward import RewardModel, Scores
from tests.unit.data_helpers import CHATML, tiny_tokenizer
from tests.unit.test_policy import ARCHITECTURES, GPT2, SIZES, leaking, packed_batch

CPU = torch.device("cpu")
SHARING = ["llama", "qwen3", "mistral", "gpt2", "gemma3_text"]


def sizes_of(kind):
    return next(s for k, s, *_ in ARCHITECTURES if k == kind)


def build(kind, sizes, seed=0):
    torch.manual_seed(seed)
    config = reward.scoring_config(AutoConfig.for_model(kind, **sizes), kind)
    lm = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    lm.config.use_cache = False
    return lm


def pairs(scores, margins):
    """A batch of which the loss sees the margins only."""
    empty = torch.zeros(0)
    batch = Batch(empty, empty, empty, empty, np.arange(len(margins)), 1, value_R=torch.tensor(margins))
    return Scores(torch.tensor(scores, requires_grad=True), torch.zeros(len(scores), 0)), batch


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("centre", [None, 0.25])
def test_loss_and_gradient_by_hand(centre):
    """Margins 0 (none given), 0.5 and -0.25; the last pair is a tie."""
    scores = [2.0, 0.5, -1.0, 1.5, 0.75, 0.75]
    out, batch = pairs(scores, [math.nan, 0.5, -0.25])
    config = Config(algo="rm", rm=RmConfig(center_rewards_coefficient=centre))
    total, metrics = rm.loss(out, batch, config)
    total.backward()
    expected, grads = 0.0, []
    for (c, d), m in zip(((2.0, 0.5), (-1.0, 1.5), (0.75, 0.75)), (0.0, 0.5, -0.25)):
        h = c - d - m
        expected += math.log(1 + math.exp(-h)) + (centre or 0) * (c + d) ** 2
        slope, pull = -1 / (1 + math.exp(h)), 2 * (centre or 0) * (c + d)
        grads += [slope + pull, -slope + pull]
    assert float(total.detach()) == pytest.approx(expected, rel=1e-6)
    assert out.score_S.grad.tolist() == pytest.approx(grads, rel=1e-5)
    values = {name: (float(a), float(b)) for name, (a, b) in metrics.items()}
    assert values["accuracy"] == (1.0, 3.0)  # a tie is not accurate, whatever its margin
    assert values["margin"] == pytest.approx((1.5 - 2.5, 3.0))
    assert values["mean_reward"] == pytest.approx((sum(scores), 6.0))
    assert values["min_reward"][0] == -1.0
    assert values["max_reward"][0] == 2.0
    assert metrics["min_reward"][1] is SMALLEST
    assert metrics["max_reward"][1] is LARGEST
    assert rm.count(batch) == 3
    assert rm.rewards(out, batch, config).tolist() == scores  # for the user's own metrics


def test_extreme_scores_give_finite_losses_and_gradients():
    out, batch = pairs([1e4, -1e4, -1e4, 1e4], [math.nan, math.nan])
    total, _ = rm.loss(out, batch, Config(algo="rm"))
    total.backward()
    assert float(total.detach()) == pytest.approx(2e4)
    assert out.score_S.grad.tolist() == [0.0, 0.0, -1.0, 1.0]


class TwoRanks:
    """What this rank says, and another one that says the same plus `other`."""

    def __init__(self, other):
        self.other = other

    def sum(self, values):
        return [2 * v for v in values]

    def max(self, values):
        return [max(v, o) for v, o in zip(values, self.other)]


def test_extremes_over_batches_and_ranks():
    """-2 and 5 are here; another rank has the largest of the negated, 7, so the smallest is -7. A batch of
    weight 0, a dummy, has no say."""
    meter = Meter()
    for low, high, weight in ((-1.0, 5.0, 1.0), (-2.0, 3.0, 1.0), (-99.0, 99.0, 0.0)):
        meter.add({"lo": (torch.tensor(low), SMALLEST), "hi": (torch.tensor(high), LARGEST)}, weight)
        meter.add({"mean": (torch.tensor(4.0), torch.tensor(2.0))}, weight)
    assert meter.reduce(TwoRanks([7.0, 1.0])) == {"lo": -7.0, "hi": 5.0, "mean": 2.0}
    only_dummies = Meter()
    only_dummies.add({"lo": (torch.tensor(1.0), SMALLEST), "mean": (torch.ones(()), torch.ones(()))}, 0.0)
    assert only_dummies.reduce(TwoRanks([3.0])) == {"lo": -3.0}


# --------------------------------------------------------------------------------------------- scores


def own_scores(lm, sequences):
    """fp64 scores by transformers alone: each sequence by itself, with its own attention."""
    lm = lm.double()
    lm.set_attn_implementation("eager")
    return torch.cat([lm(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])


SCORING = [a for a in ARCHITECTURES if a[0] not in ("mamba", "cohere", "granite")]
"""transformers has no sequence classifier for the others."""


@pytest.mark.parametrize(("kind", "sizes", "layout", "head"), SCORING, ids=[a[0] for a in SCORING])
def test_scores_equal_the_models_own(kind, sizes, layout, head):
    lm = build(kind, sizes)
    model = RewardModel(lm).eval()
    model.probe(CPU, torch.float32, "auto")
    if layout is not None:
        assert model.layout == layout
    batch = packed_batch()
    edges = batch.cu_seqlens.tolist()
    ours = {}
    for chosen in {model.layout, "padded"}:
        model.set_layout(chosen, CPU)
        with torch.no_grad():
            ours[chosen] = model(batch).score_S.double()
    with torch.no_grad():
        expected = own_scores(lm, [batch.tokens_T[a:b] for a, b in zip(edges, edges[1:])])
    assert float(expected.std()) > 0.1  # it tells sequences apart
    for chosen, scores in ours.items():
        assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-4), chosen


def write(path, rows):
    return TokenStore.write(path, iter(rows), kind="preference", digest="x")


def random_pairs(vocab=120, seed=5):
    """Prompts and completions of unlike lengths, some beyond the windows of the models."""
    draw = np.random.default_rng(seed)
    rows = []
    shapes = ((9, 3, 8, 0.5), (1, 6, 2, math.nan), (14, 1, 1, 2.0), (3, 12, 10, 0.0))
    for prompt, chosen, rejected, margin in shapes:
        first = draw.integers(3, vocab, prompt)
        sides = [np.concatenate([first, draw.integers(3, vocab, n)]) for n in (chosen, rejected)]
        sides[1][prompt] = (sides[0][prompt] + 1) % vocab
        masked = [(ids, np.arange(len(ids)) >= prompt) for ids in sides]
        rows.append(TokenisedRow("a", 1, masked, value=margin))
    return rows


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", SHARING)
def test_loss_and_gradients_equal_fp64_packed_padded_and_with_shared_prompts(kind, tmp_path):
    lm = build(kind, sizes_of(kind))
    model = RewardModel(lm).eval()
    model.probe(CPU, torch.float32, "packed")
    assert model.shares_prompts(CPU, torch.float32)
    plain = write(tmp_path / "s", random_pairs())
    config = Config(algo="rm", rm=RmConfig(center_rewards_coefficient=0.1))
    found = []
    for store, layout in ((plain, "packed"), (plain, "padded"), (plain.sharing_prompts(), "packed")):
        model.set_layout(layout, CPU)
        batch = make_batch(store, np.arange(store.num_rows))
        total, _ = rm.loss(model(batch), batch, config)
        found.append((float(total.detach()), gradients(lm, total)))
    sequences = [torch.from_numpy(ids.astype(np.int64)) for r in range(4) for ids, _ in plain.sequences(r)]
    scores = own_scores(lm, sequences)
    h = scores[0::2] - scores[1::2] - torch.tensor([0.5, 0.0, 2.0, 0.0], dtype=torch.float64)
    truth = (torch.log1p(torch.exp(-h)) + 0.1 * (scores[0::2] + scores[1::2]) ** 2).sum()
    expected = gradients(lm, truth)
    for total, grads in found:
        assert total == pytest.approx(float(truth.detach()), rel=1e-5)
        for name, grad in expected.items():
            assert float((grads[name] - grad).abs().max()) <= 1e-4 * float(grad.abs().max()), name


def test_a_dummy_batch_reaches_every_weight_with_zeros(tmp_path):
    lm = build("llama", SIZES)
    model = RewardModel(lm).eval()
    model.set_layout("packed", CPU)
    batch = make_batch(write(tmp_path / "s", random_pairs()), np.arange(0))
    total, _ = rm.loss(model(batch), batch, Config(algo="rm"))
    (total * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
def test_the_probe_tells_a_leak_from_rounding(monkeypatch, caplog, kind, head, dtype):
    """Honest attention stays below a third of the tolerance, leaking attention is well above it; a head of
    zeros, to which all sequences look alike, changes nothing about that."""
    lm = build(kind, sizes_of(kind)).to(dtype)
    with torch.no_grad():
        lm.score.weight.mul_(head)
    model = RewardModel(lm).eval()
    both = policy.probe_batch(sizes_of(kind)["vocab_size"], CPU)
    model.set_layout("padded", CPU)
    with torch.no_grad():
        truth = torch.cat([model._compared(one) for one in policy.each_sequence(both)])
        model.set_layout("packed", CPU)
        honest = float((model._compared(both) - truth).abs().mean())
        monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaking)
        leak = float((model._compared(both) - truth).abs().mean())
    assert 3 * honest < PROBE_TOLERANCE[dtype] < leak / 2, (honest, leak)
    with caplog.at_level(logging.WARNING):
        model.probe(CPU, dtype, "auto")
    assert model.layout == "padded"
    assert "sequences side by side see each other" in caplog.text
    with pytest.raises(UserError, match=r"model\.attention: packed does not work for .* see each other"):
        model.probe(CPU, dtype, "packed")


def test_weights_that_are_no_numbers():
    lm = build("llama", SIZES)
    with torch.no_grad():
        lm.model.norm.weight[0] = float("nan")
    with pytest.raises(Diverged, match="scores of LlamaForSequenceClassification are not finite"):
        RewardModel(lm).eval().probe(CPU, torch.float32, "auto")


def test_a_model_that_scores_otherwise_is_found_out():
    lm = build("llama", SIZES)
    lm.score.register_forward_hook(lambda module, args, out: 2 * out + 1)
    with pytest.raises(UserError, match="does not score a sequence by its last token and a matrix"):
        RewardModel(lm).eval().probe(CPU, torch.float32, "auto")


# --------------------------------------------------------------------------------- classes and weights


def test_architectures_without_a_sequence_classifier_are_named():
    for kind, name in (("mamba", "Mamba"), ("cohere", "Cohere")):
        text = f"^model.path: 'x' cannot become a reward model: .* no {name}ForSequenceClassification "
        with pytest.raises(UserError, match=text):
            reward.check_class(AutoConfig.for_model(kind), "x")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    bert = AutoConfig.for_model("bert", **sizes)
    model = AutoModelForSequenceClassification.from_config(reward.scoring_config(bert, "x"))
    with pytest.raises(UserError, match="head of BertForSequenceClassification is not a matrix named score"):
        reward.checked_head(model)


def test_a_classifier_of_several_labels_is_refused():
    config = AutoConfig.for_model("llama", num_labels=3, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="sorts into 3 classes; a reward model has one"):
        reward.check_class(config, "x")


def test_a_new_head_is_drawn_from_the_seed_and_an_old_one_is_kept(tmp_path):
    """A causal model's backbone with a head of standard deviation 1 / sqrt(H + 1); a reward model whole."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | {"hidden_size": 1024}))
    lm.save_pretrained(tmp_path / "lm")
    read = reward.reader(42)(ModelConfig(path=str(tmp_path / "lm")), None)
    again = reward.reader(42)(ModelConfig(path=str(tmp_path / "lm")), None)
    assert torch.equal(read[reward.HEAD], again[reward.HEAD])
    assert not torch.equal(read[reward.HEAD], reward.new_head(1024, 43))
    assert float(read[reward.HEAD].std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(read[f"model.{name}"], tensor), name
    assert read.keys() == {f"model.{name}" for name in lm.model.state_dict()} | {reward.HEAD}
    model = build("llama", SIZES, seed=2)
    model.save_pretrained(tmp_path / "rm")
    old = reward.reader(42)(ModelConfig(path=str(tmp_path / "rm")), None)
    assert torch.equal(old[reward.HEAD], model.score.weight)


def test_a_reward_model_is_neither_policy_nor_reference_of_a_language_model(tmp_path):
    """With tied embeddings it would load, and be trained or compared with as a language model."""
    from transformers import AutoModelForCausalLM

    build("llama", SIZES).save_pretrained(tmp_path / "rm")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path / "lm")
    lm, rm_path = ModelConfig(path=str(tmp_path / "lm")), str(tmp_path / "rm")
    text = f"{rm_path} is no causal language model but a reward model or classifier"
    for algo, config in (
        ("dpo", Config(model=lm, dpo=DpoConfig(reference=rm_path))),
        ("kto", Config(algo="kto", model=lm, kto=KtoConfig(reference=rm_path))),
    ):
        with pytest.raises(UserError, match=rf"^{config.algo}\.reference: {text}"):
            setup._check_names(config, algos.load(algo))
    on_rm = Config(model=ModelConfig(path=rm_path))
    with pytest.raises(UserError, match=rf"^model\.path: {text}"):
        setup._check_names(on_rm, algos.load("dpo"))
    setup._check_names(dataclasses.replace(on_rm, algo="rm"), algos.load("rm"))
    setup._check_names(Config(model=lm), algos.load("dpo"))


def test_a_reward_model_that_lacks_its_head_is_damaged(tmp_path):
    from safetensors.torch import load_file, save_file

    build("llama", SIZES).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[reward.HEAD]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing, such as score\.weight"):
        reward.reader(42)(ModelConfig(path=str(tmp_path)), None)


def test_the_pad_token_never_ends_a_sequence():
    """eos is </s>, and so is pad; ChatML ends with a line break. Plain text ends with </s>."""
    config = AutoConfig.for_model("gpt2", **GPT2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor")
    reward.set_pad_token(config, tokenizer)
    assert tokenizer.pad_token == "<s>"
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    sound = tiny_tokenizer()
    sound.pad_token = "<|im_start|>"
    reward.set_pad_token(config, sound)
    assert config.pad_token_id == sound.pad_token_id == 2
    bare = dataclasses.make_dataclass("Bare", [])()
    bare.added_tokens_decoder, bare.chat_template = {}, None
    bare.pad_token = bare.unk_token = bare.bos_token = None
    bare.eos_token_id = 1
    with pytest.raises(UserError, match=r"model\.tokenizer has no special token to pad with"):
        reward.set_pad_token(config, bare)
