"""Preference losses of one pair, as functions of its log-ratios.

c and d [P] are log p_policy - log p_reference of the chosen and the rejected completion, summed over their
tokens, or averaged where the table says so; of simpo and orpo they are log p_policy alone. h = c - d, σ the
logistic function, ε label smoothing.
The native kernels compute the same formulas; these are their reference and where their sources stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.config_check import REFERENCE_FREE

Loss = Callable[[Tensor, Tensor, float, float, float], Tensor]


def sigmoid(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh); Rafailov et al. 2023, ε from Mitchell 2023 (cDPO)."""
    z = beta * (c - d)
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def robust(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """(-(1-ε) log σ(βh) + ε log σ(-βh)) / (1-2ε): unbiased if a share ε of the labels is flipped;
    Chowdhury et al. 2024."""
    z = beta * (c - d)
    return (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)


def hinge(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """max(0, 1 - βh); SLiC, Zhao et al. 2023."""
    return torch.relu(1 - beta * (c - d))


def ipo(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """(h - 1/(2β))² on length-averaged log-ratios; Azar et al. 2023, equation 17."""
    return (c - d - 1 / (2 * beta)) ** 2


def exo_pair(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """σ(βh) (log σ(βh) - log(1-ε)) + σ(-βh) (log σ(-βh) - log ε), ε > 0: reverse KL to the smoothed labels;
    Ji et al. 2024 (EXO), equation 16."""
    z = beta * (c - d)
    gain = F.logsigmoid(z) - math.log(1 - eps), F.logsigmoid(-z) - math.log(eps)
    return torch.sigmoid(z) * gain[0] + torch.sigmoid(-z) * gain[1]


def nca_pair(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βd); Chen et al. 2024 (NCA) for two answers."""
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * d)


def bco_pair(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """-log σ(βc - δ) - log σ(δ - βd), δ a running mean of rewards; Jung et al. 2024 (BCO)."""
    return -F.logsigmoid(beta * c - delta) - F.logsigmoid(delta - beta * d)


def sppo_hard(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """(c - 1/(2β))² + (d + 1/(2β))²: the chosen wins for certain; Wu et al. 2024 (SPPO), equation 4.6."""
    return (c - 0.5 / beta) ** 2 + (d + 0.5 / beta) ** 2


def apo_zero(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """σ(-βc) + σ(βd): chosen up, rejected down; D'Oosterlinck et al. 2024 (APO), equation 7."""
    return torch.sigmoid(-beta * c) + torch.sigmoid(beta * d)


def apo_down(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """σ(βc) + σ(-βh): both down, the rejected more; D'Oosterlinck et al. 2024 (APO), equation 8."""
    return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - d))


def simpo(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """-(1-ε) log σ(βh - γ) - ε log σ(γ - βh), γ = δ, on mean log-probs without a reference; Meng et al. 2024,
    equation 6."""
    z = beta * (c - d) - delta
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def orpo(c: Tensor, d: Tensor, beta: float, eps: float, delta: float) -> Tensor:
    """-β log σ(odds(c) - odds(d)), odds(x) = x - log(1 - exp x), on mean log-probs without a reference;
    Hong et al. 2024 (ORPO), equation 7, β their λ. The whole loss has the NLL of the chosen beside it."""
    odds_c, odds_d = (x - torch.log(-torch.expm1(x)) for x in (c.clamp(max=CERTAIN), d.clamp(max=CERTAIN)))
    return -beta * F.logsigmoid(odds_c - odds_d)


CERTAIN = -1e-6
"""orpo: a mean log-prob nearer to 0 than this, where fp32 has only noise to tell, counts as this: the odds
of 0 would be infinite."""

KINDS: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid,
    "simpo": simpo,
    "orpo": orpo,
}
"""By name; the position is the number that the kernels know it by (strop_dpo_kind)."""
AVERAGED = ("ipo", "sigmoid_norm", *REFERENCE_FREE)
"""Losses that are defined on values averaged over a completion's tokens."""
