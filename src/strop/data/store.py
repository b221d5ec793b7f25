"""Tokenised rows on disk: flat arrays that every rank maps, written once and by rename.

A store is a directory. All tokens of all sequences lie one after another in `tokens.bin`, the training
mask beside them in `trained.bin`; `offsets.npy` says where each sequence begins. A row is `seqs_per_row`
neighbouring sequences (a preference row: chosen, then rejected). `rows.npy` tells from which line of
which source a row came, so that an error or a dump can name it, `values.npy` what number it brings along for
its loss. `store.json` is written last, with a seal of the others (see `intact`). The
directory's name is its digest: whoever finds it finds it whole, and two processes that write the same
one at the same time leave one of the two equal results.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from strop import files
from strop.data import intact
from strop.errors import UserError

FORMAT = 3
"""Version of the files; also part of every digest, so that older stores are simply not found."""

CHUNK_ROWS = 4096
"""Rows whose prompts are compared at a time."""

SEQS_PER_ROW = {"preference": 2, "sft": 1, "unpaired": 1}

WORTH_SHARING = 0.95
"""Prompts are shared where that leaves at most this part of the tokens."""


@dataclass(frozen=True)
class TokenisedRow:
    source: str
    """Name of the file or hub set that the row came from."""
    line: int
    """Its line there, from 1 (for formats without lines: its number)."""
    sequences: list[tuple[np.ndarray, np.ndarray]]
    """[(tokens int32 [T], trained bool [T])], `seqs_per_row` of them."""
    merged_boundary: bool = False
    """A token spans the end of the prompt."""
    value: float = math.nan
    """A number that the row brings along for its loss, such as a margin; NaN where it has none."""
    num_cut: int = 0
    """Tokens of it that `data.over_length` took away."""
    half: bool = False
    """One of the two that a pair was taken apart into."""


@dataclass(frozen=True)
class TokenStore:
    """A store opened for reading. Arrays are memory maps: opening costs nothing, ranks share pages."""

    path: Path
    kind: str
    """preference, sft or unpaired."""
    seqs_per_row: int
    """2 (chosen, rejected) or 1."""
    tokens: np.ndarray
    """int32 [total]."""
    trained: np.ndarray
    """bool [total]: tokens that are predicted and trained; never the first token of a sequence."""
    offsets: np.ndarray
    """int64 [num_seqs + 1]."""
    digest: str
    """Content address: what the sources hold, tokenizer, template, settings, format version."""
    num_rows: int
    row_lengths: np.ndarray
    """int64 [num_rows]: tokens of all sequences of the row."""
    row_sources: np.ndarray
    """int64 [num_rows, 2]: index into `sources`, line."""
    sources: tuple[str, ...]
    values_R: np.ndarray
    """fp32 [num_rows]: `TokenisedRow.value`."""
    mapped: tuple[intact.Mapped, ...]
    """The files behind tokens and trained."""
    shared_R: np.ndarray | None = None
    """int64 [num_rows]: leading tokens that the second sequence of a row does not repeat (see
    `sharing_prompts`); row_lengths and spans are without them."""

    def check_unwritten(self) -> None:
        """UserError if a file was written to while it is mapped here."""
        for file in self.mapped:
            file.check()

    def sharing_prompts(self) -> TokenStore:
        """The same store with the prompt of each pair once. Only untrained tokens are shared, so the sums
        over trained ones stay what they were. Nothing is shared where there is one sequence a row."""
        shared_R = np.zeros(self.num_rows, dtype=np.int64)
        if self.seqs_per_row == 2:
            for begin in range(0, self.num_rows, CHUNK_ROWS):
                rows = slice(begin, min(begin + CHUNK_ROWS, self.num_rows))
                shared_R[rows] = self._common_prompts(rows)
        return dataclasses.replace(self, shared_R=shared_R, row_lengths=self.row_lengths - shared_R)

    def _common_prompts(self, rows: slice) -> np.ndarray:
        """int64 [rows]: with how many untrained tokens both sequences begin; each keeps one of its own."""
        edges = self.offsets[2 * rows.start : 2 * rows.stop + 1]
        begins = edges[:-1]
        most = np.minimum(self.prompt_lengths(rows), np.diff(edges) - 1).reshape(-1, 2).min(axis=1)
        # Both prompts token by token, those of all rows one after another.
        ends = np.cumsum(most)
        at = np.arange(ends[-1]) - np.repeat(ends - most, most)
        chosen, rejected = (self.tokens[np.repeat(b, most) + at] for b in (begins[::2], begins[1::2]))
        first_other = _next(np.flatnonzero(chosen != rejected), ends - most)
        return np.minimum(first_other - (ends - most), most)

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(tokens int32 [T], trained bool [T])] of one row, without copying."""
        return [(self.tokens[a:b], self.trained[a:b]) for a, b in self.spans(row)]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """[(begin, end)] of the row's sequences in the flat arrays."""
        first = int(row) * self.seqs_per_row
        edges = self.offsets[first : first + self.seqs_per_row + 1].tolist()
        begins = [edge + p for edge, p in zip(edges, self.first_positions(row))]
        return list(zip(begins, edges[1:]))

    def first_positions(self, row: int) -> list[int]:
        """Where each sequence's span begins within the sequence: behind a shared prompt, else at 0."""
        return [0] * self.seqs_per_row if self.shared_R is None else [0, int(self.shared_R[row])]

    @cached_property
    def part_rows(self) -> tuple[int, ...]:
        """Rows of each source; they lie one source after another."""
        return tuple(np.bincount(self.row_sources[:, 0], minlength=len(self.sources)).tolist())

    def prompt_lengths(self, rows: slice) -> np.ndarray:
        """int64 [sequences of the rows]: tokens before the first trained one."""
        n = self.seqs_per_row
        edges = self.offsets[n * rows.start : n * rows.stop + 1]
        trained = np.flatnonzero(self.trained[edges[0] : edges[-1]]) + edges[0]
        return _next(trained, edges[:-1]) - edges[:-1]

    def row_id(self, row: int) -> tuple[str, int]:
        """(source, line) of a row, for messages and dumps."""
        source, line = self.row_sources[row].tolist()
        return self.sources[source], line

    @classmethod
    def open(cls, path: Path | str) -> TokenStore:
        path = Path(path)
        if not (path / "store.json").exists():
            raise UserError(f"{path} is not a token store: it has no store.json")
        meta = intact.record(path / "store.json")
        if meta["kind"] not in SEQS_PER_ROW:
            raise UserError(f"{path} holds documents of text, for continued pretraining (cpt) only")
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path} has store format {meta['format']}, this version reads {FORMAT}: prepare it again"
            )
        seqs_per_row = SEQS_PER_ROW[meta["kind"]]
        offsets = intact.array(path / "offsets.npy")
        total, num_rows = int(offsets[-1]), (len(offsets) - 1) // seqs_per_row
        return cls(
            path=path,
            kind=meta["kind"],
            seqs_per_row=seqs_per_row,
            tokens=intact.flat(path / "tokens.bin", np.int32, total),
            trained=intact.flat(path / "trained.bin", np.bool_, total),
            offsets=offsets,
            digest=meta["digest"],
            num_rows=num_rows,
            row_lengths=np.diff(offsets[::seqs_per_row]),
            row_sources=intact.array(path / "rows.npy", num_rows),
            sources=tuple(meta["sources"]),
            values_R=intact.array(path / "values.npy", num_rows),
            mapped=tuple(intact.Mapped.now(path / name) for name in ("tokens.bin", "trained.bin")),
        )

    @classmethod
    def write(
        cls,
        path: Path | str,
        rows: Iterator[TokenisedRow],
        *,
        kind: str,
        digest: str,
        finish: Callable[[Path], None] = lambda directory: None,
    ) -> TokenStore:
        """Write all rows into a directory beside `path`, then rename it to `path`, and open it.

        `finish` is called with that directory after the last row: it may add files (the ledger), or raise,
        and then nothing is left. Memory: offsets, row numbers and values (28 to 36 bytes a row), no tokens.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # not tempfile's: that one would be readable by its owner alone, and a group may share its runs
        aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        aside.mkdir()
        try:
            with open(aside / "tokens.bin", "wb") as tokens, open(aside / "trained.bin", "wb") as trained:
                offsets, row_sources, values, sources = _stream(rows, tokens, trained, SEQS_PER_ROW[kind])
            assert len(offsets) > 1, "a store without rows: an empty data set is refused before this"
            np.save(aside / "offsets.npy", offsets)
            np.save(aside / "rows.npy", row_sources)
            np.save(aside / "values.npy", values)
            finish(aside)
            meta = {"format": FORMAT, "kind": kind, "digest": digest, "sources": sources}
            meta["files"] = intact.seal(aside)
            (aside / "store.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            publish(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls.open(path)


def _next(marks: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The first of the sorted `marks` at or after each of `begins`; where none is, beyond all that is."""
    return np.append(marks, np.iinfo(np.int64).max)[np.searchsorted(marks, begins)]


