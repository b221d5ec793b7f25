"""The tree of `config_schema.py`, filled from a YAML file and the command line.

A YAML file states only what differs from the defaults there; `key=value` overrides on the command line
win over it; `+metadata.team=x` adds a free-form key where the schema has a free-form section. Names that
NeMo RL's users type are accepted through one table (`aliases.py`) and reported. An unknown key is an
error that names the nearest right one, a value of another type is an error that names the key, and both
come before torch is imported. The resolved tree is written to `runs/<name>/config.yaml` once.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from strop import config_check, config_load, similar
from strop.config_schema import (
    ALGOS,
    FREE_FORM,
    KINDS,
    MAY_CHANGE,
    CheckpointConfig,
    ClusterConfig,
    Config,
    CptConfig,
    DataConfig,
    DistConfig,
    DpoConfig,
    KtoConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    RmConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
    ValidationConfig,
    WatchdogConfig,
)
from strop.errors import UserError
from strop.slurm import code

__all__ = [
    "ALGOS",
    "FREE_FORM",
    "KINDS",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CptConfig",
    "DataConfig",
    "DistConfig",
    "DpoConfig",
    "KtoConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "PrepareConfig",
    "RmConfig",
    "RunConfig",
    "SftConfig",
    "TrainConfig",
    "ValidationConfig",
    "WatchdogConfig",
    "cache_dir",
    "default_path",
    "differences",
    "dump_yaml",
    "flatten",
    "help_text",
    "load",
    "parse_args",
    "to_dict",
]


def load(
    algo: str,
    config_path: Union[str, Path, None],
    overrides: Sequence[Union[str, config_load.Entry]],
    notes: Optional[list[str]] = None,
) -> Config:
    """Defaults < YAML file < `key=value` words, checked. UserError names key, file and line.

    config_path None: configs/<algo>.yaml under the current directory, else under the repository root.
    notes: filled with what the caller should print about names that were translated.
    """
    if algo not in ALGOS:
        raise UserError(f"unknown algorithm {algo!r}: expected one of {', '.join(ALGOS)}")
    path = default_path(algo) if config_path is None else Path(config_path)
    known = config_load.leaves(Config)
    section_names = config_load.sections([*known, *config_load.ALIASES])
    collected: list[str] = []
    layers = []
    for entries in (config_load.read_file(path, section_names), config_load.read_words(overrides)):
        renamed = [config_load.rename(entry, collected, algo) for entry in entries]
        layers.append([config_load.place(entry, known, FREE_FORM) for entry in renamed])
    config_load.refuse_contradictions(layers[0])
    config, where = config_load.merge(Config, known, layers)
    if "algo" in where and config.algo != algo:
        raise UserError(f"{where['algo']}: algo is {config.algo}, but this is a {algo} run")
    config = dataclasses.replace(config, algo=algo)
    flat = flatten(to_dict(config))
    config_check.check(flat, where, path)
    written_for_it = {entry.key for entry in layers[1]}
    for key, owner in ((key, owner_of(key)) for key in where):
        if owner in (None, algo) or flat[key] == known[key].default:
            continue
        if key in written_for_it:
            raise UserError(
                f"{where[key]}: {key} is {flat[key]!r}, but only {owner} knows it: this is {algo}"
            )
        collected.append(f"{key} is for {owner}, and of no use to {algo}")  # several runs may share a file
    if notes is not None:
        notes.extend(dict.fromkeys(collected))
    return config


def owner_of(key: str) -> Optional[str]:
    """The algorithm whose section a key stands in, for `prepare` the one that reads text; None for what all
    know."""
    section = (config_load.ALIASES[key].key if key in config_load.ALIASES else key).partition(".")[0]
    section = "cpt" if section == "prepare" else section
    return section if section in ALGOS else None


ROWS_ONLY = {"train.shared_prefix": "preference", "data.completion_template": "sft"}
"""Keys that mean something for one kind of rows."""


def is_for(key: str, algo: str) -> bool:
    """Whether a key that several runs share means something to this algorithm."""
    return owner_of(key) in (None, algo) and ROWS_ONLY.get(key, KINDS[algo]) == KINDS[algo]


def default_path(algo: str) -> Path:
    here = Path("configs") / f"{algo}.yaml"
    in_repository = code.REPOSITORY / here
    if here.exists() or not in_repository.exists():
        return here
    return in_repository


def cache_dir(config: Config, runs: Path) -> Path:
    """Where tokenised data is kept; `runs`: the directory of all runs."""
    return Path(config.data.cache_dir or runs / ".cache")


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved tree as plain dicts and lists."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML, in the schema's order; `load` reads it back to an equal tree."""
    return dump_tree(to_dict(config))


def dump_tree(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "train.seed: 42 -> 43" for what a resume would change against the run's config.yaml."""
    before, after = flatten(old), flatten(new)
    lines = []
    for key in dict.fromkeys([*after, *before]):
        may_change = any(key.startswith(k) if k.endswith(".") else key == k for k in MAY_CHANGE)
        a, b = before.get(key, "(not set)"), after.get(key, "(not set)")
        if a != b and not may_change:
            lines.append(f"{key}: {'null' if a is None else a} -> {'null' if b is None else b}")
    return lines


def parse_args(argv: Sequence[str], algo: Optional[str] = None) -> tuple[Optional[Path], list[str]]:
    """`[--config FILE] [key=value ...]` -> (file, words). -h prints the help and exits 0."""
    config_path: Optional[Path] = None
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(help_text(algo or ALGOS[-1]))
            raise SystemExit(0)
        if word == "--config":
            if not rest:
                raise UserError("command line: --config needs a file")
            config_path = Path(rest.pop(0))
        elif word.startswith("--config="):
            config_path = Path(word.partition("=")[2])
        elif word.startswith("-") or "=" not in word:
            hint = ""
            if word.endswith((".yaml", ".yml")):
                hint = similar.asked([f"--config {word}"])
            elif "=" in word:
                hint = similar.asked([word.lstrip("-")])
            raise UserError(f"command line: {word!r} is neither --config FILE nor key=value{hint}")
        else:
            words.append(word)
    return config_path, words


def trains_reward_model(algo: str) -> bool:
    """Whether it trains a model with a scalar head in place of the language model's."""
    return algo == "rm"


def help_text(algo: str) -> str:
    """Every key with its default and meaning."""
    lines = [
        f"usage: ... {algo} [--config FILE] [key=value ...] [+{FREE_FORM}.name=value ...]",
        "",
        f"FILE is configs/{algo}.yaml if not given. Words win over the file, which states only what differs",
        "from the defaults below. Lists and nulls as in YAML: optim.betas='[0.9, 0.98]' train.max_steps=null",
        f"Example: {algo} model.path=/models/my-model data.train=my.jsonl optim.lr=5e-7 max_steps=100",
        "Names that NeMo RL uses (policy.model_name, ...) are understood and reported.",
    ]
    section = None
    for key, leaf in config_load.leaves(Config).items():
        head = key.partition(".")[0]
        if key == "algo" or owner_of(key) not in (None, algo):
            continue
        if head != section:
            section = head
            lines += ["", f"{head}:"]
        default = yaml.safe_dump(leaf.default, default_flow_style=True).replace("...", "").strip()
        lines.append(f"  {key} = {default}")
        lines.append(textwrap.fill(leaf.doc, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)
