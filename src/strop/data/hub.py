"""What `datasets` loads: from the hub, from its cache, from a directory that it saved or that is a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strop import similar
from strop.data import adapt
from strop.errors import UserError, first_line

IS_AWAY = "the hub cannot be reached"
"""In the message of an error; the doctor, which never asks the hub, tells it from the others by that."""


def load(name: str, path: str, subset: str | None, split: str | None) -> Any:
    """A `datasets.Dataset`. UserError for a set that is not there; ConnectionError, which may pass, for a hub
    that does not answer, but UserError where the user has said to work offline."""
    import datasets

    nearest = similar.meant(path.lower(), adapt.TABLE)
    try:
        if (Path(path) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            if split not in saved:
                raise ValueError(f"unknown split {split!r}; it has {', '.join(saved)}")
            return saved[split]
        if (Path(path) / "state.json").exists():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, subset, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise _damaged(name, error) from None
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        if Path(path).is_dir():
            raise UserError(f"{name}: {first_line(error)}") from None
        text = f"{name}: {first_line(error)} (neither a local path nor a hub set)"
        raise UserError(text + nearest) from None
    except ConnectionError as error:
        text = f"{name} is no local path, and {IS_AWAY}: {first_line(error)}{nearest}"
        if datasets.config.HF_HUB_OFFLINE:
            raise UserError(text) from None
        raise ConnectionError(text) from None


def _damaged(name: str, error: Exception) -> BaseException:
    """What to raise for rows that `datasets` cannot read: the disk's own error, where it is that one."""
    cause = error.__cause__ or error
    if getattr(cause, "errno", None):
        return cause
    why = "" if cause is error else f" ({first_line(cause)})"
    return UserError(f"{name}: {first_line(error)}{why}")


def check_saved(path: Path, name: str, key: str, asked: str | None, beside: bool) -> None:
    """UserError if a set saved by `Dataset.save_to_disk`, which has no splits, is asked for one (key, asked)
    that it was not when it was saved, or for one beside the training set that it is."""
    try:
        held = json.loads((path / "state.json").read_text(encoding="utf-8")).get("_split")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{name}: damaged state.json ({first_line(error)})") from None
    if asked is not None and (beside or asked != held):
        advice = "data.validation names another one, data.split makes one of it" if beside else "leave it out"
        raise UserError(
            f"{key}={asked}: {name} is one set without splits, saved by Dataset.save_to_disk; {advice}"
        )


def splits(path: Path, subset: str | None) -> list[str]:
    """Names of the splits in a directory that `datasets` saved or that is a copy of a hub set. UserError for
    one that it cannot read."""
    import datasets

    if (path / "dataset_dict.json").exists():
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    try:
        return list(datasets.get_dataset_split_names(str(path), subset))
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
