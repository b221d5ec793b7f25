"""Whether two finished runs are the same: weights, optimiser state, counters and metrics, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from strop import checkpoint


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    out = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(out, checkpoint_id=folder)
    return out


def differences(run: Path, other: Path, step: int) -> list[str]:
    """What differs after `step`, one line each; empty if nothing does."""
    import torch

    lines = []
    if (run / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        lines.append(_first_other_line(run / "metrics.jsonl", other / "metrics.jsonl"))
    folders = [checkpoint.step_dir(r / "checkpoints", step) for r in (run, other)]
    for folder in folders:
        if not (folder / checkpoint.MARKER).is_file():
            return [*lines, f"{folder} is not committed"]
        checkpoint.verify(folder)
    states = [json.loads((f / checkpoint.STATE).read_text()) for f in folders]
    lines += [
        f"state: {key} is {states[0].get(key)!r}, not {states[1][key]!r}"
        for key in states[1]
        if states[0].get(key) != states[1][key]
    ]
    mine, theirs = (tensors(f) for f in folders)
    if mine.keys() != theirs.keys():
        lines.append(f"tensors: {sorted(mine.keys() ^ theirs.keys())} are in one of them only")
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = mine[name], theirs[name]
        same = a.dtype == b.dtype and a.shape == b.shape
        if not same or not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            lines.append(f"tensor {name} differs")
    return lines


def _first_other_line(path: Path, other: Path) -> str:
    mine, theirs = path.read_text().splitlines(), other.read_text().splitlines()
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    return f"{path}:{at + 1} differs from {other} ({len(mine)} and {len(theirs)} lines)"
