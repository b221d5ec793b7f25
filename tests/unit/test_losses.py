"""DPO, KTO and SFT losses and their metrics against formulas in fp64, pair by pair in plain Python."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from strop import algos, config_check, ops, optim
from strop.algos import dpo, kto, sft
from strop.config import ALGOS, Config, DpoConfig, KtoConfig, OptimConfig, trains_reward_model
from strop.data.batch import Batch
from strop.loop import Meter, _forward
from strop.models.policy import Output
from strop.models.reward import Scores
from strop.ops import native
from strop.ops import preference as preference_module

LENGTHS = [(4, 1), (9, 6), (5, 2), (12, 11), (3, 1), (8, 3)]
"""(tokens, of them trained at the end) of chosen, rejected, chosen, ...: three pairs of unlike lengths."""


def example(spread=3.0):
    generator = torch.Generator().manual_seed(0)
    total = sum(n for n, _ in LENGTHS)
    trained = torch.cat([torch.arange(n) >= n - k for n, k in LENGTHS])
    logp, ref = (-spread * torch.rand(total, generator=generator) * trained for _ in range(2))
    stats = [torch.rand(total, generator=generator) * trained for _ in range(3)]
    edges = torch.tensor([0, *np.cumsum([n for n, _ in LENGTHS])], dtype=torch.int32)
    batch = Batch(
        tokens_T=torch.zeros(total, dtype=torch.int64), positions_T=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=edges, trained_T=trained, rows=np.arange(3), max_seqlen=12, ref_logp_T=ref,
    )  # fmt: skip
    return Output(logp.requires_grad_(), *stats), batch


def pieces(values, batch):
    """Values of the trained tokens of each sequence, as lists of floats."""
    edges = batch.cu_seqlens.tolist()
    return [values[a:b][batch.trained_T[a:b]].tolist() for a, b in zip(edges[:-1], edges[1:])]


def log_sigmoid(z):
    return -math.log1p(math.exp(-z))


def sigma(z):
    return 1 / (1 + math.exp(-z))


def preference(kind, c, d, beta, eps, delta=0.0):
    """The papers' formulas in Python's floats."""
    h, win, lose = c - d, beta * c, beta * d
    return {
        "sigmoid": lambda: -(1 - eps) * log_sigmoid(beta * h) - eps * log_sigmoid(-beta * h),
        "sigmoid_norm": lambda: -(1 - eps) * log_sigmoid(beta * h) - eps * log_sigmoid(-beta * h),
        "robust": lambda: (-(1 - eps) * log_sigmoid(beta * h) + eps * log_sigmoid(-beta * h)) / (1 - 2 * eps),
        "hinge": lambda: max(0.0, 1 - beta * h),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        # reverse KL between the model's preference and the smoothed label
        "exo_pair": lambda: (
            sigma(beta * h) * math.log(sigma(beta * h) / (1 - eps))
            + sigma(-beta * h) * math.log(sigma(-beta * h) / eps)
        ),
        "nca_pair": lambda: -log_sigmoid(win) - (log_sigmoid(-win) + log_sigmoid(-lose)) / 2,
        "bco_pair": lambda: -log_sigmoid(win - delta) - log_sigmoid(-(lose - delta)),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (d + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: (1 - sigma(win)) + sigma(lose),
        "apo_down": lambda: sigma(win) + (1 - sigma(beta * h)),
        "simpo": lambda: -(1 - eps) * log_sigmoid(beta * h - delta) - eps * log_sigmoid(delta - beta * h),
        "orpo": lambda: beta * math.log(1 + odds(d) / odds(c)),
    }[kind]()


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", preference_module.KINDS)
def test_every_preference_loss_and_its_derivative(monkeypatch, kind, backend):
    """P: no pair, one, some; ratios on both sides of every kink; derivatives by central differences."""
    if backend == "reference":
        monkeypatch.setattr(native, "is_loaded", lambda device: False)
    assert ops.dpo_loss(torch.zeros(0, 2), kind, 0.3, 0.1).shape == (0,)
    pairs = [(0.0, 0.0), (3.0, -2.0), (-4.0, 1.5), (0.3, 0.4), (20.0, 9.0), (2.0, -9.0)]
    if kind == "orpo":  # of probabilities; the last ones are nearly 1 and nearly 0
        pairs = [(-0.7, -0.7), (-3.0, -0.2), (-0.1, -9.0), (-20.0, -0.5), (-1e-3, -2e-3), (-30.0, -1e-3)]
    for chosen in (pairs, pairs[:1]):
        ratio = torch.tensor(chosen, requires_grad=True)
        losses = ops.dpo_loss(ratio, kind, 0.3, 0.1, 0.25)
        (losses * torch.arange(1.0, len(chosen) + 1)).sum().backward()
        for p, (c, d) in enumerate(chosen):
            c, d = ratio[p].tolist()

            def f(c, d):
                return preference(kind, c, d, 0.3, 0.1, 0.25)

            assert float(losses[p].detach()) == pytest.approx(f(c, d), rel=2e-6, abs=2e-7)
            s = 1e-5 if kind != "orpo" else 1e-6
            slopes = [(f(c + s, d) - f(c - s, d)) / (2 * s), (f(c, d + s) - f(c, d - s)) / (2 * s)]
            assert (ratio.grad[p] / (p + 1)).tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-6)


def test_bad_preference_arguments_are_named():
    ratio = torch.zeros(3, 2)
    for bad, message in (
        ((ratio[:, :1], "sigmoid", 0.1), r"ratio must be \[P,2\], not \(3, 1\)"),
        ((ratio, "kto", 0.1), "kind must be one of sigmoid, .*, not kto"),
        ((ratio, "sigmoid", 0.0), "beta must be above 0, not 0"),
        ((ratio, "sigmoid", math.inf), "beta must be above 0, not inf"),
        ((ratio, "sigmoid", 0.1, 0.5), "label_smoothing must be at least 0 and below 0.5 for sigmoid"),
        ((ratio, "exo_pair", 0.1), "label_smoothing must be above 0 and below 0.5 for exo_pair, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.dpo_loss(*bad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss": "hinge", "beta": 0.3},
        {"loss": "ipo", "beta": 0.5},
        {"loss": "sigmoid_norm", "beta": 2.0},
        {"loss": "exo_pair", "label_smoothing": 0.05},
        {"loss": "nca_pair"},
        {"loss": "sppo_hard", "beta": 0.5},
        {"loss": "apo_zero"},
        {"loss": "apo_down", "average_log_probs": True},
        {"average_log_probs": True},
        {"loss": "hinge", "average_log_probs": True},
        {"sft_loss_weight": 0.7, "preference_loss_weight": 0.4},
        {"sft_loss_weight": 1.0, "average_log_probs": True, "beta": 1.3},
        {"preference_loss_weight": 0.0, "sft_loss_weight": 1.0},
        {"loss": "bco_pair", "beta": 0.3},
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.5},
        {"loss": "simpo", "beta": 2.5, "simpo_gamma": 0.0, "label_smoothing": 0.1, "sft_loss_weight": 0.3},
        {"loss": "orpo", "beta": 0.25},
        {"loss": "orpo", "sft_loss_weight": 0.0},
    ],
    ids=str,
)
def test_dpo_loss_and_gradient(options):
    out, batch = example()
    cfg = DpoConfig(**options)
    free = cfg.loss in ("simpo", "orpo")
    batch = dataclasses.replace(batch, ref_logp_T=None if free else batch.ref_logp_T, baseline=0.4)
    assert dpo.needs_reference(Config(dpo=cfg)) == (not free)
    sft_weight = (cfg.loss == "orpo") if cfg.sft_loss_weight is None else cfg.sft_loss_weight
    total, metrics = dpo.loss(out, batch, Config(dpo=cfg))

    def by_hand(logp):
        """Sum over the pairs."""
        policy, ref = pieces(logp, batch), pieces(0 * logp if free else batch.ref_logp_T, batch)
        losses, prefs, nlls = [], [], []
        for c, d in ((0, 1), (2, 3), (4, 5)):
            means = cfg.average_log_probs or cfg.loss in ("ipo", "sigmoid_norm", "simpo", "orpo")
            ratios = [
                (math.fsum(policy[s]) - math.fsum(ref[s])) / (len(policy[s]) if means else 1) for s in (c, d)
            ]
            delta = cfg.simpo_gamma if cfg.loss == "simpo" else 0.4
            prefs.append(preference(cfg.loss, *ratios, cfg.beta, cfg.label_smoothing, delta))
            nlls.append(-math.fsum(policy[c]) / len(policy[c]))
            losses.append(cfg.preference_loss_weight * prefs[-1] + sft_weight * nlls[-1])
        return math.fsum(losses), math.fsum(prefs), math.fsum(nlls)

    expected = by_hand(out.logp_T.detach().double())
    assert float(total.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert float(metrics["preference_loss"][0]) == pytest.approx(expected[1], rel=1e-5)
    assert ("sft_loss" in metrics) == (sft_weight > 0)
    if sft_weight:
        assert float(metrics["sft_loss"][0]) == pytest.approx(expected[2], rel=1e-5)
    total.backward()
    # Central differences of the formula. (Where nothing is trained the policy gives a constant 0.)
    for token in batch.trained_T.nonzero()[::3, 0].tolist():
        step = torch.zeros(len(batch.tokens_T), dtype=torch.float64)
        step[token] = 1e-5
        base = out.logp_T.detach().double()
        slope = (by_hand(base + step)[0] - by_hand(base - step)[0]) / 2e-5
        assert float(out.logp_T.grad[token]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert dpo.count(batch) == 3


def test_dpo_metrics():
    out, batch = example()
    metrics = dpo.loss(out, batch, Config(dpo=DpoConfig(beta=0.25)))[1]
    policy, ref = (pieces(x.detach().double(), batch) for x in (out.logp_T, batch.ref_logp_T))
    ratio = [0.25 * (sum(p) - sum(r)) for p, r in zip(policy, ref)]
    chosen, rejected = ratio[0::2], ratio[1::2]
    flat = {name: pieces(x, batch) for name, x in (("entropy", out.entropy_T), ("mean", out.mean_logit_T))}
    expected = {
        "rewards/chosen": (sum(chosen), 3),
        "rewards/rejected": (sum(rejected), 3),
        "rewards/margins": (sum(chosen) - sum(rejected), 3),
        "rewards/accuracies": (sum(c > d for c, d in zip(chosen, rejected)), 3),
        "logps/chosen": (sum(map(sum, policy[0::2])), 3),
        "logps/rejected": (sum(map(sum, policy[1::2])), 3),
        "logits/chosen": (sum(map(sum, flat["mean"][0::2])), 1 + 2 + 1),
        "logits/rejected": (sum(map(sum, flat["mean"][1::2])), 6 + 11 + 3),
        "entropy": (sum(map(sum, flat["entropy"])), 24),
        "mean_token_accuracy": (float(out.correct_T.sum()), 24),
    }
    for name, (total, count) in expected.items():
        assert float(metrics[name][0]) == pytest.approx(total, rel=1e-5, abs=1e-6), name
        assert float(metrics[name][1]) == count, name


def test_metrics_without_a_reference():
    """As TRL's CPO and ORPO trainers: log-probs are means over the tokens, rewards β times these."""
    out, batch = example()
    batch = dataclasses.replace(batch, ref_logp_T=None)
    means = [sum(p) / len(p) for p in pieces(out.logp_T.detach().double(), batch)]
    for loss in ("simpo", "orpo"):
        metrics = dpo.loss(out, batch, Config(dpo=DpoConfig(beta=0.25, loss=loss)))[1]
        for i, side in enumerate(("chosen", "rejected")):
            assert float(metrics[f"logps/{side}"][0]) == pytest.approx(sum(means[i::2]), rel=1e-5)
            assert float(metrics[f"rewards/{side}"][0]) == pytest.approx(0.25 * sum(means[i::2]), rel=1e-5)


