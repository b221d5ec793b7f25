"""A few megabytes of documents, read, filtered and tokenised on their own: one part of a corpus.

Any process may build any part, and what it writes depends on nothing else. A part is `part-000012.tokens`
(int32, all documents side by side), `.sketches` (MinHash, where near-duplicates are looked for) and, renamed
into place last, `.npz` with lengths, places, hashes and the count of what was left out. A preparation that
was interrupted goes on with the parts that have no `.npz` yet.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from strop import files
from strop.config import DataConfig, PrepareConfig
from strop.data import documents, near, noise, sources
from strop.data.documents import Document, Piece
from strop.data.encode import TextEncoder
from strop.data.ledger import EXAMPLES, BadRow, refuse_or_keep
from strop.data.sources import Source

BATCH_CHARS = 1_000_000
"""Characters that are encoded at a time."""
SPLITS = ("train", "validation", "test")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """What every worker knows."""

    sources: tuple[Source, ...]
    data: DataConfig
    prepare: PrepareConfig
    tokenizer: Any
    split: str | None
    """`data.split`, where it is for these documents."""
    work: Path
    """Where the parts are written."""
    parts: tuple[tuple[Piece, ...], ...]

    def file(self, number: int, kind: str) -> Path:
        return self.work / f"part-{number:06d}.{kind}"


@dataclass
class Index:
    """The documents of a part that are kept, so far."""

    lengths: list[int] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    """uint64 [documents, 2] of each batch."""
    dropped: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """source -> reason -> {"rows": n, "examples": [[line, message]], "wanted": as `BadRow.wanted`}."""

    def drop(self, source: int, line: int, reason: str, message: str, wanted: bool = False) -> None:
        new = {"rows": 0, "examples": [], "wanted": wanted}
        entry = self.dropped.setdefault(source, {}).setdefault(reason, new)
        entry["rows"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append([line, message])


def group(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """Neighbouring pieces until they have PIECE_BYTES: many small files make one part."""
    out: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        held.append(piece)
        num_bytes += piece.num_bytes
        if num_bytes >= documents.PIECE_BYTES:
            out.append(tuple(held))
            held, num_bytes = [], 0
    return tuple([*out, tuple(held)] if held else out)


def build_all(task: Task, workers: int, progress: Callable[[int, int], None]) -> None:
    """Build what is missing. The error of the first part that has one is raised, the others are kept."""
    todo = [number for number in range(len(task.parts)) if not task.file(number, "npz").exists()]
    done = len(task.parts) - len(todo)
    progress(done, len(task.parts))
    if workers == 1 or len(todo) < 2:
        _begin_work(task, None)
        for more, number in enumerate(todo, start=1):
            _build(number)
            progress(done + more, len(task.parts))
        return
    # fork: the tokenizer and its libraries are loaded already, and no thread of ours has been started
    with ProcessPoolExecutor(
        min(workers, len(todo)), get_context("fork"), _begin_work, (task, os.getpid())
    ) as pool:
        try:
            for more, _ in enumerate(pool.map(_build, todo), start=1):
                progress(done + more, len(task.parts))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: tuple[Task, TextEncoder, list[noise.Filter]]
"""Of this process."""


def _begin_work(task: Task, parent: int | None) -> None:
    global _worker
    if parent is not None:  # a killed parent must not leave workers behind that wait for it for ever
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _worker = task, TextEncoder(task.tokenizer), noise.build(task.prepare)


def _build(number: int) -> None:
    """Write one part."""
    task, encoder, filters = _worker
    index = Index()
    aside = {kind: task.file(number, f"{kind}.{uuid.uuid4().hex[:8]}") for kind in _kinds(task)}
    try:
        with ExitStack() as stack:
            out = {kind: stack.enter_context(open(path, "wb")) for kind, path in aside.items()}
            for batch in _batches(_kept(task, task.parts[number], filters, index)):
                encoded = encoder([document.text for _, document in batch])
                lengths = np.array([len(ids) for ids in encoded])
                tokens = np.concatenate(encoded)
                out["tokens"].write(tokens.data)
                if "sketches" in out:
                    out["sketches"].write(near.sketch(tokens, lengths).data)
                index.lengths += lengths.tolist()
                index.rows += [(source, document.line) for source, document in batch]
                index.hashes.append(hash_array([document.text for _, document in batch]))
            _save(out["npz"], index)
        for path in aside.values():
            files.fsync(path)
        for kind, path in aside.items():  # npz is the last
            os.replace(path, task.file(number, kind))
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def _kinds(task: Task) -> list[str]:
    return ["tokens", *(["sketches"] if task.prepare.near_duplicates is not None else []), "npz"]


def _save(file: Any, index: Index) -> None:
    np.savez(
        file,
        lengths=np.array(index.lengths, dtype=np.int64),
        rows=np.array(index.rows, dtype=np.int64).reshape(-1, 2),
        hashes=np.concatenate([np.zeros((0, 2), dtype=np.uint64), *index.hashes]),
        dropped=np.frombuffer(json.dumps(index.dropped).encode(), dtype=np.uint8),
    )


def _kept(
    task: Task, pieces: tuple[Piece, ...], filters: list[noise.Filter], index: Index
) -> Iterator[tuple[int, Document]]:
    """(source, document) of those that no filter takes; the others are counted, or end the preparation."""
    for piece in pieces:
        for item in documents.read(task.sources[piece.source], piece, task.prepare):
            if isinstance(item, BadRow):
                refuse_or_keep(item, task.data)
                index.drop(piece.source, item.line, item.reason, item.message, item.wanted)
                continue
            noisy = next((found for check in filters if (found := check(item.text))), None)
            if noisy is None:
                yield piece.source, item
            else:
                index.drop(piece.source, item.line, *noisy)


def _batches(kept: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    chars = 0
    for item in kept:
        batch.append(item)
        chars += len(item[1].text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def hash_array(texts: list[str]) -> np.ndarray:
    """uint64 [texts, 2]."""
    return np.frombuffer(b"".join(map(_hash, texts)), dtype=np.uint64).reshape(-1, 2)


def split_of(hashes: np.ndarray, split: str | None) -> np.ndarray:
    """Index into SPLITS of each document (uint64 [documents, 2] -> int64), by its content alone."""
    if split is None:
        return np.zeros(len(hashes), dtype=np.int64)
    train, validation, _ = sources.shares(split)
    return np.searchsorted([train, train + validation], hashes[:, 0] / 2.0**64, side="right")
