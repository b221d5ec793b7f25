"""What a run is: one tree of frozen dataclasses. What stands under a key is also what --help shows.

`strop.config` fills the tree; the checks that go beyond types are in `config_check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

KINDS = {"cpt": "text", "sft": "sft", "kto": "unpaired", "dpo": "preference", "rm": "preference"}
"""What a row of each algorithm's data is: a block of text, an answer, one with a label, a pair of answers."""
ALGOS = tuple(KINDS)


@dataclass(frozen=True)
class ModelConfig:
    path: Optional[str] = None
    """Local directory or hub name of a causal language model."""
    revision: Optional[str] = None
    """Hub branch, tag or commit."""
    tokenizer: Optional[str] = None
    """Local directory or hub name of the tokenizer; the model's own if null."""
    chat_template: Optional[str] = None
    """A Jinja chat template, or the path of a file with one; the tokenizer's own if null."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    attention: str = "auto"
    """packed: sequences side by side without padding; padded: one sequence a row; auto: packed where a
    probe at load shows that nothing leaks between packed sequences, else padded."""


@dataclass(frozen=True)
class DataConfig:
    train: Any = None
    """JSONL, JSON or Parquet file, directory with training.jsonl, hub name, short name of a data set that is
    known (helpsteer3, gsm8k, ...: README.md has all), or a list of these. CPT: also text files, directories
    of any of them, and stores that tools.prepare has made."""
    validation: Any = None
    """The same for validation. If null, what belongs to `train` is used: the validation.jsonl of a directory,
    the held-out split of a set that is known by its name."""
    adapter: Optional[str] = None
    """What makes our fields of the rows of files, directories and hub sets: the short name of a data set, for
    a copy of it; a function or class of your own, as package.module:name; none: nothing. null: nothing, but
    for hub sets that are known. It applies to `validation` and `validation.watch` too."""
    adapter_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for an adapter of your own: of the class when it is made, or of each call."""
    split: Optional[str] = None
    """"98,1,1": shares of train, validation and test taken out of `train` by a hash of the row."""
    hub_subset: Optional[str] = None
    """Configuration name of a hub data set; null: the one that a set known by its name needs, else none."""
    hub_split: Optional[str] = None
    """Split of a hub data set for training; null: train, or what a known set calls it."""
    hub_validation_split: Optional[str] = None
    """Split of a hub data set for validation; null: that of a known set, else none."""
    weights: Optional[list[float]] = None
    """Share of an epoch's rows (CPT: blocks) that each entry of `train` gets, such as [0.8, 0.2] for a new
    source and a replay of an old one. An epoch has as many rows as all entries together; an entry with more
    than its own gives some twice, one with less goes on in the next epoch. null: every row once an epoch."""
    system_prompt: Optional[str] = None
    """Put before conversations that have no system message of their own."""
    prompt_template: Optional[str] = None
    """The prompt of rows of plain fields: "Question: {input}\\nAnswer: " or a file with that. {name} is the
    row's field, {{ and }} are braces; messages give way to it. null: the field prompt (SFT: or input)."""
    completion_template: Optional[str] = None
    """SFT: the completion, likewise. null: the field completion or output."""
    max_length: int = 1024
    """Longest sequence (prompt and completion) in tokens; CPT: tokens of a block."""
    over_length: str = "drop"
    """What happens to a longer one: drop (counted); truncate_prompt_left: the oldest tokens of the prompt go,
    behind BOS, as many from both halves of a pair, and the row is dropped if the completion is still too
    long; truncate_completion: its end goes, without an EOS in its place, and the row is dropped if nothing of
    it is left; error."""
    max_dropped_fraction: float = 0.05
    """The run stops before training if more than this share of the rows is dropped."""
    on_bad_row: str = "error"
    """error: stop at a row without the needed fields or with chosen == rejected; skip: count and go on."""
    cache_dir: Optional[str] = None
    """Where tokenised data is kept between runs; <run.dir>/.cache if null."""


