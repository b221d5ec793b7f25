"""The file of a pipeline and the words of its command line, sorted by stage; `spec` makes stages of them.

Known here are the keys and where each stands, not what they mean together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from strop import config_load
from strop.config import Config
from strop.config_load import Entry
from strop.errors import UserError
from strop.similar import meant_or_known

TOP = ("name", "dir", "set", "slurm", "stages")
STAGE = ("algo", "config", "set", "after", "model", "prepares", "slurm", "export")
EXPORT = ("step", "dtype", "slurm")
RESERVED = {
    *("job_name", "output", "error", "open_mode", "dependency", "kill_on_invalid_dep", "parsable", "wrap"),
    *("array", "hold", "wait", "test_only", "export", "chdir", "signal"),
}
"""Options of sbatch that the pipeline sets itself, or that would break its jobs."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass
class Raw:
    """A stage as it stands in the file."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    export_slurm: dict[str, Any] = field(default_factory=dict)
    settings: list[Entry] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)


def read(file: Path, words: Sequence[str]) -> tuple[Raw, dict[str, Raw]]:
    """(what holds for all stages, each stage in the file's order). UserError names file, line and key."""
    common = Raw(str(file))
    raws: dict[str, Raw] = {}
    entries = config_load.read_file(file, _Sections())
    for name in _stage_names(file):
        raws[name] = Raw(str(file))
    for entry in entries:
        _place(entry, common, raws)
    if not raws:
        raise UserError(f"{file}: stages is missing: a mapping from names to stages")
    for entry in config_load.read_words(words):
        _place_word(entry, common, raws)
    return common, raws


def read_top(file: Path, words: Sequence[str]) -> Raw:
    """`name` and `dir`, and nothing else is looked at."""
    common = Raw(str(file))
    sections = _Sections()
    for entry in [*config_load.read_file(file, sections), *config_load.read_words(words)]:
        if entry.key in ("name", "dir"):
            common.values[entry.key] = entry.value if entry.where != config_load.COMMAND_LINE else entry.text
            common.lines[entry.key] = entry.where
    return common


class _Sections(set[str]):
    """Says which dotted keys of the file are sections: stages have any name."""

    def __init__(self) -> None:
        super().__init__()
        self._strop = config_load.sections([*config_load.leaves(Config), *config_load.ALIASES])

    def __contains__(self, key: object) -> bool:
        parts = str(key).split(".")
        if parts[0] == "stages" and len(parts) > 2:
            parts = parts[2:]
            if parts[0] == "export":
                return len(parts) == 1 or parts[1:] == ["slurm"]
        elif parts[0] == "stages":
            return True
        if parts[0] == "set":
            return len(parts) == 1 or ".".join(parts[1:]) in self._strop
        return parts == ["slurm"]


def _stage_names(file: Path) -> list[str]:
    """In the file's order, empty ones included."""
    tree = yaml.load(file.read_text(encoding="utf-8"), config_load.Loader)
    stages = tree.get("stages") if isinstance(tree, dict) else None
    if stages is None:
        return []
    if not isinstance(stages, dict):
        raise UserError(f"{file}: stages is {stages!r}, expected a mapping from names to stages")
    for name, value in stages.items():
        if not NAME.fullmatch(name) or name in TOP:
            raise UserError(f"{file}: stages.{name}: a stage's name has letters, digits, _ and - only")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{file}: stages.{name} is {value!r}, expected its keys: {', '.join(STAGE)}")
    return list(stages)


def _place(entry: Entry, common: Raw, raws: Mapping[str, Raw]) -> None:
    parts = entry.key.split(".")
    raw, of = common, ""
    known: Sequence[str] = TOP
    if parts[0] == "stages":
        raw, known, of = raws[parts[1]], STAGE, f"stages.{parts[1]}."
        raw.where = raw.where if raw.values or raw.lines else entry.where
        parts = parts[2:]
    if parts[0] not in known:
        raise UserError(f"{entry.where}: unknown key {of}{parts[0]}{meant_or_known(parts[0], known)}")
    if parts[0] == "set":
        raw.settings.append(_setting(entry, ".".join(parts[1:])))
    elif parts[0] == "slurm":
        _place_option(entry, ".".join(parts[1:]), raw.slurm)
    elif parts[0] == "export" and parts[1:2] == ["slurm"]:
        _place_option(entry, ".".join(parts[2:]), raw.export_slurm)
    elif parts[0] == "export":
        key = ".".join(parts[1:])
        if key not in EXPORT:
            raise UserError(f"{entry.where}: unknown key {of}export.{key}{meant_or_known(key, EXPORT)}")
        raw.export[key] = entry.value if entry.text is None else entry.text
        raw.lines[f"export.{key}"] = entry.where
    else:
        raw.values[parts[0]] = entry.value
        raw.lines[parts[0]] = entry.where


def _place_option(entry: Entry, key: str, options: dict[str, Any]) -> None:
    name = key.replace("-", "_")
    if not name:
        raise UserError(f"{entry.where}: {entry.key} is {entry.value!r}, expected options of sbatch")
    if name in RESERVED:
        raise UserError(f"{entry.where}: {entry.key}: the pipeline sets sbatch's --{name.replace('_', '-')}")
    if isinstance(entry.value, (dict, list)) or entry.value is None:
        raise UserError(f"{entry.where}: {entry.key} is {entry.value!r}, expected one value, true or false")
    options[name] = entry.value if isinstance(entry.value, bool) else str(entry.text or entry.value)


def _setting(entry: Entry, key: str) -> Entry:
    """A key of the strop configuration, which `config.load` checks."""
    if not key:
        raise UserError(f"{entry.where}: {entry.key} is {entry.value!r}, expected keys of the configuration")
    if key in ("run.name", "run.dir", "algo"):
        instead = {"run.name": "name and the stage's name", "run.dir": "dir", "algo": "algo"}[key]
        raise UserError(f"{entry.where}: {key} of a stage follows from the pipeline's {instead}")
    return Entry(key, entry.value, entry.text, entry.where)


def _place_word(entry: Entry, common: Raw, raws: Mapping[str, Raw]) -> None:
    head, dot, key = entry.key.partition(".")
    if not dot and head in ("name", "dir"):
        common.values[head] = entry.text
        common.lines[head] = entry.where
    elif dot and head in raws:
        own = Entry(entry.key, entry.value, entry.text, f"{entry.where}, stage {head}")
        raws[head].settings.append(_setting(own, key))
    else:
        text = f"{entry.where}: {entry.key}: expected name=, dir= or STAGE.KEY="
        raise UserError(f"{text}{meant_or_known(head, list(raws))}")


def text(raw: Raw, key: str) -> Optional[str]:
    value = raw.values.get(key)
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"{raw.lines[key]}: {key} is {value!r}, expected text")
    return None if value is None else str(value)
