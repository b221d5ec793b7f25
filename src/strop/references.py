"""Which log-probs of a reference model a run needs, where they are kept, and the pass that computes them.

`strop.algos.reference` fills one file; here it is settled by what the run trains on: its sets, its plan, and
all that the numbers depend on, which is what names the file, so runs share it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from strop import config as config_module
from strop import ops, parallel
from strop.algos import reference
from strop.data.mismatched import Mismatched
from strop.data.store import TokenStore
from strop.models import hf
from strop.trainer import Trainer, step_bins, stop_agreed, validation_bins

MISMATCHED = ", mismatched"
"""Behind the name of a set: its prompts with the completions of other rows."""


def identity(t: Trainer) -> Optional[dict[str, Any]]:
    """What the log-probs of the reference belong to; None for an algorithm without one."""
    if not t.algo.needs_reference(t.config):
        return None
    digests = {name: store.digest for name, store in stores(t).items()}
    model = t.config.model
    return {
        "model": [model.path, model.revision],
        "other": t.algo.reference_model(t.config),
        "stores": digests,
    }


def files(t: Trainer) -> dict[str, str]:
    """Where the log-probs of each set are kept, by all that they depend on."""
    c = t.config
    model, revision = c.model.path, c.model.revision
    if path := t.algo.reference_model(c):
        model, revision = path, None
    assert model is not None
    cache = config_module.cache_dir(c, t.run.dir.parent)
    with t.report.phase("hashing the reference's weights"):
        weights = hf.weights_digest(model, revision, cache)
    facts = {
        "weights": weights,
        "precision": c.train.precision,
        "layout": t.policy.layout,
        "attention": t.policy.attention,
        "head": t.policy.head,
        "shared_prefix": isinstance(t.train_store, TokenStore) and t.train_store.shared_R is not None,
        "device": t.dist.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": ops.backend(t.dist.device, parallel.DTYPES[c.train.precision]),
        "ranks": t.dist.world_size,
        "plan": [
            c.train.seed,
            c.train.global_batch_size,
            c.train.micro_batch_tokens,
            c.train.micro_batch_size,
            c.data.weights,
        ],
    }
    return {name: str(reference.cache_file(cache, store, facts)) for name, store in stores(t).items()}


def stores(t: Trainer) -> dict[str, reference.RowStore]:
    """Those that have a reference: rows, never text, and what a baseline is measured on."""
    stores = {"train": t.train_store} | ({"validation": t.val_store} if t.val_store is not None else {})
    own: dict[str, reference.RowStore] = {n: s for n, s in stores.items() if isinstance(s, TokenStore)}
    return own | {f"{name}{MISMATCHED}": view for name, view in t.mismatched.items()}


def is_missing(t: Trainer, choices: dict[str, Any]) -> bool:
    if "reference" not in choices:
        return True
    gone = False
    if t.dist.is_main:
        for name, store in stores(t).items():
            rows = np.concatenate([r for own in bins_of(t, name) for r in own])
            gone = gone or reference.missing(Path(choices["reference"][name]), store, rows)
    return t.dist.any(gone)


def bins_of(t: Trainer, name: str) -> reference.Bins:
    """Batches as the loop will see them, up to the one in which the last row is seen for the first time (the
    first epoch, unless some of its steps are left out or data.weights draws rows); or those of validation."""
    store = stores(t)[name]
    if name.startswith("validation"):
        return validation_bins(t, store)
    view = store if isinstance(store, Mismatched) else None
    ranks: reference.Bins = [[] for _ in range(t.dist.world_size)]
    unseen, left = np.ones(t.train_store.num_rows, dtype=np.bool_), t.train_store.num_rows
    for step in range(t.max_steps):
        if not left:
            break
        for micro_batch in zip(*step_bins(t, step, view)):
            rows = np.unique(np.concatenate(micro_batch))
            new = rows[unseen[rows]]
            if len(new):
                unseen[new] = False
                left -= len(new)
                for own, bin_ in zip(ranks, micro_batch):
                    own.append(bin_)
    return ranks


def compute(t: Trainer, choices: dict[str, Any], *, again: bool) -> bool:
    """Compute what is missing; False if stopped. `again`: the policy's own weights are needed afterwards."""
    t.position.enter("reference")
    other = t.algo.reference_model(t.config)
    if other is not None:
        hf.scatter_weights(t.policy.lm, t.config.model, t.dist, path=other, key=f"{t.config.algo}.reference")
    for name, store in stores(t).items():
        with t.report.phase(f"reference log-probs ({name})") as progress:
            path = Path(choices["reference"][name])
            bins = bins_of(t, name)
            if not reference.compute(
                t.policy, store, bins, path, t.dist, t.run.dir.name, lambda: stop_agreed(t), progress
            ):
                return False
    if other is not None and again:
        hf.scatter_weights(t.policy.lm, t.config.model, t.dist)
    return True


def open_all(t: Trainer, choices: dict[str, Any]) -> None:
    t.train_ref = np.load(choices["reference"]["train"], mmap_mode="r")
    if t.val_store is not None:
        t.val_ref = np.load(choices["reference"]["validation"], mmap_mode="r")
    for name in t.mismatched:
        t.mismatched_refs[name] = np.load(choices["reference"][f"{name}{MISMATCHED}"], mmap_mode="r")
