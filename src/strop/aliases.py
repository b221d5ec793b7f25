"""Names that users of NeMo RL type, and the short forms for debugging runs: one table, all in one place.

`config.load` looks up every key of the file and of the command line here. A key found is replaced by ours,
its value translated where the two projects write it differently, and a note is handed to the caller to
print ("note: policy.model_name is model.path here"). Short forms of our own carry no note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional


@dataclass(frozen=True)
class Alias:
    key: str
    """Our key."""
    translate: Optional[Callable[[Any], Any]] = None
    """Turns their value into ours; raises ValueError with what would be right."""
    translate_for: Optional[Callable[[str, Any], Any]] = None
    """The same, told the algorithm first."""
    remark: str = ""
    """What is different here, for the note."""
    note: bool = True
    """Whether its use is worth a note."""


def _precision(value: Any) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return names.get(str(value), str(value))


def _activation_checkpointing(value: Any) -> str:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return "full" if value else "none"


def _best_mode(value: Any) -> str:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return "max" if value else "min"


ACCURACY = {"dpo": "eval_rewards/accuracies", "rm": "eval_accuracy"}
"""Where NeMo RL says `accuracy`: how many pairs are in their right order."""


def _metric(algo: str, value: Any) -> Any:
    """`val:val_loss` and `val:validation-<set>_loss` are eval_loss; the same for accuracy."""
    text = str(value)
    if not text.startswith("val:"):
        return value
    if text.endswith("loss"):
        return "eval_loss"
    if text.endswith("accuracy") and algo in ACCURACY:
        return ACCURACY[algo]
    raise ValueError("give the name as in metrics.jsonl, such as eval_loss")


def _period(value: Any) -> Any:
    """A period of 0 or less means never there; here that is null."""
    return None if isinstance(value, int) and not isinstance(value, bool) and value <= 0 else value


def _preference_loss(value: Any) -> Any:
    return "sigmoid" if value == "dpo" else value


def _train_on(value: Any) -> str:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return "everything" if value else "all"


def _targets(value: Any) -> Any:
    """An empty list means all linear layers there."""
    return value or "all-linear"


def _algorithm_section(name: str) -> dict[str, Alias]:
    """The keys that NeMo RL repeats in its `dpo`, `sft` and `rm` sections."""
    return {
        f"{name}.max_num_steps": Alias("train.max_steps"),
        f"{name}.max_num_epochs": Alias("train.max_epochs"),
        f"{name}.val_period": Alias("validation.every", _period),
        f"{name}.val_at_start": Alias("validation.at_start"),
        f"{name}.val_at_end": Alias("validation.at_end"),
        f"{name}.val_batches": Alias(
            "train.limit_val_batches", _period, remark="in global batches of the training"
        ),
        f"{name}.seed": Alias("train.seed"),
    }


ABSENT = {
    "policy.dtensor_cfg.lora_cfg.enabled": "a rank is what turns adapters on: lora.rank",
    "checkpointing.enabled": "checkpoints are always written: checkpoint.every says how often "
    "(null: at the end, and when the job is stopped)",
}
"""Keys of NeMo RL that no key here is like, and what to do instead."""

ALIASES: dict[str, Alias] = {
    # short forms
    "max_steps": Alias("train.max_steps", note=False),
    "max_epochs": Alias("train.max_epochs", note=False),
    "limit_train_batches": Alias("train.limit_train_batches", note=False),
    "limit_val_batches": Alias("train.limit_val_batches", note=False),
    "log_level": Alias("log.level", note=False),
    "lr": Alias("optim.lr", note=False),
    "seed": Alias("train.seed", note=False),
    # former names
    "cpt.weights": Alias("data.weights"),
    "sft.train_on_prompt": Alias("sft.train_on", _train_on, remark="all, last or everything"),
    # NeMo RL
    "policy.model_name": Alias("model.path"),
    "policy.tokenizer.name": Alias("model.tokenizer"),
    "policy.tokenizer.chat_template": Alias("model.chat_template"),
    "policy.train_global_batch_size": Alias("train.global_batch_size"),
    "policy.train_micro_batch_size": Alias(
        "train.micro_batch_size", remark="and train.micro_batch_tokens bounds the tokens"
    ),
    "policy.max_total_sequence_length": Alias("data.max_length"),
    "policy.precision": Alias("train.precision", _precision),
    "policy.max_grad_norm": Alias("train.max_grad_norm"),
    "policy.dtensor_cfg.activation_checkpointing": Alias(
        "train.activation_checkpointing", _activation_checkpointing
    ),
    "policy.sequence_packing.train_mb_tokens": Alias("train.micro_batch_tokens"),
    "policy.dynamic_batching.train_mb_tokens": Alias("train.micro_batch_tokens"),
    "policy.dtensor_cfg.lora_cfg.dim": Alias("lora.rank"),
    "policy.dtensor_cfg.lora_cfg.alpha": Alias("lora.alpha"),
    "policy.dtensor_cfg.lora_cfg.dropout": Alias("lora.dropout", remark="of an adapter's input"),
    "policy.dtensor_cfg.lora_cfg.target_modules": Alias("lora.targets", _targets),
    "policy.optimizer.kwargs.lr": Alias("optim.lr"),
    "policy.optimizer.kwargs.weight_decay": Alias("optim.weight_decay"),
    "policy.optimizer.kwargs.betas": Alias("optim.betas"),
    "policy.optimizer.kwargs.eps": Alias("optim.eps"),
    **_algorithm_section("dpo"),
    **_algorithm_section("sft"),
    **_algorithm_section("rm"),
    "dpo.reference_policy_kl_penalty": Alias("dpo.beta"),
    "dpo.preference_average_log_probs": Alias("dpo.average_log_probs"),
    "dpo.preference_loss": Alias("dpo.loss", _preference_loss),
    "data.max_input_seq_length": Alias("data.max_length"),
    "data.train_data_path": Alias("data.train"),
    "data.val_data_path": Alias("data.validation"),
    "data.train.data_path": Alias("data.train"),
    "data.validation.data_path": Alias("data.validation"),
    "checkpointing.checkpoint_dir": Alias("run.dir", remark="each run is a folder in it"),
    "checkpointing.save_period": Alias("checkpoint.every", _period),
    "checkpoint.async": Alias("checkpoint.async_save"),
    "checkpointing.keep_top_k": Alias(
        "checkpoint.keep_last", remark="the newest ones stay, and the best by checkpoint.best_metric"
    ),
    "checkpointing.metric_name": Alias("checkpoint.best_metric", translate_for=_metric),
    "checkpointing.higher_is_better": Alias("checkpoint.best_mode", _best_mode),
    "logger.wandb_enabled": Alias("log.wandb"),
    "logger.tensorboard_enabled": Alias("log.tensorboard"),
    "logger.mlflow_enabled": Alias("log.mlflow"),
    "logger.wandb.project": Alias("log.project"),
    "logger.mlflow.experiment_name": Alias("log.project"),
    "logger.wandb.name": Alias("run.name"),
    "logger.mlflow.run_name": Alias("run.name"),
    "cluster.num_nodes": Alias("cluster.nodes"),
}
