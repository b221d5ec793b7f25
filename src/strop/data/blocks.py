"""Blocks of a fixed number of tokens, cut out of corpora: the rows of continued pretraining.

The documents of a range lie side by side; block b predicts the tokens [b S, (b+1) S) of them, S being one
less than a block's length, and has the token before the first of them as context if both are of one document.
So whatever the cut, every token of a document but its first is predicted exactly once in a pass, from as much
of its document as the block holds. A block is read as the pieces of documents in it, one sequence each, or,
with `cross_documents`, as one sequence.

Several ranges (the entries of a blend) are blocks with running numbers; what is in a block follows from its
number alone, and nothing is held in memory but a few numbers a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from strop.data.corpus import Corpus


@dataclass(frozen=True)
class Part:
    """Documents [begin, end) of a corpus."""

    corpus: Corpus
    begin: int
    end: int

    @property
    def first_token(self) -> int:
        return int(self.corpus.offsets[self.begin])

    @property
    def num_tokens(self) -> int:
        return int(self.corpus.offsets[self.end]) - self.first_token


@dataclass(frozen=True)
class Blocks:
    """Reads like a token store of one sequence or more a row."""

    parts: tuple[Part, ...]
    length: int
    """Tokens of a block, at most."""
    cross_documents: bool

    seqs_per_row = 1

    @classmethod
    def open(
        cls, ranges: Sequence[tuple[str | Path, int, int]], length: int, cross_documents: bool
    ) -> Blocks:
        """ranges: [(directory of a corpus, first document, behind the last)]."""
        corpora = {path: Corpus.open(path) for path in dict.fromkeys(path for path, _, _ in ranges)}
        return cls(tuple(Part(corpora[path], a, b) for path, a, b in ranges), length, cross_documents)

    @cached_property
    def part_rows(self) -> tuple[int, ...]:
        """Blocks of each part."""
        return tuple(-(-part.num_tokens // (self.length - 1)) for part in self.parts)

    @property
    def num_rows(self) -> int:
        return sum(self.part_rows)

    @property
    def digest(self) -> str:
        what = [(part.corpus.digest, part.begin, part.end) for part in self.parts]
        text = repr((what, self.length, self.cross_documents))
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def check_unwritten(self) -> None:
        """As `TokenStore.check_unwritten`."""
        for file in dict.fromkeys(file for part in self.parts for file in part.corpus.mapped):
            file.check()

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """int64 [num_rows]: tokens of each block, its context included."""
        lengths = []
        for part, num in zip(self.parts, self.part_rows):
            starts = part.first_token + np.arange(num, dtype=np.int64) * (self.length - 1)
            ends = np.minimum(starts + self.length - 1, part.first_token + part.num_tokens)
            lengths.append(ends - starts + self._has_context(part, starts))
        return np.concatenate(lengths)

    def _has_context(self, part: Part, starts: np.ndarray) -> np.ndarray:
        """bool: whether the token before `starts` belongs to the same sequence."""
        if self.cross_documents:
            return starts > part.first_token
        offsets = part.corpus.offsets
        at = np.searchsorted(offsets, starts)
        return np.asarray(offsets[np.minimum(at, len(offsets) - 1)]) != starts

    def _bounds(self, row: int) -> tuple[Part, int, int]:
        """(part, first token, behind the last) of a block, in its corpus."""
        part, index = self._locate(row)
        start = part.first_token + index * (self.length - 1)
        end = min(start + self.length - 1, part.first_token + part.num_tokens)
        context = bool(self._has_context(part, np.array([start]))[0])
        return part, start - context, end

    def _locate(self, row: int) -> tuple[Part, int]:
        index = int(row)
        for part, num in zip(self.parts, self.part_rows):
            if index < num:
                return part, index
            index -= num
        raise IndexError(row)

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(tokens int32 [T], trained bool [T])] of a block; the first token of each is never trained."""
        part, begin, end = self._bounds(row)
        tokens = part.corpus.tokens(begin, end)
        edges = [0, end - begin]
        if not self.cross_documents:
            offsets = part.corpus.offsets
            first, last = np.searchsorted(offsets, [begin, end], side="left").tolist()
            edges = sorted({0, end - begin, *(offsets[first:last] - begin).tolist()})
        return [(tokens[a:b], np.arange(b - a) > 0) for a, b in zip(edges[:-1], edges[1:])]

    def row_id(self, row: int) -> tuple[str, int]:
        """(source, line) of the document that a block begins in."""
        part, begin, _ = self._bounds(row)
        document = int(np.searchsorted(part.corpus.offsets, begin, side="right")) - 1
        return part.corpus.row_id(document)

    def documents(self, row: int) -> list[tuple[str, int, int, bool]]:
        """[(source, line, its tokens in the block, whether it began before)] of the documents in a block."""
        part, begin, end = self._bounds(row)
        offsets = part.corpus.offsets
        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left"))
        edges = np.clip(offsets[first : last + 1], begin, end).tolist()
        return [
            (*part.corpus.row_id(first + i), b - a, int(offsets[first + i]) < begin)
            for i, (a, b) in enumerate(zip(edges, edges[1:]))
        ]