@dataclass(frozen=True)
class PrepareConfig:
    """How text becomes a store of tokens (cpt); rows of SFT and DPO are not filtered."""

    text_key: str = "text"
    """The field of a row (JSONL, Parquet, hub set) that holds the text."""
    documents: str = "file"
    """What one document is in a text file: file (the whole of it), paragraph (between blank lines), line."""
    exact_duplicates: bool = True
    """Leave out documents with the same text as an earlier one, of any entry of data.train."""
    near_duplicates: Optional[float] = None
    """Leave out documents that share this much of their shingles (5 tokens; Jaccard, by MinHash) with an
    earlier one, such as 0.8; null: keep them."""
    min_chars: int = 1
    """Leave out shorter documents; empty ones always."""
    max_chars: Optional[int] = None
    """Leave out longer documents."""
    max_repetition: Optional[float] = None
    """Leave out documents with a larger share of word trigrams that repeat an earlier one, such as 0.3."""
    max_symbols: Optional[float] = None
    """Leave out documents with a larger share of characters that are no letter, digit or white space, such
    as 0.3."""
    language: Optional[str] = None
    """Keep these languages only, by ISO code: en, or "en,de" (needs py3langid)."""


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = 16
    """Rows (CPT: blocks, SFT and KTO: sequences, DPO and RM: pairs) in one optimiser step, over all ranks."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward of one rank (a longer single row makes a batch of its own).
    Changes memory and speed, never the loss."""
    micro_batch_size: Optional[int] = None
    """Most rows in one forward of one rank; null: only the tokens count."""
    max_steps: Optional[int] = None
    """Optimiser steps; null: as many as max_epochs gives."""
    max_epochs: float = 1.0
    """Passes over the training rows; ignored where max_steps is given."""
    seed: int = 42
    """Order of the rows and every other random draw."""
    precision: str = "auto"
    """Compute type: bf16, fp16 (GPU, with loss scaling), fp32; auto: bf16 where the hardware has it.
    Master weights and optimiser state are fp32 always."""
    activation_checkpointing: str = "none"
    """none, selective (attention and matmul outputs kept, the rest recomputed) or full."""
    max_grad_norm: Optional[float] = 1.0
    """Clip the global gradient norm to this; null: no clipping."""
    shared_prefix: Optional[bool] = None
    """Preference rows: compute the prompt of a pair once, for both completions; null: where the model's
    attention allows it and the prompts are long enough to pay."""
    compile: bool = False
    """torch.compile each transformer block."""
    limit_train_batches: Optional[int] = None
    """Debugging: optimiser steps an epoch at most."""
    limit_val_batches: Optional[int] = None
    """Debugging: use only the first rows of the validation set, this many global batches of them."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of AdamW's running averages."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """On matrices only; norms and biases are not decayed."""
    schedule: str = "linear"
    """After the warm-up: constant, linear, cosine, or wsd (constant, and at the end a decay by one minus a
    square root: `decay_steps`)."""
    decay_steps: float = 0.1
    """wsd: the last so many steps decay; a number below 1 is a share of all steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to lr; the first one has lr / warmup_steps."""
    min_lr_ratio: float = 0.0
    """The schedule ends at lr times this."""


@dataclass(frozen=True)
class ValidationConfig:
    every: Optional[int] = None
    """Validate every so many steps; null: not between start and end."""
    at_start: bool = True
    """Validate before the first step."""
    at_end: bool = True
    """Validate after the last step."""
    patience: Optional[int] = None
    """Early stopping: end after so many validations without a better `checkpoint.best_metric`."""
    min_delta: float = 0.0
    """How much `checkpoint.best_metric` must gain to count as better, for `patience` and the best one."""
    watch: dict[str, Any] = field(default_factory=dict)
    """Further sets, watched beside for what is forgotten: {name: file, ...}, as data.validation would name
    them; their metrics are eval_<name>_loss and so on. Not for KTO, nor for DPO but with simpo and orpo."""
    metrics: Any = None
    """A function of your own, as package.module:name, or a list of them: it gets a
    `strop.user_metrics.ValidationRows` (texts, log-probs, rewards of every row) and returns {name: number},
    which is written as eval_<name>. Not for cpt."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: Any = 100
    """Commit a checkpoint every so many steps (100), every so long (90s, 10m, 1.5h), or auto: by Young's
    formula from the measured save time and the interruptions so far. At the end and when stopped in any
    case; null: only then."""
    async_save: Optional[bool] = None
    """Write in the background while training goes on (checkpoint.async is accepted too); null: if
    there is memory for a second copy of weights and optimiser state."""
    keep_last: int = 2
    """How many committed checkpoints stay; at least 2, so that there is one to fall back to. The best
    one by `best_metric` stays as well."""
    best_metric: Optional[str] = None
    """Validation metric, as in metrics.jsonl (eval_loss, eval_rewards/accuracies, ...)."""
    best_mode: str = "auto"
    """min, max, or auto: min for a loss or perplexity, else max."""


