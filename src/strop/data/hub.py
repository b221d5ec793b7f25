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
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        text = f"{name}: {first_line(error)} (neither a local path nor a hub set)"
        raise UserError(text + nearest) from None
    except ConnectionError as error:
        text = f"{name} is no local path, and {IS_AWAY}: {first_line(error)}{nearest}"
        if datasets.config.HF_HUB_OFFLINE:
            raise UserError(text) from None
        raise ConnectionError(text) from None


def splits(path: Path, subset: str | None) -> list[str]:
    """Names of the splits in a directory; none, where `datasets` saved a set without any. UserError for one
    that it cannot read."""
    import datasets

    if (path / "state.json").exists():
        return []
    if (path / "dataset_dict.json").exists():
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    try:
        return list(datasets.get_dataset_split_names(str(path), subset))
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from None
