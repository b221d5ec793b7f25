"""The rows of a token store, or the documents behind blocks of text, a few million tokens at a time.

What is said of a whole set (lengths, ends, repeats) is counted over these: a block begins anywhere in a
document, so beginnings, ends and repeats are those of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from strop.data.blocks import Blocks
from strop.data.corpus import Corpus
from strop.data.sets import RowSet

CHUNK_TOKENS = 4_000_000


@dataclass(frozen=True)
class Chunk:
    first: int
    """Number of its first row."""
    tokens_T: np.ndarray
    trained_T: np.ndarray
    offsets_S1: np.ndarray
    """int64 [S + 1]: where its sequences begin."""

    @cached_property
    def prompts_S(self) -> np.ndarray:
        """int64 [S]: tokens before the first trained one."""
        begins, ends = self.offsets_S1[:-1], self.offsets_S1[1:]
        marks = np.append(np.flatnonzero(self.trained_T), len(self.trained_T))
        return np.minimum(marks[np.searchsorted(marks, begins)], ends) - begins


def num_units(rows: RowSet) -> int:
    """Rows, or documents."""
    return sum(p.end - p.begin for p in rows.parts) if isinstance(rows, Blocks) else rows.num_rows


def place_of(rows: RowSet, index: int) -> tuple[str, int]:
    """(source, line) of a row or document."""
    if not isinstance(rows, Blocks):
        return rows.row_id(index)
    corpus, document = _located(rows, index)
    return corpus.row_id(document)


def sequences(rows: RowSet, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(tokens int32 [T], trained bool [T])] of a row or document."""
    if not isinstance(rows, Blocks):
        return rows.sequences(index)
    corpus, document = _located(rows, index)
    tokens = corpus.document(document)
    return [(tokens, np.arange(len(tokens)) > 0)]


def _located(blocks: Blocks, index: int) -> tuple[Corpus, int]:
    """The document's corpus, and its number there."""
    for part in blocks.parts:
        if index < part.end - part.begin:
            return part.corpus, part.begin + index
        index -= part.end - part.begin
    raise IndexError(index)


def chunks(rows: RowSet) -> Iterator[Chunk]:
    """All of them, in order, without holding more than CHUNK_TOKENS tokens (or one row)."""
    if not isinstance(rows, Blocks):
        per_row = rows.seqs_per_row
        for a, b in _cuts(rows.offsets[::per_row]):
            offsets = rows.offsets[a * per_row : b * per_row + 1]
            tokens, trained = (np.asarray(x[offsets[0] : offsets[-1]]) for x in (rows.tokens, rows.trained))
            yield Chunk(a, tokens, trained, offsets - offsets[0])
        return
    before = 0
    for part in rows.parts:
        of_part = np.asarray(part.corpus.offsets[part.begin : part.end + 1])
        for a, b in _cuts(of_part):
            offsets = of_part[a : b + 1]
            tokens = part.corpus.tokens(int(offsets[0]), int(offsets[-1]))
            trained = np.ones(len(tokens), dtype=np.bool_)
            trained[offsets[:-1] - offsets[0]] = False  # a document's first token is never predicted
            yield Chunk(before + a, tokens, trained, offsets - offsets[0])
        before += part.end - part.begin


def _cuts(edges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most CHUNK_TOKENS tokens; a longer row is a range of its own."""
    begin, num = 0, len(edges) - 1
    while begin < num:
        end = int(np.searchsorted(edges, edges[begin] + CHUNK_TOKENS, side="right")) - 1
        end = min(max(end, begin + 1), num)
        yield begin, end
        begin = end