def test_the_mean_reward_that_bco_remembers():
    means = {"rewards/chosen": 1.5, "rewards/rejected": -0.5}
    assert dpo.running_reward(means, Config(dpo=DpoConfig(loss="bco_pair"))) == 0.5
    assert dpo.running_reward(means, Config()) is None


def unpaired(spread=3.0):
    """The six sequences as rows; labels in no order."""
    out, batch = example(spread)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    return out, dataclasses.replace(batch, rows=np.arange(6), value_R=labels)


@pytest.mark.parametrize("baseline", [0.7, -0.7])
@pytest.mark.parametrize(
    "cfg", [KtoConfig(), KtoConfig(beta=0.5, desirable_weight=1.3, undesirable_weight=0.6)], ids=str
)
def test_kto_loss_and_gradient(cfg, baseline):
    """A baseline below 0 counts as 0. (apo_zero_unpaired measures none: its baseline is 0.)"""
    out, batch = unpaired()
    batch = dataclasses.replace(batch, baseline=baseline)
    total, metrics = kto.loss(out, batch, Config(algo="kto", kto=cfg))
    z0 = max(0.0, baseline)

    def by_hand(logp):
        policy, ref = pieces(logp, batch), pieces(batch.ref_logp_T, batch)
        ratios = [math.fsum(p) - math.fsum(r) for p, r in zip(policy, ref)]
        good = [cfg.desirable_weight * (1 - sigma(cfg.beta * (ratios[i] - z0))) for i in (0, 3, 4)]
        bad = [cfg.undesirable_weight * (1 - sigma(cfg.beta * (z0 - ratios[i]))) for i in (1, 2, 5)]
        return math.fsum(good + bad)

    base = out.logp_T.detach().double()
    assert float(total.detach()) == pytest.approx(by_hand(base), rel=1e-5)
    assert kto.count(batch) == 6
    assert float(metrics["kl"][0] / metrics["kl"][1]) == pytest.approx(z0, rel=1e-12)
    total.backward()
    for token in batch.trained_T.nonzero()[::3, 0].tolist():
        step = torch.zeros(len(batch.tokens_T), dtype=torch.float64)
        step[token] = 1e-5
        slope = (by_hand(base + step) - by_hand(base - step)) / 2e-5
        assert float(out.logp_T.grad[token]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_kto_metrics_and_baseline():
    out, batch = unpaired()
    cfg = Config(algo="kto", kto=KtoConfig(beta=0.25))
    metrics = kto.loss(out, batch, cfg)[1]
    policy, ref = (pieces(x.detach().double(), batch) for x in (out.logp_T, batch.ref_logp_T))
    ratio = [sum(p) - sum(r) for p, r in zip(policy, ref)]
    logits = pieces(out.mean_logit_T, batch)
    for side, own in (("chosen", (0, 3, 4)), ("rejected", (1, 2, 5))):
        expected = {
            f"rewards/{side}": (sum(0.25 * ratio[i] for i in own), 3),
            f"logps/{side}": (sum(sum(policy[i]) for i in own), 3),
            f"logits/{side}": (sum(sum(logits[i]) for i in own), sum(len(logits[i]) for i in own)),
        }
        for name, (total, count) in expected.items():
            assert float(metrics[name][0]) == pytest.approx(total, rel=1e-5), name
            assert float(metrics[name][1]) == count, name
    total, count = kto.kl(out, batch, cfg)
    assert (float(total.detach()), count) == (pytest.approx(sum(ratio), rel=1e-5), 6)
    assert kto.derived({"rewards/chosen": 2.0, "rewards/rejected": 0.5}) == {"rewards/margins": 1.5}
    assert kto.derived({"rewards/chosen": 2.0}) == {}


@pytest.mark.parametrize("algo", ALGOS)
def test_metrics_that_a_configuration_may_name_are_those_that_there_are(algo):
    """The loop adds the loss itself; sft_loss is there where it has a weight."""
    out, batch = unpaired() if algo == "kto" else example()
    if trains_reward_model(algo):
        out = Scores(torch.arange(6.0), torch.zeros(6, 0))
        batch = dataclasses.replace(batch, value_R=torch.full((3,), torch.nan))
    own = algos.load(algo)
    metrics = own.loss(out, batch, Config(algo=algo, dpo=DpoConfig(sft_loss_weight=0.5)))[1]
    derived = own.derived(dict.fromkeys(["loss", *metrics], 0.0))
    assert sorted(config_check.METRICS[algo]) == sorted(["loss", *metrics, *derived])


class NoCopies(TorchFunctionMode):
    """Refuses what makes a tensor of a number of the host: on a GPU that waits for all work before it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algo", ALGOS)
def test_a_step_copies_no_numbers_to_its_device(algo):
    out, batch = unpaired() if algo == "kto" else example()
    weight = torch.nn.Parameter(torch.ones(2))
    if trains_reward_model(algo):
        out = Scores(torch.arange(6.0), torch.zeros(6, 0))
        batch = dataclasses.replace(batch, value_R=torch.full((3,), torch.nan))
    own, meter, optimizer = (
        algos.load(algo),
        Meter(),
        optim.build(OptimConfig(), torch.nn.ParameterList([weight])),
    )
    trainer = SimpleNamespace(
        algo=own, config=Config(algo=algo), dist=SimpleNamespace(device=torch.device("cpu")),
        policy=lambda batch, parted: out,
    )  # fmt: skip
    with NoCopies():
        metrics = _forward(trainer, batch, 0.0)[1]
        meter.add(metrics)
        meter.add(metrics, 0.0)
        optim.materialise(optimizer)
        weight.grad = torch.full((2,), 8.0)
        optim.step(optimizer, 0.1, 0.5)
    assert float(metrics["loss"][1]) == own.count(batch)
    assert torch.allclose(optimizer.state[weight]["exp_avg"], torch.tensor(0.4))  # (1 - 0.9) * 8 * 0.5


@pytest.mark.parametrize("algo", ALGOS)
def test_an_algorithm_has_no_function_that_nobody_calls(algo):
    """A mistyped optional one would be ignored in silence."""
    module = importlib.import_module(f"strop.algos.{algo}")
    own = {name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"}
    assert own <= {field.name for field in dataclasses.fields(algos.Algorithm)}


def test_a_tie_is_ln_2_and_not_accurate():
    out, batch = example()
    batch = dataclasses.replace(batch, ref_logp_T=out.logp_T.detach().clone())
    total, metrics = dpo.loss(out, batch, Config())
    assert float(total.detach()) == pytest.approx(3 * math.log(2), rel=1e-7)
    assert float(metrics["rewards/accuracies"][0]) == 0.0
    assert float(metrics["rewards/margins"][0]) == 0.0


@pytest.mark.parametrize("kind", preference_module.KINDS)
def test_extreme_ratios_give_finite_losses_and_gradients(kind):
    """A margin of ±2000 nats: a sigmoid written out would overflow."""
    c = torch.tensor([1000.0, -1000.0], requires_grad=True)
    value = ops.dpo_loss(torch.stack([c, -c.detach()], 1), kind, 1.0, 0.1).sum()
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert c.grad.isfinite().all()


def test_sft_loss():
    out, batch = example()
    total, metrics = sft.loss(out, batch, Config(algo="sft"))
    assert float(total.detach()) == pytest.approx(
        -math.fsum(map(math.fsum, pieces(out.logp_T.detach(), batch)))
    )
    assert float(metrics["entropy"][1]) == sft.count(batch) == 24
    total.backward()
    assert out.logp_T.grad.unique().tolist() == [-1.0]