@dataclass(frozen=True)
class DpoConfig:
    beta: float = 0.1
    """How strongly the policy is held to the reference (`reference_policy_kl_penalty` in NeMo RL). simpo: the
    scale of its rewards, 2 to 10 in its paper. orpo: the weight of the odds ratio beside the NLL, their λ."""
    loss: str = "sigmoid"
    """sigmoid, sigmoid_norm (per token), hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
    apo_zero, apo_down, or without a reference model simpo or orpo; formulas in strop/ops/preference.py."""
    label_smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round: [0, 0.5); robust and exo_pair need one.
    Used by sigmoid, sigmoid_norm, robust, exo_pair and simpo."""
    simpo_gamma: float = 0.5
    """simpo: the margin γ by which the reward of the chosen one shall be larger."""
    sft_loss_weight: Optional[float] = None
    """Weight of the negative log-likelihood of the chosen completion, per token; null: 1 for orpo, to which
    it belongs, 0 for all others."""
    preference_loss_weight: float = 1.0
    """Weight of the preference loss."""
    average_log_probs: bool = False
    """Mean instead of sum of a completion's token log-probs (ipo, sigmoid_norm, simpo and orpo:
    always the mean)."""
    reference: Optional[str] = None
    """Reference model; null: the model itself before training."""


@dataclass(frozen=True)
class KtoConfig:
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    loss: str = "kto"
    """kto: rewards are compared with the mean log-ratio of answers to other prompts (a second forward without
    gradient in each step); apo_zero_unpaired: with 0. Formulas in strop/algos/kto.py."""
    desirable_weight: float = 1.0
    """Weight of the loss of desirable answers. (desirable_weight x desirable rows) / (undesirable_weight x
    undesirable rows) should lie between 1 and 4/3."""
    undesirable_weight: float = 1.0
    """Weight of the loss of undesirable ones."""
    reference: Optional[str] = None
    """Reference model; null: the model itself before training."""


@dataclass(frozen=True)
class CptConfig:
    cross_documents: bool = False
    """Let attention go on from one document of a block into the next; false: each sees itself only, and its
    positions begin at 0."""


@dataclass(frozen=True)
class SftConfig:
    train_on: str = "all"
    """all: the completion (messages: every turn of the assistant, but those with "weight": 0); last: only the
    assistant's last turn; everything: the prompt too. Turns are what the chat template marks with
    {% generation %}, where it does."""
    neftune_alpha: Optional[float] = None
    """NEFTune (Jain et al. 2024): uniform noise of up to this over the square root of (tokens x hidden size)
    on the embeddings of each sequence in training, such as 5; null: none."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters instead of all weights: y = W x + (alpha / rank) B A x, of which only A and B are trained."""

    rank: Optional[int] = None
    """Rows of A; null: no adapters, all weights are trained. Adapters want a learning rate some ten times
    that of full training."""
    alpha: float = 32.0
    """Scale of the adapters: their part is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is set to 0 in training, the rest scaled up: [0, 1). Drawn for each
    step, row and token, the same in any batch and on any number of ranks."""
    targets: Any = "all-linear"
    """Layers with adapters, as PEFT's target_modules: all-linear (all but the head), a list of names or of
    their last parts ([q_proj, v_proj]), or a regular expression for whole names."""
    modules_to_save: Any = None
    """Modules that are trained whole beside the adapters, by name or its last part, as PEFT's; a reward
    model's score is among them always."""


