"""Text to a corpus, once, by any number of processes: `tools.prepare`, or rank 0 of a run.

sources -> parts, built by workers (parts.py) -> equal and nearly equal documents found over all of them
(near.py) -> what is kept, sorted by set and entry, copied into the corpus -> ledger -> renamed. The corpus is
named by all that decides what is in it. Parts lie in `NAME.partial` until the corpus is there: an
interrupted preparation goes on, and two at once share them or end with one of two equal results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strop.config import Config
from strop.data import adapt, corpus, documents, near, noise, parts, sources
from strop.data.corpus import Corpus, Range, ShardWriter
from strop.data.ledger import EXAMPLES, Ledger, place
from strop.data.parts import SPLITS, Task
from strop.data.sources import Source
from strop.data.store import publish
from strop.errors import STORAGE_ERRNOS, StorageError, UserError

PIPELINE = 1
"""Raise it when the same text would be filtered or tokenised in another way than before."""
COPY_TOKENS = 4 * 2**20
"""Tokens that are copied at a time."""
STALE_S = 24 * 3600
"""A copy in the making in which no file has come or gone for so long is a dead process's."""

Progress = Callable[[int, int], None]


def prepare(
    config: Config,
    entries: dict[str, list[Source]],
    tokenizer: Any,
    tokenizer_digest: str,
    cache_dir: Path | str,
    split: str | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    label: str = "train",
) -> Corpus:
    """The corpus of `entries` (name -> its sources): found in the cache, else made.

    split: `data.split`, or None where all documents are of one set ("train" in the corpus). progress: parts
    built, of how many. label: what messages call the set. Raises UserError (key, file or line named) and
    StorageError; finished parts stay.
    """
    digest = _digest(config, entries, tokenizer_digest, split)
    path = Path(cache_dir) / f"text-{digest[:24]}"
    work = path.with_name(f"{path.name}.partial")
    try:
        if not corpus.is_corpus(path):
            task = _make(config, entries, tokenizer, work, split, workers, progress)
            _finish(config, entries, task, path, digest, tokenizer_digest, label)
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if corpus.is_corpus(path):  # another process was faster, and has removed the parts
            shutil.rmtree(work, ignore_errors=True)
            return Corpus.open(path)
        if error.errno in STORAGE_ERRNOS:
            text = f"{error.strerror} (data.cache_dir); what is done so far is kept in {work}"
            raise StorageError(error.errno, text, str(path)) from error
        raise
    return Corpus.open(path)


def _digest(
    config: Config, entries: dict[str, list[Source]], tokenizer_digest: str, split: str | None
) -> str:
    p = config.prepare
    record: dict[str, Any] = {
        "format": [corpus.FORMAT, PIPELINE, documents.PIECE_BYTES, documents.PIECE_ROWS],
        "entries": [[name, [[s.name, sources.digest(s)] for s in found]] for name, found in entries.items()],
        "split": split,
        "tokenizer": tokenizer_digest,
        "on_bad_row": config.data.on_bad_row,
        "prepare": vars(p),
        "near": near.version() if p.near_duplicates is not None else None,
    }
    uses = [source.adapter for own in entries.values() for source in own]
    if any(use is not None for use in uses):
        record["adapters"] = [adapt.identity(use) for use in uses]
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()


def _make(
    config: Config,
    entries: dict[str, list[Source]],
    tokenizer: Any,
    work: Path,
    split: str | None,
    workers: int,
    progress: Progress,
) -> Task:
    """Build all parts. UserError where there is nothing to build them of."""
    noise.build(config.prepare)  # a missing package is said before any work
    found = [source for own in entries.values() for source in own]
    pieces = [p for i, source in enumerate(found) for p in documents.pieces(i, source, config.prepare)]
    if not pieces:
        raise UserError(f"{', '.join(source.name for source in found)}: the data set is empty")
    task = Task(tuple(found), config.data, config.prepare, tokenizer, split, work, parts.group(pieces))
    work.mkdir(parents=True, exist_ok=True)
    _sweep(work)
    parts.build_all(task, workers, progress)
    return task


