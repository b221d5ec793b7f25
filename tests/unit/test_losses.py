"""DPO and SFT losses and their metrics against formulas in fp64, pair by pair in plain Python."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch

from strop import config_check, ops
from strop.algos import dpo, sft
from strop.config import ALGOS, SCORING, Config, DpoConfig
from strop.data.batch import Batch
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
    }[kind]()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", preference_module.KINDS)
def test_every_preference_loss_and_its_derivative(monkeypatch, kind, backend):
    """P: no pair, one, some; ratios on both sides of every kink; derivatives by central differences."""
    if backend == "reference":
        monkeypatch.setattr(native, "is_loaded", lambda device: False)
    assert ops.dpo_loss(torch.zeros(0, 2), kind, 0.3, 0.1).shape == (0,)
    pairs = [(0.0, 0.0), (3.0, -2.0), (-4.0, 1.5), (0.3, 0.4), (20.0, 9.0), (2.0, -9.0)]
    for chosen in (pairs, pairs[:1]):
        ratio = torch.tensor(chosen, requires_grad=True)
        losses = ops.dpo_loss(ratio, kind, 0.3, 0.1, 0.25)
        (losses * torch.arange(1.0, len(chosen) + 1)).sum().backward()
        for p, (c, d) in enumerate(chosen):
            c, d = ratio[p].tolist()

            def f(c, d):
                return preference(kind, c, d, 0.3, 0.1, 0.25)

            assert float(losses[p].detach()) == pytest.approx(f(c, d), rel=2e-6, abs=2e-7)
            slopes = [(f(c + s, d) - f(c - s, d)) / (2 * s) for s in (1e-5,)]
            slopes += [(f(c, d + s) - f(c, d - s)) / (2 * s) for s in (1e-5,)]
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
    ],
    ids=str,
)
def test_dpo_loss_and_gradient(options):
    out, batch = example()
    cfg = DpoConfig(**options)
    total, metrics = dpo.loss(out, batch, Config(dpo=cfg))

    def by_hand(logp):
        """Sum over the pairs."""
        policy, ref = pieces(logp, batch), pieces(batch.ref_logp_T, batch)
        losses, prefs, nlls = [], [], []
        for c, d in ((0, 1), (2, 3), (4, 5)):
            means = cfg.average_log_probs or cfg.loss in ("ipo", "sigmoid_norm")
            ratios = [
                (math.fsum(policy[s]) - math.fsum(ref[s])) / (len(policy[s]) if means else 1) for s in (c, d)
            ]
            prefs.append(preference(cfg.loss, *ratios, cfg.beta, cfg.label_smoothing))
            nlls.append(-math.fsum(policy[c]) / len(policy[c]))
            losses.append(cfg.preference_loss_weight * prefs[-1] + cfg.sft_loss_weight * nlls[-1])
        return math.fsum(losses), math.fsum(prefs), math.fsum(nlls)

    expected = by_hand(out.logp_T.detach().double())
    assert float(total.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert float(metrics["preference_loss"][0]) == pytest.approx(expected[1], rel=1e-5)
    if cfg.sft_loss_weight:
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


@pytest.mark.parametrize("algo", ALGOS)
def test_metrics_that_a_configuration_may_name_are_those_that_there_are(algo):
    """The loop adds the loss itself; sft_loss is there where it has a weight."""
    out, batch = example()
    if algo in SCORING:
        out = Scores(torch.arange(6.0), torch.zeros(6, 0))
        batch = dataclasses.replace(batch, value_R=torch.full((3,), torch.nan))
    module = importlib.import_module(f"strop.algos.{algo}")
    metrics = module.loss(out, batch, Config(algo=algo, dpo=DpoConfig(sft_loss_weight=0.5)))[1]
    assert sorted(config_check.METRICS[algo]) == sorted(["loss", *metrics, *module.derived({"loss": 0.0})])


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
