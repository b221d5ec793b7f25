"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers of which each is called good or bad alone.

A row holds one completion and its label in `Batch.value_R`: 1 desirable, 0 undesirable. Its log-ratio
r = log p_policy - log p_reference, summed over the completion, is compared with z0, the mean log-ratio of
completions that belong to other prompts: an estimate of how far the policy has moved from the reference.
z0 is `Batch.baseline`: measured by `kl` before the step, over the whole global batch (strop.baseline), so
that it depends on neither ranks nor micro batches. TRL estimates it anew in each micro batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop import ops
from strop.algos import Metrics
from strop.config import Config
from strop.data.batch import Batch
from strop.models.policy import Output


def needs_reference(cfg: Config) -> bool:
    """Whether batches carry the log-probs of a reference model."""
    return True


def reference_model(cfg: Config) -> str | None:
    """Model whose log-probs are the reference; null: the policy before training."""
    return cfg.kto.reference


def needs_mismatched(cfg: Config) -> bool:
    """Whether each step measures its baseline on prompts with the completions of others."""
    return cfg.kto.loss == "kto"


def count(batch: Batch) -> int:
    """What the loss is divided by: rows."""
    return len(batch.rows)


def kl(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, int]:
    """Sum of the log-ratios of mismatched completions, fp64, and how many they are."""
    return _log_ratio(out, batch).double().sum(), len(batch.rows)


def rewards(out: Output, batch: Batch, cfg: Config) -> Tensor:
    """[R] of each completion: β times its log-ratio, the mean of which the metrics `rewards/...` are."""
    return cfg.kto.beta * _log_ratio(out, batch)


def loss(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, Metrics]:
    """Σ λ_D σ(β(z0 - r)) over desirable rows + Σ λ_U σ(β(r - z0)) over undesirable ones, and metrics.

    z0 = max(0, baseline), without gradient; Ethayarajh et al. 2024, equation 7, with 1 - σ(x) = σ(-x).
    apo_zero_unpaired is the same with z0 = 0; D'Oosterlinck et al. 2024.
    """
    assert batch.value_R is not None
    c, z0 = cfg.kto, max(batch.baseline, 0.0)  # in this order a NaN stays one
    ratio_R = _log_ratio(out, batch)
    is_good_R = batch.value_R == 1.0  # false for the NaN of a dummy
    sign_R = is_good_R * 2.0 - 1.0
    weight_R = torch.where(is_good_R, c.desirable_weight, c.undesirable_weight)
    losses_R = weight_R * torch.sigmoid(-sign_R * c.beta * (ratio_R - z0))
    with torch.no_grad():
        metrics = _metrics(c.beta * ratio_R, is_good_R, out, batch)
        num_rows = ratio_R.new_full((), len(ratio_R), dtype=torch.float64)
        metrics["kl"] = (z0 * num_rows, num_rows)
    return losses_R.sum(), metrics


def _log_ratio(out: Output, batch: Batch) -> Tensor:
    """[R]: log p_policy - log p_reference of each completion."""
    assert batch.ref_logp_T is not None
    logp = ops.segment_sum(out.logp_T, batch.cu_seqlens)
    return logp - ops.segment_sum(batch.ref_logp_T, batch.cu_seqlens)


def _metrics(reward_R: Tensor, is_good_R: Tensor, out: Output, batch: Batch) -> Metrics:
    """TRL's names: chosen are the desirable rows, rejected the undesirable ones; means over what there is."""
    logp_R = ops.segment_sum(out.logp_T, batch.cu_seqlens)
    tokens = batch.trained_T.float()
    lengths_S, num_tokens = batch.cu_seqlens.diff().long(), len(batch.tokens_T)
    is_good_T = is_good_R.repeat_interleave(lengths_S, output_size=num_tokens)
    metrics = {
        "entropy": (out.entropy_T.sum(), tokens.sum()),
        "mean_token_accuracy": (out.correct_T.sum(), tokens.sum()),
    }
    for name, own_R, own_T in (("chosen", is_good_R, is_good_T), ("rejected", ~is_good_R, ~is_good_T)):
        num_rows = own_R.float().sum()
        metrics[f"rewards/{name}"] = ((reward_R * own_R).sum(), num_rows)
        metrics[f"logps/{name}"] = ((logp_R * own_R).sum(), num_rows)
        metrics[f"logits/{name}"] = ((out.mean_logit_T * own_T).sum(), (tokens * own_T).sum())
    return metrics


def derived(means: dict[str, float]) -> dict[str, float]:
    """Metrics that follow from means: the margin, where there were rows of both kinds."""
    if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return {}
    return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