def _finish(
    config: Config,
    entries: dict[str, list[Source]],
    task: Task,
    path: Path,
    digest: str,
    tokenizer_digest: str,
    label: str,
) -> None:
    """The parts to a corpus at `path`, by way of a directory that does not outlive an error."""
    aside = task.work / f"corpus-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        _write(config, entries, task, aside, digest, tokenizer_digest, label)
        publish(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(work: Path) -> None:
    """Take away what killed processes left of their copies; a living one's may be among the younger ones."""
    for aside in work.glob("corpus-*"):
        with contextlib.suppress(FileNotFoundError):  # it was a living one's
            if time.time() - aside.stat().st_mtime > STALE_S:
                shutil.rmtree(aside, ignore_errors=True)


def _write(
    config: Config,
    entries: dict[str, list[Source]],
    task: Task,
    aside: Path,
    digest: str,
    tokenizer_digest: str,
    label: str,
) -> None:
    table = _read(task, entries)
    _drop_duplicates(table, task, aside)
    for name, ledger in _ledgers(table, entries, task, label).items():
        ledger.check(config.data.max_dropped_fraction, wanted=noise.REASONS)
        ledger.save(aside / f"ledger-{name}.json")
    order = _copy(table, task, aside)
    corpus.write_index(
        aside,
        lengths=table.lengths[order],
        rows=table.rows[order],
        sources=[source.name for source in task.sources],
        ranges=_ranges(table, order, list(entries)),
        digest=digest,
        tokenizer=tokenizer_digest,
    )


@dataclass(frozen=True)
class Dropped:
    """Documents of one source that were left out for one reason."""

    source: int
    reason: str
    rows: int
    tokens: int
    """Where they were counted."""
    examples: list[Any]
    """[[line, message]] of the first ones."""
    wanted: bool = False
    """As `BadRow.wanted`."""


@dataclass
class Table:
    """All documents of all parts, in the order of the input."""

    lengths: np.ndarray
    """int64 [D] tokens."""
    rows: np.ndarray
    """int64 [D, 2]: source, line."""
    hashes: np.ndarray
    """uint64 [D, 2]."""
    split: np.ndarray
    """int64 [D]: index into SPLITS."""
    entry: np.ndarray
    """int64 [D]: index into the entries."""
    part_ends: np.ndarray
    """int64 [parts]: documents up to the end of each."""
    gone: np.ndarray
    """bool [D]: left out as duplicates."""
    dropped: list[Dropped]


def _read(task: Task, entries: dict[str, list[Source]]) -> Table:
    columns: dict[str, list[np.ndarray]] = {"lengths": [], "rows": [], "hashes": []}
    dropped = []
    for number in range(len(task.parts)):
        with np.load(task.file(number, "npz")) as part:
            for name, held in columns.items():
                held.append(part[name])
            for source, reasons in json.loads(part["dropped"].tobytes()).items():
                dropped += [Dropped(int(source), reason, tokens=0, **d) for reason, d in reasons.items()]
    lengths, rows, hashes = (np.concatenate(columns[name]) for name in ("lengths", "rows", "hashes"))
    of_source = np.repeat(np.arange(len(entries)), [len(own) for own in entries.values()])
    return Table(
        lengths=lengths,
        rows=rows,
        hashes=hashes,
        split=parts.split_of(hashes, task.split),
        entry=of_source[rows[:, 0]],
        part_ends=np.cumsum([len(held) for held in columns["lengths"]]),
        gone=np.zeros(len(lengths), dtype=np.bool_),
        dropped=dropped,
    )


def _drop_duplicates(table: Table, task: Task, aside: Path) -> None:
    """Mark them in `table.gone` and note each with the document that it repeats."""
    names = [source.name for source in task.sources]

    def note(reason: str, what: str, first: np.ndarray) -> None:
        table.gone |= first >= 0
        rows = np.flatnonzero(first >= 0)
        sources, begins = np.unique(table.rows[rows, 0], return_index=True)  # they are in order
        for source, own in zip(sources.tolist(), np.split(rows, begins[1:])):
            examples = []
            for row in own[:EXAMPLES]:
                head, line = table.rows[first[row]].tolist()
                examples.append([int(table.rows[row, 1]), f"{what} {place(names[head], line)}"])
            tokens = int(table.lengths[own].sum())
            table.dropped.append(Dropped(source, reason, len(own), tokens, examples))

    if task.prepare.exact_duplicates:
        note("duplicate", "the same text as", near.equal_texts(table.hashes))
    threshold = task.prepare.near_duplicates
    if threshold is None:
        return
    sketches = aside / "sketches"
    bands = [aside / f"band-{i:03d}" for i in range(near.bands(threshold))]
    for number in range(len(task.parts)):
        content = np.fromfile(task.file(number, "sketches"), dtype=np.uint32).reshape(-1, near.NUM_HASHES)
        for path, values in zip([sketches, *bands], [content, *near.band_hashes(content, len(bands))]):
            with open(path, "ab") as file:
                file.write(np.ascontiguousarray(values).data)
    note("near_duplicate", "nearly the text of", near.near_duplicates(bands, sketches, table.gone, threshold))
    for path in (sketches, *bands):
        path.unlink()


def _ledgers(table: Table, entries: dict[str, list[Source]], task: Task, label: str) -> dict[str, Ledger]:
    """One for each set. What was left out belongs to no set, and stands in that of the training set."""
    present = [s for i, s in enumerate(SPLITS) if i == 0 or (table.split[~table.gone] == i).any()]
    ledgers = {name: Ledger(label if name == "train" else name) for name in present}
    for entry in entries:
        ledgers["train"].of(entry)  # in their order
    entry_of = [name for name, own in entries.items() for _ in own]
    for d in table.dropped:
        entry, name = entry_of[d.source], task.sources[d.source].name
        told = [(line, message if name == entry else f"{name}: {message}") for line, message in d.examples]
        ledgers["train"].drop_many(entry, d.reason, d.rows, d.tokens, told, d.wanted)
    for i, entry in enumerate(entries):
        here = ~table.gone & (table.entry == i)
        for name, ledger in ledgers.items():
            own = here & (table.split == SPLITS.index(name))
            row = ledger.of(entry)
            row.used, row.tokens = int(own.sum()), int(table.lengths[own].sum())
            row.trained_tokens = row.tokens - row.used
            row.longest = int(table.lengths[own].max(initial=0))
            row.other_split = int(here.sum()) - row.used
    return ledgers


def _copy(table: Table, task: Task, aside: Path) -> np.ndarray:
    """Write the tokens of the documents that stay, by set and entry; their numbers in that order.

    Parts are in the order of the entries, so one pass over them for each set is enough.
    """
    writer = ShardWriter(aside)
    order = []
    for split in np.unique(table.split[~table.gone]):
        for number in range(len(task.parts)):
            begin = table.part_ends[number - 1] if number else 0
            rows = np.arange(begin, table.part_ends[number])
            keep = ~table.gone[rows] & (table.split[rows] == split)
            if keep.any():
                for tokens in _selected(task.file(number, "tokens"), table.lengths[rows], keep):
                    writer.write(tokens)
                order.append(rows[keep])
    writer.close()
    if not order:
        raise UserError("no document is left: all were dropped")
    return np.concatenate(order)


def _selected(path: Path, lengths: np.ndarray, keep: np.ndarray) -> Iterator[np.ndarray]:
    """int32 tokens of the documents that are kept, about COPY_TOKENS at a time."""
    ends = np.cumsum(lengths)
    with open(path, "rb") as file:
        first = 0
        while first < len(lengths):
            before = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, before + COPY_TOKENS, side="right")), first + 1)
            tokens = np.fromfile(file, dtype=np.int32, count=int(ends[last - 1] - before))
            yield tokens[np.repeat(keep[first:last], lengths[first:last])]
            first = last


def _ranges(table: Table, order: np.ndarray, entries: list[str]) -> list[Range]:
    """Where in the corpus each set of each entry lies."""
    out = []
    keys = table.split[order] * len(entries) + table.entry[order]
    for key in np.unique(keys).tolist():
        begin, end = np.searchsorted(keys, [key, key + 1]).tolist()
        out.append(Range(SPLITS[key // len(entries)], entries[key % len(entries)], begin, end))
    return out
