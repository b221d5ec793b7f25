"""Log-probs of the reference model, computed once, before training, by the trainer's own forward.

Policy and reference go through the same function on the same packed batches (those of the first epoch), so
at step 0 they are equal to the last bit. The result is one flat fp32 array, laid out like the token
store's, in a file named by all that it depends on: runs with the same weights, data and plan share it, and
a resumed run keeps the one it began with. NaN marks what is not computed yet, so a pass that was stopped
goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch

from strop.data.batch import Prefetcher, make_batch
from strop.data.mismatched import Mismatched
from strop.data.store import TokenStore
from strop.dist import Dist
from strop.models.policy import Policy

log = logging.getLogger(__name__)

FORMAT = 1
FLUSH_S = 20.0
"""How much of a stopped pass is computed again, at most."""

Bins = list[list[np.ndarray]]
RowStore = Union[TokenStore, Mismatched]


def cache_file(cache_dir: Path, store: RowStore, facts: dict[str, Any]) -> Path:
    """Where the log-probs of `store` are kept. `facts`: weights, precision, layout, plan, ranks."""
    text = json.dumps({"format": FORMAT, "store": store.digest, **facts}, sort_keys=True)
    return cache_dir / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"


def missing(path: Path, store: RowStore, rows: np.ndarray) -> bool:
    """Whether any trained token of `rows` has no value in the file."""
    if not path.exists():
        return True
    values = np.load(path, mmap_mode="r")
    spans = (span for row in rows for span in store.spans(row))
    masks = (trained for row in rows for _, trained in store.sequences(row))
    return any(np.isnan(values[a:b][trained]).any() for (a, b), trained in zip(spans, masks))


def compute(
    policy: Policy,
    store: RowStore,
    bins: Bins,
    path: Path,
    dist: Dist,
    owner: str,
    stopped: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> bool:
    """Fill `path` for the rows of `bins` ([rank][micro batch] -> rows). Collective; False if stopped.

    `owner` names the unfinished file, so that two runs do not write one. `stopped` is asked after every
    micro batch and must give all ranks the same answer.
    """
    partial = path.with_name(f"{path.stem}.{owner}.partial.npy")
    values = _open(path, partial, store) if dist.is_main else None
    todo = [b for b in range(len(bins[0])) if _any_missing(values, store, [own[b] for own in bins])]
    todo = dist.broadcast(todo)
    last_flush = time.monotonic()
    own = bins[dist.rank]
    with Prefetcher(make_batch(store, own[b]).ready_for(dist.device) for b in todo) as batches:
        for done, batch in enumerate(batches, 1):
            with torch.no_grad():
                logp_T = policy(batch.to(dist.device)).logp_T
            for rows, logp in dist.gather((batch.rows, logp_T.cpu().numpy())):
                if values is not None:
                    _put(values, store, rows, logp)
            progress(done, len(todo))
            if values is not None and time.monotonic() - last_flush > FLUSH_S:
                values.flush()
                last_flush = time.monotonic()
            if done < len(todo) and stopped():
                if values is not None:
                    values.flush()
                return False
    if values is not None:
        values.flush()
        os.replace(partial, path)
    dist.barrier()
    return True


def _open(path: Path, partial: Path, store: RowStore) -> np.memmap:
    """The array to fill: an unfinished one, a copy of one with other rows, or a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not partial.exists():
        aside = partial.with_suffix(f".{os.getpid()}")
        if path.exists():
            shutil.copyfile(path, aside)
        else:
            shape = (int(store.offsets[-1]),)
            fresh = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
            fresh[:] = np.nan
            fresh.flush()
        os.replace(aside, partial)
    return np.lib.format.open_memmap(partial, mode="r+")


def _any_missing(values: np.ndarray | None, store: RowStore, rows_of_ranks: list[np.ndarray]) -> bool:
    spans = (span for rows in rows_of_ranks for row in rows for span in store.spans(row))
    return values is not None and any(np.isnan(values[a:b]).any() for a, b in spans)


def _put(values: np.ndarray, store: RowStore, rows: np.ndarray, logp: np.ndarray) -> None:
    """Fill in what is missing. A value that is there stays: steps were taken with it, and another number of
    ranks packs its row with others, which may change its last bit."""
    at = 0
    for row in rows:
        for a, b in store.spans(row):
            missing = np.isnan(values[a:b])
            values[a:b][missing] = logp[at : at + b - a][missing]
            at += b - a