def _stream(
    rows: Iterator[TokenisedRow], tokens: BinaryIO, trained: BinaryIO, seqs_per_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Append every row to the two files; returns offsets [S + 1], row sources [R, 2], values [R] and source
    names."""
    offsets = array("q", [0])
    row_sources = array("q")
    values = array("f")
    sources: dict[str, int] = {}
    for row in rows:
        assert len(row.sequences) == seqs_per_row
        for ids, mask in row.sequences:
            assert len(ids) == len(mask) > 0, (row.source, row.line)
            assert not mask[0], (row.source, row.line)
            tokens.write(np.ascontiguousarray(ids, dtype=np.int32).data)
            trained.write(np.ascontiguousarray(mask, dtype=np.bool_).data)
            offsets.append(offsets[-1] + len(ids))
        values.append(row.value)
        row_sources.extend((sources.setdefault(row.source, len(sources)), row.line))
    return (
        np.frombuffer(offsets, dtype=np.int64),
        np.frombuffer(row_sources, dtype=np.int64).reshape(-1, 2),
        np.frombuffer(values, dtype=np.float32),
        list(sources),
    )


def publish(aside: Path, path: Path) -> None:
    """Files to disk, then the rename that makes the store exist. A twin that came first is kept. UserError
    where something stands in the way that is no whole store."""
    files.fsync_tree(aside)
    try:
        os.rename(aside, path)
    except OSError as error:
        if not (path / "store.json").exists():  # anything but "another process wrote it meanwhile"
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise intact.damaged(path / "store.json", "missing") from None
            raise
    files.fsync(path.parent)
