"""Documents as tokens on disk: what continued pretraining reads, mapped and never loaded.

A corpus is a directory. The tokens of all documents lie one after another in `tokens-00000.bin`,
`tokens-00001.bin`, ... of a fixed size each (a document may go on in the next); `offsets.npy` says where each
document begins in their sum, `rows.npy` from which line of which source it came. Documents are sorted by the
set that `data.split` gives them to (train, validation, test), in it by the entry of `data.train` that they
came from, in that by their place there; `store.json` tells the ranges, and seals the other files (see
`intact`). It is written last, into a directory that is then renamed to its final name, which is its digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from strop.data import intact
from strop.errors import UserError

FORMAT = 2
"""Version of the files; also part of every digest."""
SHARD_TOKENS = 64 * 2**20
"""Tokens in a file: 256 MiB."""
KIND = "text"


@dataclass(frozen=True)
class Range:
    """The documents of one set and one entry: [begin, end)."""

    split: str
    entry: str
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Opened for reading: a few small arrays and memory maps."""

    path: Path
    digest: str
    tokenizer: str
    """Digest of the tokenizer that made it."""
    shards: tuple[np.ndarray, ...]
    """int32 [shard_tokens] each, the last one shorter."""
    shard_tokens: int
    offsets: np.ndarray
    """int64 [documents + 1]."""
    rows: np.ndarray
    """int64 [documents, 2]: index into `sources`, line."""
    sources: tuple[str, ...]
    ranges: tuple[Range, ...]
    mapped: tuple[intact.Mapped, ...] = ()
    """The files behind shards, offsets and rows."""

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """int32 [end - begin] of the tokens of all documents side by side; a copy where files meet."""
        first, last = begin // self.shard_tokens, (end - 1) // self.shard_tokens
        pieces = []
        for i in range(first, last + 1):
            at = i * self.shard_tokens
            pieces.append(self.shards[i][max(begin - at, 0) : end - at])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document(self, index: int) -> np.ndarray:
        """int32 [T]."""
        begin, end = self.offsets[index : index + 2].tolist()
        return self.tokens(begin, end)

    def row_id(self, index: int) -> tuple[str, int]:
        """(source, line) of a document."""
        source, line = self.rows[index].tolist()
        return self.sources[source], line

    @classmethod
    def open(cls, path: Path | str) -> Corpus:
        path = Path(path)
        if not is_corpus(path):
            raise UserError(f"{path} is not a token store: it has no store.json")
        meta = intact.record(path / "store.json")
        if meta["kind"] != KIND:
            raise UserError(f"{path} is a token store of {meta['kind']} rows, not of text documents")
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path} has store format {meta['format']}, this version reads {FORMAT}: prepare it again"
            )
        offsets = intact.array(path / "offsets.npy", mmap_mode="r")
        size, total = int(meta["shard_tokens"]), int(offsets[-1])
        shards = [
            intact.flat(path / shard_name(i), np.int32, min(size, total - begin))
            for i, begin in enumerate(range(0, total, size))
        ]
        return cls(
            path=path,
            digest=meta["digest"],
            tokenizer=meta["tokenizer"],
            shards=tuple(shards),
            shard_tokens=size,
            offsets=offsets,
            rows=intact.array(path / "rows.npy", len(offsets) - 1, "r"),
            sources=tuple(meta["sources"]),
            ranges=tuple(Range(*r) for r in meta["ranges"]),
            mapped=tuple(intact.Mapped.now(path / name) for name in meta["files"]),
        )


def is_corpus(path: Path) -> bool:
    """Whether a directory is a token store (of any kind): what `tools.prepare` leaves."""
    return (path / "store.json").is_file()


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


class ShardWriter:
    """Tokens appended to files of SHARD_TOKENS each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.total = 0
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        """int32 [T]."""
        while len(tokens):
            room = SHARD_TOKENS - self.total % SHARD_TOKENS
            if room == SHARD_TOKENS:
                self.close()
                path = self.directory / shard_name(self.total // SHARD_TOKENS)
                self._file = open(path, "wb")  # noqa: SIM115
            assert self._file is not None
            self._file.write(np.ascontiguousarray(tokens[:room]).data)
            self.total += min(room, len(tokens))
            tokens = tokens[room:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def write_index(
    directory: Path,
    *,
    lengths: np.ndarray,
    rows: np.ndarray,
    sources: Iterable[str],
    ranges: Iterable[Range],
    digest: str,
    tokenizer: str,
) -> None:
    """Everything beside the tokens; store.json last. lengths int64 [documents], rows int64 [documents, 2]."""
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(directory / "rows.npy", rows.astype(np.int64))
    meta = {
        "format": FORMAT,
        "kind": KIND,
        "digest": digest,
        "tokenizer": tokenizer,
        "shard_tokens": SHARD_TOKENS,
        "sources": list(sources),
        "ranges": [[r.split, r.entry, r.begin, r.end] for r in ranges],
        "files": intact.seal(directory),
    }
    (directory / "store.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
