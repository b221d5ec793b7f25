"""Values that have the right type but make no sense: the allowed names and ranges of each key, in tables.

`config.load` calls `check` with the merged tree as dotted keys, before anything reads it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strop.config_schema import KINDS, LoraConfig
from strop.errors import UserError
from strop.slurm import naming

REFERENCE_FREE = ("simpo", "orpo")
"""Of dpo.loss; they know no reference model, and take means over tokens."""
NEEDS_SMOOTHING = ("robust", "exo_pair")
"""Of dpo.loss; without label smoothing they are another one, or not defined."""

CHOICES: dict[str, tuple[str, ...]] = {
    "model.attention": ("auto", "packed", "padded"),
    "data.over_length": ("drop", "truncate_prompt_left", "truncate_completion", "error"),
    "data.on_bad_row": ("error", "skip"),
    "prepare.documents": ("file", "paragraph", "line"),
    "train.precision": ("auto", "bf16", "fp16", "fp32"),
    "train.activation_checkpointing": ("none", "selective", "full"),
    "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "sft.train_on": ("all", "last", "everything"),
    "checkpoint.best_mode": ("auto", "min", "max"),
    "dpo.loss": (
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "sigmoid_norm",
        *REFERENCE_FREE,
    ),
    "kto.loss": ("kto", "apo_zero_unpaired"),
    "dist.backend": ("auto", "nccl", "gloo"),
    "log.level": ("debug", "info", "warning", "error"),
}

METRICS: dict[str, tuple[str, ...]] = {
    "cpt": ("loss", "perplexity", "entropy", "mean_token_accuracy"),
    "sft": ("loss", "entropy", "mean_token_accuracy"),
    "dpo": (
        *("loss", "preference_loss", "sft_loss"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("entropy", "mean_token_accuracy"),
    ),
    "kto": (
        *("loss", "kl"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("entropy", "mean_token_accuracy"),
    ),
    "rm": ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"),
}
"""What an algorithm measures; in metrics.jsonl a validation's names begin with eval_. Known here so that a
mistyped one is not found at the first validation only."""

Range = tuple[Callable[[Any], bool], str]
POSITIVE: Range = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Range = (lambda v: v >= 0, "must not be negative")
SHARE: Range = (lambda v: 0 <= v <= 1, "must lie in [0, 1]")
RANGES: dict[str, Range] = {
    "data.max_length": (lambda v: v >= 2, "must be at least 2"),
    "data.max_dropped_fraction": SHARE,
    "prepare.near_duplicates": (lambda v: 0.5 <= v <= 1, "must lie in [0.5, 1]"),
    "prepare.min_chars": NOT_NEGATIVE,
    "prepare.max_chars": POSITIVE,
    "prepare.max_repetition": SHARE,
    "prepare.max_symbols": SHARE,
    "train.global_batch_size": POSITIVE,
    "train.micro_batch_tokens": POSITIVE,
    "train.micro_batch_size": POSITIVE,
    "train.max_steps": POSITIVE,
    "train.max_epochs": POSITIVE,
    "train.seed": (lambda v: 0 <= v < 2**63, "must lie in [0, 2**63)"),
    "train.max_grad_norm": POSITIVE,
    "train.limit_train_batches": POSITIVE,
    "train.limit_val_batches": POSITIVE,
    "optim.lr": NOT_NEGATIVE,
    "optim.betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)"),
    "optim.eps": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.min_lr_ratio": SHARE,
    "optim.decay_steps": (
        lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
        "must be a number of steps, or a share of them above 0 and below 1",
    ),
    "validation.every": POSITIVE,
    "validation.patience": POSITIVE,
    "validation.min_delta": NOT_NEGATIVE,
    "checkpoint.keep_last": (lambda v: v >= 2, "must be at least 2, so that there is one to fall back to"),
    "data.weights": (
        lambda v: bool(v) and all(0 < w < 1e100 for w in v),  # times the rows of an epoch they are finite
        "must hold numbers above 0 only, below 1e100",
    ),
    "sft.neftune_alpha": POSITIVE,
    "dpo.beta": POSITIVE,
    "dpo.label_smoothing": (lambda v: 0 <= v < 0.5, "must lie in [0, 0.5)"),
    "dpo.simpo_gamma": NOT_NEGATIVE,
    "dpo.sft_loss_weight": NOT_NEGATIVE,
    "dpo.preference_loss_weight": NOT_NEGATIVE,
    "kto.beta": POSITIVE,
    "kto.desirable_weight": POSITIVE,
    "kto.undesirable_weight": POSITIVE,
    "lora.rank": POSITIVE,
    "lora.alpha": POSITIVE,
    "lora.dropout": (lambda v: 0 <= v < 1, "must lie in [0, 1)"),
    "rm.center_rewards_coefficient": POSITIVE,
    "dist.timeout_s": POSITIVE,
    "dist.rendezvous_timeout_s": POSITIVE,
    "dist.shard_size": POSITIVE,
    "watchdog.start_s": POSITIVE,
    "watchdog.step_s": POSITIVE,
    "watchdog.step_factor": (lambda v: v >= 1, "must be at least 1"),
    "watchdog.save_s": POSITIVE,
    "log.every": POSITIVE,
    "log.max_mib": POSITIVE,
    "cluster.nodes": POSITIVE,
    "cluster.gpus_per_node": NOT_NEGATIVE,
}


REQUIRED = {"model.path": "a directory or hub name", "data.train": "a file, directory or hub name"}


def _is_interval(every: Any) -> bool:
    """A positive number of steps, a time, or auto."""
    if isinstance(every, int) and not isinstance(every, bool):
        return every > 0
    text = str(every)
    return text == "auto" or bool(re.fullmatch(r"(\d+(\.\d+)?)[smh]", text) and float(text[:-1]) > 0)


def _check_dpo(flat: Mapping[str, Any], fail: Callable[..., None]) -> None:
    """What the losses of DPO need, and what would be of no use to them."""
    loss = flat["dpo.loss"]
    if loss in NEEDS_SMOOTHING and flat["dpo.label_smoothing"] == 0:
        fail("dpo.label_smoothing", f"must be greater than 0 for dpo.loss={loss}", "dpo.loss")
    if loss in REFERENCE_FREE and flat["dpo.reference"] is not None:
        fail("dpo.reference", f"must be null for dpo.loss={loss}, which knows no reference model")
    if loss in REFERENCE_FREE and flat["dpo.average_log_probs"]:
        fail("dpo.average_log_probs", f"must be false for dpo.loss={loss}: it always takes the mean")


def _check_user_metrics(flat: Mapping[str, Any], fail: Callable[[str, str], None]) -> bool:
    """Whether there are any. What they will be called is known at the first validation only."""
    metrics = flat["validation.metrics"]
    functions = metrics if isinstance(metrics, list) else [metrics or ""]
    if not all(isinstance(function, str) for function in functions):
        fail("validation.metrics", "must be package.module:name or a list of such")
    if metrics and KINDS[flat["algo"]] == "text":
        fail("validation.metrics", "needs rows with an answer; a block of text has none")
    return bool(metrics)


def check(flat: Mapping[str, Any], where: Mapping[str, str], path: Path) -> None:
    """UserError for the first key whose value cannot be meant; `where` says where each was set."""

    def fail(key: str, problem: str, because: str = "") -> None:
        place = where.get(key) or where.get(because, str(path))
        raise UserError(f"{place}: {key} is {flat[key]!r}; it {problem}")

    for key, what in REQUIRED.items():
        if not flat[key]:
            raise UserError(f"{path}: {key} is not set; give {what} there or as {key}=...")
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            fail(key, f"must be one of {', '.join(allowed)}")
    for key in ("data.train", "data.validation"):
        sources = flat[key] if isinstance(flat[key], list) else [flat[key] or ""]
        if not all(isinstance(source, str) for source in sources):
            fail(key, "must be text or a list of texts")
    weights, entries = flat["data.weights"], flat["data.train"]
    if weights is not None and len(weights) != (len(entries) if isinstance(entries, list) else 1):
        fail("data.weights", "must have one number for each entry of data.train")
    for key in [key for key in flat if key.startswith("validation.watch.")]:
        if not isinstance(flat[key], str) or not re.fullmatch(r"[\w-]+", key.split(".", 2)[2]):
            fail(key, "must be a path or hub name under a plain name", "validation.watch")
    if flat["data.completion_template"] is not None and KINDS[flat["algo"]] != "sft":
        fail("data.completion_template", f"must be null for {flat['algo']}: it is for rows of SFT")
    _check_lora(flat, fail)
    every = flat["checkpoint.every"]
    if every is not None and not _is_interval(every):
        fail("checkpoint.every", "must be a number of steps, a time such as 90s, 10m or 1.5h, or auto")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(key, "must be finite")
        if key in RANGES and value is not None and not RANGES[key][0](value):
            fail(key, RANGES[key][1])
    watched = [key.split(".", 2)[2] + "_" for key in flat if key.startswith("validation.watch.")]
    metrics = [f"eval_{own}{name}" for own in ("", *watched) for name in METRICS[flat["algo"]]]
    has_sft_loss = flat["dpo.loss"] == "orpo" if (w := flat["dpo.sft_loss_weight"]) is None else w > 0
    if not has_sft_loss and "eval_sft_loss" in metrics:
        metrics.remove("eval_sft_loss")
    best = flat["checkpoint.best_metric"]
    own = _check_user_metrics(flat, fail) and str(best).startswith("eval_")
    if best is not None and best not in metrics and not own:
        fail("checkpoint.best_metric", f"must be one of {', '.join(metrics)}")
    _check_dpo(flat, fail)
    if flat["train.shared_prefix"] and KINDS[flat["algo"]] != "preference":
        fail("train.shared_prefix", f"shares the prompt of a pair; rows of {flat['algo']} are no pairs")
    if flat["validation.patience"] is not None and flat["checkpoint.best_metric"] is None:
        fail("validation.patience", "needs checkpoint.best_metric, such as eval_loss")
    name = flat["run.name"]
    if name is not None and not naming.is_plain(name):
        fail("run.name", naming.PLAIN)


def _check_lora(flat: Mapping[str, Any], fail: Callable[..., None]) -> None:
    """Names of layers, and settings of adapters that there would be none of."""
    for key in ("lora.targets", "lora.modules_to_save"):
        names = flat[key] if isinstance(flat[key], list) else [flat[key]]
        if (flat[key] is not None or key == "lora.targets") and not all(
            n and isinstance(n, str) for n in names
        ):
            fail(key, "must be the name of a layer or a list of names")
    if isinstance(flat["lora.targets"], str):
        try:
            re.compile(flat["lora.targets"])
        except re.error as error:
            fail("lora.targets", f"is no regular expression ({error})")
    if flat["lora.targets"] == []:
        fail("lora.targets", "must name a layer; lora.rank=null trains without adapters")
    if flat["lora.rank"] is None:
        for field in dataclasses.fields(LoraConfig):
            if flat[f"lora.{field.name}"] != field.default:
                fail(
                    f"lora.{field.name}", "needs lora.rank: without it no layer gets an adapter", "lora.rank"
                )
