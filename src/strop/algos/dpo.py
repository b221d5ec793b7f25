"""Direct preference optimisation (Rafailov et al. 2023), offline, on packed preference pairs.

A row holds a chosen and a rejected completion of one prompt, side by side in the batch. The policy's token
log-probs are summed over each completion, the reference's were summed by the same function, and their
difference, c (chosen) and d (rejected), is all that the loss sees: `strop.ops.preference` has the formulas.
SimPO and ORPO have no reference: c and d are the policy's own log-probs, averaged over the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strop import ops
from strop.algos import Metrics
from strop.config import Config
from strop.config_check import REFERENCE_FREE
from strop.data.batch import Batch
from strop.models.policy import Output
from strop.ops import preference


def needs_reference(cfg: Config) -> bool:
    """Whether batches carry the log-probs of a reference model."""
    return cfg.dpo.loss not in REFERENCE_FREE


def count(batch: Batch) -> int:
    """What the loss is divided by: pairs."""
    return len(batch.rows)


def reference_model(cfg: Config) -> str | None:
    """Model whose log-probs are the reference; null: the policy before training."""
    return cfg.dpo.reference


def running_reward(means: dict[str, float], cfg: Config) -> float | None:
    """The mean reward of a step, where the loss compares rewards with their mean over all steps before."""
    if cfg.dpo.loss != "bco_pair":
        return None
    return (means["rewards/chosen"] + means["rewards/rejected"]) / 2


def loss(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, Metrics]:
    """w_pref · preference loss + w_sft · NLL(chosen) summed over the P pairs, and (sum, count) metrics.

    Log-probs are summed over the completion, or averaged over it for ipo, sigmoid_norm, simpo, orpo and
    `average_log_probs`. The NLL term is the mean over the tokens of each chosen completion. bco_pair's δ is
    `batch.baseline`, the mean reward of all earlier steps (`running_reward`); TRL 1.16 has δ = 0 throughout.
    """
    kind, beta = cfg.dpo.loss, cfg.dpo.beta
    ratio, logp, num_trained = _ratio(out, batch, cfg)
    delta = cfg.dpo.simpo_gamma if kind == "simpo" else batch.baseline
    losses = ops.dpo_loss(ratio.view(-1, 2), kind, beta, cfg.dpo.label_smoothing, delta)
    nll = -logp[0::2] / num_trained[0::2]
    sft_weight = _sft_weight(cfg)
    total = (cfg.dpo.preference_loss_weight * losses + sft_weight * nll).sum()
    with torch.no_grad():
        # TRL shows SimPO's and ORPO's log-probs as their losses take them: averaged.
        metrics = _metrics(ratio, ratio if batch.ref_logp_T is None else logp, beta, out, batch)
        metrics["preference_loss"] = (losses.sum(), metrics["rewards/chosen"][1])
        if sft_weight:
            metrics["sft_loss"] = (nll.sum(), metrics["rewards/chosen"][1])
    return total, metrics


def _sft_weight(cfg: Config) -> float:
    """ORPO is the odds ratio beside the NLL of the chosen."""
    default = 1.0 if cfg.dpo.loss == "orpo" else 0.0
    return default if cfg.dpo.sft_loss_weight is None else cfg.dpo.sft_loss_weight


def rewards(out: Output, batch: Batch, cfg: Config) -> Tensor:
    """[2P] of each completion: β times its log-ratio, the mean of which the metrics `rewards/...` are."""
    return cfg.dpo.beta * _ratio(out, batch, cfg)[0]


def _ratio(out: Output, batch: Batch, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratio (without a reference: log-prob), log-prob and number of trained tokens of each completion,
    [2P] each."""
    # Only a batch that stands in for a rank without rows has sequences without trained tokens.
    num_trained = ops.segment_sum(batch.trained_T.float(), batch.cu_seqlens).clamp(min=1.0)
    ratio = logp = ops.segment_sum(out.logp_T, batch.cu_seqlens)
    if batch.ref_logp_T is not None:
        ratio = logp - ops.segment_sum(batch.ref_logp_T, batch.cu_seqlens)
    if cfg.dpo.average_log_probs or cfg.dpo.loss in preference.AVERAGED:
        ratio = ratio / num_trained
    return ratio, logp, num_trained


def _metrics(ratio: Tensor, logp: Tensor, beta: float, out: Output, batch: Batch) -> Metrics:
    """TRL's names: rewards are β times the log-ratio; a tie is not accurate."""
    c, d = ratio[0::2], ratio[1::2]
    pairs = torch.full((), float(len(c)), device=c.device)  # a fill: a copy to a GPU would wait for it
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
    return (
        torch.arange(len(lengths), device=lengths.device)
        .remainder(2)
        .eq(0)
        .repeat_interleave(lengths, output_size=len(batch.tokens_T))
    )
