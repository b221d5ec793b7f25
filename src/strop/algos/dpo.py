"""Direct preference optimisation (Rafailov et al. 2023), offline, on packed preference pairs.

A row holds a chosen and a rejected completion of one prompt, side by side in the batch. The policy's token
log-probs are summed over each completion, the reference's were summed by the same function, and their
difference c (chosen) and d (rejected) with h = c - d is all that the loss sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from strop import ops
from strop.algos import Metrics
from strop.config import Config, DpoConfig
from strop.data.batch import Batch
from strop.models.policy import Output

NEEDS_REFERENCE = True


def count(batch: Batch) -> int:
    """What the loss is divided by: pairs."""
    return len(batch.rows)


def reference_model(cfg: Config) -> str | None:
    """Model whose log-probs are the reference; null: the policy before training."""
    return cfg.dpo.reference


def sigmoid(c: Tensor, d: Tensor, cfg: DpoConfig) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh); Rafailov et al. 2023, label smoothing ε from Mitchell 2023 (cDPO)."""
    z, eps = cfg.beta * (c - d), cfg.label_smoothing
    return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


def robust(c: Tensor, d: Tensor, cfg: DpoConfig) -> Tensor:
    """(-(1-ε) log σ(βh) + ε log σ(-βh)) / (1-2ε): unbiased if a share ε of the labels is flipped;
    Chowdhury et al. 2024."""
    z, eps = cfg.beta * (c - d), cfg.label_smoothing
    return (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)


def hinge(c: Tensor, d: Tensor, cfg: DpoConfig) -> Tensor:
    """max(0, 1 - βh); SLiC, Zhao et al. 2023."""
    return torch.relu(1 - cfg.beta * (c - d))


def ipo(c: Tensor, d: Tensor, cfg: DpoConfig) -> Tensor:
    """(h - 1/(2β))² on length-averaged log-ratios; Azar et al. 2023."""
    return (c - d - 1 / (2 * cfg.beta)) ** 2


LOSSES: dict[str, Callable[[Tensor, Tensor, DpoConfig], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
}


def loss(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, Metrics]:
    """w_pref · preference loss + w_sft · NLL(chosen) summed over the P pairs, and (sum, count) metrics.

    Log-probs are summed over the completion, or averaged over it for ipo and `average_log_probs`. The NLL
    term is the mean over the tokens of each chosen completion.
    """
    assert batch.ref_logp_T is not None
    # Only a batch that stands in for a rank without rows has sequences without trained tokens.
    num_trained = ops.segment_sum(batch.trained_T.float(), batch.cu_seqlens).clamp(min=1.0)
    logp = ops.segment_sum(out.logp_T, batch.cu_seqlens)
    ratio = logp - ops.segment_sum(batch.ref_logp_T, batch.cu_seqlens)
    if cfg.dpo.average_log_probs or cfg.dpo.loss == "ipo":
        ratio = ratio / num_trained
    c, d = ratio[0::2], ratio[1::2]
    preference = LOSSES[cfg.dpo.loss](c, d, cfg.dpo)
    nll = -logp[0::2] / num_trained[0::2]
    total = (cfg.dpo.preference_loss_weight * preference + cfg.dpo.sft_loss_weight * nll).sum()
    with torch.no_grad():
        metrics = _metrics(c, d, logp, cfg.dpo.beta, out, batch)
        metrics["preference_loss"] = (preference.sum(), metrics["rewards/chosen"][1])
        if cfg.dpo.sft_loss_weight:
            metrics["sft_loss"] = (nll.sum(), metrics["rewards/chosen"][1])
    return total, metrics


def _metrics(c: Tensor, d: Tensor, logp: Tensor, beta: float, out: Output, batch: Batch) -> Metrics:
    """TRL's names: rewards are β times the log-ratio; a tie is not accurate."""
    pairs = torch.tensor(float(len(c)), device=c.device)
    tokens = batch.trained_T.float()
    in_chosen = _of_chosen(batch)
    num_chosen, num_rejected = (tokens * in_chosen).sum(), (tokens * ~in_chosen).sum()
    return {
        "rewards/chosen": (beta * c.sum(), pairs),
        "rewards/rejected": (beta * d.sum(), pairs),
        "rewards/margins": (beta * (c - d).sum(), pairs),
        "rewards/accuracies": ((c > d).float().sum(), pairs),
        "logps/chosen": (logp[0::2].sum(), pairs),
        "logps/rejected": (logp[1::2].sum(), pairs),
        "logits/chosen": ((out.mean_logit_T * in_chosen).sum(), num_chosen),
        "logits/rejected": ((out.mean_logit_T * ~in_chosen).sum(), num_rejected),
        "entropy": (out.entropy_T.sum(), tokens.sum()),
        "mean_token_accuracy": (out.correct_T.sum(), tokens.sum()),
    }


def _of_chosen(batch: Batch) -> Tensor:
    """bool [T]: the token is in a chosen sequence (the prompt's part of it is not trained)."""
    lengths = batch.cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=lengths.device).remainder(2).eq(0).repeat_interleave(lengths)


def derived(means: dict[str, float]) -> dict[str, float]:
    """Metrics of a validation set that follow from its means: none."""
    return {}
