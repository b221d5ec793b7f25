"""All checks in their order, each section only where what it needs was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from strop import config as config_module
from strop import user_code, user_metrics
from strop.config import Config
from strop.data import hub
from strop.data.sets import Maker
from strop.data.tokenise import tokenizer_digest
from strop.doctor import memory, model, place, rows, schedule, text, tokens
from strop.doctor.checks import Check, Checks
from strop.errors import UserError


@dataclass(frozen=True)
class Question:
    algo: str
    args: tuple[str, ...]
    """`--config FILE key=value ...`, as the job gets them."""
    nodes: Optional[int] = None
    gpus_per_node: Optional[int] = None
    gpu_mem_gib: Optional[float] = None
    rows: Optional[int] = 300
    """Rows to look at of each source; None: all."""
    previews: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    """The environment that the job would inherit."""


@dataclass
class Answer:
    checks: list[Check]
    previews: list[tuple[str, list[tuple[str, bool]]]] = field(default_factory=list)
    """[(title, [(text, trained)])] of the first rows."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Sizes in bytes, counts: for programs."""


def examine(question: Question) -> Answer:
    """Everything that can be known now. Only a broken configuration keeps later checks from being made."""
    checks = Checks()
    answer = Answer(checks.found)
    q = question
    notes: list[str] = []
    try:
        path, words = config_module.parse_args(q.args, q.algo)
        config = config_module.load(q.algo, path, words, notes)
    except UserError as error:
        checks.fail("configuration", str(error))
        return answer
    checks.ok("configuration", f"{path or config_module.default_path(q.algo)} and {len(words)} words")
    for note in notes:
        checks.ok("configuration", f"note: {note}")
    nodes = q.nodes or config.cluster.nodes or 1
    gpus = config.cluster.gpus_per_node if q.gpus_per_node is None else q.gpus_per_node
    world = nodes * (gpus or 1)
    scores = config_module.trains_reward_model(q.algo)
    shape = model.look(config.model, checks, _offline(q.variables), scores, config.lora)
    train = _data(q, config, shape, world, answer, checks)
    run_dir = place.run_directory(q.algo, q.args, config, checks)
    if shape is not None:
        longest = max(train.row_tokens, default=0) if train else 0
        gpu = bool(gpus) or q.gpu_mem_gib is not None
        needed = schedule.needed_memory(config, shape, longest, world, gpu, q.gpu_mem_gib, checks)
        schedule.disk(config, shape, run_dir, checks)
        answer.numbers |= _numbers(shape, needed, world)
    _own_metrics(config, checks)
    place.git_state(checks)
    place.host(q.variables, checks)
    options = [f"--nodes={nodes}"] + ([f"--gpus-per-node={gpus}"] if gpus else [])
    place.ask_slurm(q.algo, q.args, options, checks)
    return answer


def _offline(variables: Mapping[str, str]) -> bool:
    return variables.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _data(
    q: Question, config: Config, shape: Optional[model.Shape], world: int, answer: Answer, checks: Checks
) -> Optional[rows.Scan]:
    """Tokenizer, rows, steps: the scan of the training set, or None."""
    offline = _offline(q.variables)
    tokenizer = tokens.load(config, checks, offline)
    if tokenizer is None:
        return None
    kind = config_module.KINDS[q.algo]
    maker = Maker(config, kind, tokenizer, tokenizer_digest(tokenizer), Path())

    def scan(split: str) -> Optional[rows.Scan]:
        if kind == "text":
            return _scanned(
                split, lambda: text.scan(config, maker, tokenizer, split, q.rows), offline, checks
            )
        return _scanned(split, lambda: rows.scan(config, tokenizer, kind, split, q.rows), offline, checks)

    train = scan("train")
    if train is None:
        return None
    rows.judge(train, config, checks)
    tokens.judge(train, tokenizer, shape, checks)
    if shape is not None and shape.max_positions and config.data.max_length > shape.max_positions:
        told = f"data.max_length={config.data.max_length}, the model was made for {shape.max_positions}"
        checks.warn("train data", told, "lower it")
    for row in train.examples[: q.previews]:
        answer.previews += tokens.preview(row, tokenizer, kind)
    validation = None
    try:
        names = maker.names()
    except UserError as error:
        checks.fail("validation data", str(error))
        names = []
    if "validation" in names:
        validation = scan("validation")
        if validation is not None:
            rows.judge(validation, config, checks)
            rows.compare(train, validation, checks)
    total = schedule.steps(config, train, world, checks)
    if total is not None:
        schedule.cadences(config, total, validation.usable_rows if validation else 0, checks)
        answer.numbers |= {"steps": total, "train_rows": train.usable_rows}
    return train


def _own_metrics(config: Config, checks: Checks) -> None:
    """Whether the user's functions can be imported here."""
    for name in user_metrics.names(config):
        try:
            user_code.load(name, user_metrics.KEY)
            checks.ok("validation metrics", f"{name} can be imported")
        except UserError as error:
            checks.fail("validation metrics", str(error))


def _scanned(split: str, scan: Callable[[], rows.Scan], offline: bool, checks: Checks) -> Optional[rows.Scan]:
    """The scan, or None with the reason told. What is only not in the hub's cache yet may still come."""
    try:
        return scan()
    except UserError as error:
        if hub.IS_AWAY in str(error) and not offline:
            advice = "fetch it on a node with internet: hf download --repo-type dataset NAME"
            checks.warn(f"{split} data", "it is not in the hub cache, and is not looked at", advice)
        else:
            checks.fail(f"{split} data", str(error))
    except OSError as error:
        checks.fail(f"{split} data", str(error), "see whether it can be read")
    return None


def _numbers(shape: model.Shape, needed: memory.Memory, world: int) -> dict[str, Any]:
    return {
        "num_params": shape.num_params,
        "world_size": world,
        "memory_bytes": {**vars(needed), "states": needed.states, "total": needed.total},
        "checkpoint_bytes": memory.checkpoint_bytes(shape),
    }


def guess_algo(config_path: Optional[Path]) -> Optional[str]:
    """The algorithm that a configuration file is for: its `algo:` line, else a part of its name."""
    if config_path is None:
        return None
    try:
        lines = config_path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = [line.partition(":")[2].split("#")[0].strip() for line in lines if line.startswith("algo:")]
    parts = config_path.stem.replace("_", "-").replace(".", "-").split("-")
    return next((word for word in (*named, *parts) if word in config_module.ALGOS), None)