@dataclass(frozen=True)
class RmConfig:
    center_rewards_coefficient: Optional[float] = None
    """Weight of (r_chosen + r_rejected)², which holds the scores' mean near zero, such as 0.01; null: 0."""


@dataclass(frozen=True)
class DistConfig:
    backend: str = "auto"
    """auto: nccl where every rank has a GPU, else gloo."""
    timeout_s: float = 1800.0
    """A collective that takes longer is an error."""
    rendezvous_timeout_s: float = 600.0
    """How long ranks wait for each other at the start."""
    shard_size: Optional[int] = None
    """Ranks that share one copy of the weights (hybrid sharding); null: all of them."""


@dataclass(frozen=True)
class WatchdogConfig:
    enabled: bool = True
    """End the attempt, with the stacks of all ranks, when one makes no progress."""
    start_s: float = 1800.0
    """Longest time without progress in start-up (data, model, first step of each kind)."""
    step_s: float = 300.0
    """Longest time of one micro batch in training, validation or the reference pass, ..."""
    step_factor: float = 20.0
    """... or this times the median of the recent ones, whichever is longer."""
    save_s: float = 1800.0
    """Longest time of one checkpoint."""


@dataclass(frozen=True)
class LogConfig:
    level: str = "info"
    """debug, info, warning or error."""
    every: int = 1
    """Write metrics every so many steps."""
    max_mib: int = 64
    """Most MiB of logs that a rank keeps of one attempt, half of it for its raw output. The beginning and
    the newest part stay."""
    tensorboard: bool = True
    """Write runs/<name>/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases (must be installed)."""
    mlflow: bool = False
    """Log to MLflow (must be installed)."""
    project: str = "strop"
    """Project or experiment name there."""


@dataclass(frozen=True)
class RunConfig:
    name: Optional[str] = None
    """Name of the run; an existing one is resumed. null: <algo>-<job id>. In a job array each task is a run
    of its own: NAME-<task>, or <algo>-<array id>_<task>."""
    dir: str = "runs"
    """Directory of all runs."""
    allow_config_change: bool = False
    """Resume although the configuration differs from the one that the run was started with."""
    allow_code_change: bool = False
    """Resume although the code differs."""


@dataclass(frozen=True)
class ClusterConfig:
    """What the submission asks Slurm for where its command line does not (tools.submit, recipes)."""

    nodes: Optional[int] = None
    """Number of nodes."""
    gpus_per_node: Optional[int] = None
    """GPUs on each."""


@dataclass(frozen=True)
class Config:
    algo: str = "dpo"
    """The algorithm: one of ALGOS; set by the command, not by the file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    kto: KtoConfig = field(default_factory=KtoConfig)
    cpt: CptConfig = field(default_factory=CptConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rm: RmConfig = field(default_factory=RmConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free-form notes, kept in the run's config.yaml and sent to wandb and mlflow."""


FREE_FORM = "metadata"

MAY_CHANGE: dict[str, str] = {
    "run.": "where a run lies and what its owner permits",
    "watchdog.": "it only ends what hangs",
    "log.": "what is shown, not what is computed",
    "checkpoint.": "a checkpoint only copies the state",
    "validation.": "validation reads the weights; patience ends a run as max_steps does",
    "cluster.": "what Slurm is asked for; another number of ranks trains on the same batches",
    "dist.": "how ranks talk; the same reason",
    "metadata.": "notes",
    "data.cache_dir": "the cache is found by content",
    "train.max_steps": "a finished run is extended by a larger one",
    "train.max_epochs": "the same",
    "train.limit_val_batches": "as validation",
}
"""Keys (sections end in a dot) in which a resumed run may differ from its start, and why."""
