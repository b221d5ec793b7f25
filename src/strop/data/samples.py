"""A few rows of a set as the model will see them: which ones, and their tokens as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from strop.config import Config
from strop.data import prepare, sources
from strop.data.blocks import Blocks
from strop.data.ledger import BadRow, Ledger, place
from strop.data.sets import RowSet
from strop.data.spans import Span, spans
from strop.data.tokenise import Tokeniser
from strop.errors import UserError


@dataclass(frozen=True)
class Part:
    """A prompt, an answer, or the piece of a document that is in a block."""

    title: str
    tokens: int
    trained: int
    spans: list[Span]


@dataclass(frozen=True)
class Sample:
    row: int
    """Number in the set, from 1."""
    place: str
    tokens: int
    trained: int
    value: float | None
    """The number that the row brings along for its loss, if it does."""
    parts: list[Part]


def spread(num_rows: int, n: int, seed: int | None) -> list[int]:
    """n rows from 0, evenly from the first to the last; with a seed drawn at random. In order."""
    n = min(n, num_rows)
    if seed is not None:
        return sorted(np.random.default_rng(seed).choice(num_rows, n, replace=False).tolist())
    return np.unique(np.linspace(0, num_rows - 1, n).astype(int)).tolist()


def longest(rows: RowSet, n: int) -> list[int]:
    """The n rows of most tokens, the longest first."""
    return np.argsort(-rows.row_lengths, kind="stable")[:n].tolist()


def by_name(rows: RowSet, name: str, what: str) -> list[int]:
    """The row of "N" (from 1) or those of "SOURCE:LINE" (the end of a source's path will do; a line can give
    several rows); none if the set has no such line. Text: the block in which the document begins."""
    if name.isdigit():
        if not 1 <= int(name) <= rows.num_rows:
            raise UserError(f"--row {name}: the {what} set has the rows 1 to {rows.num_rows:,}")
        return [int(name) - 1]
    asked, line = split_name(name)
    lines: list[tuple[int, str, int]] = []
    if isinstance(rows, Blocks):
        begin, all_sources = 0, [own for part in rows.parts for own in part.corpus.sources]
        for part, num in zip(rows.parts, rows.part_rows):
            own = part.corpus.rows[part.begin : part.end]
            for d in np.flatnonzero(own[:, 1] == line).tolist():
                at = int(part.corpus.offsets[part.begin + d]) - part.first_token
                lines.append((begin + at // (rows.length - 1), *part.corpus.row_id(part.begin + d)))
            begin += num
    else:
        all_sources = list(rows.sources)
        lines = [(r, *rows.row_id(r)) for r in np.flatnonzero(rows.row_sources[:, 1] == line).tolist()]
    source = _the_source(asked, all_sources)
    return [row for row, own, _ in lines if own == source]


def _the_source(asked: str, names: Iterable[str]) -> str | None:
    """The name that is `asked`, else the only one whose path ends so. UserError where several do."""
    found = [name for name in dict.fromkeys(names) if name == asked or name.endswith("/" + asked)]
    if len(found) > 1 and asked not in found:
        raise UserError(f"--row {asked}: {' and '.join(found[:3])} end so: name more of one")
    return asked if asked in found else next(iter(found), None)


def split_name(name: str) -> tuple[str, int]:
    source, colon, line = name.rpartition(":")
    if not colon or not source or not line.isdigit():
        raise UserError(f"--row {name}: expected a row's number, or SOURCE:LINE such as training.jsonl:17")
    return source, int(line)


def why_not(config: Config, kind: str, tokenizer: Any, split: str, name: str) -> str:
    """Why a line of a source is not in the set; for rows, which can be rendered anew."""
    asked, line = split_name(name)
    source = _the_source(asked, (own.name for own in sources.find(config.data, split, kind)))
    found = (
        row
        for row in prepare.rendered(config, tokenizer, kind, split, Ledger(split))
        if row.line == line and row.source == source
    )
    tokeniser = Tokeniser(tokenizer, config.data.max_length, config.data.over_length)
    for row in tokeniser(itertools.islice(found, 1)):
        if isinstance(row, BadRow):
            return f"{place(row.source, row.line)} is not used: {row.reason}: {row.message}"
    return f"the {split} set has no line {line} of {asked}"


def sample(rows: RowSet, row: int, tokenizer: Any) -> Sample:
    """One row of a store, or one block of text."""
    value = float("nan") if isinstance(rows, Blocks) else float(rows.values_R[row])
    sequences = rows.sequences(row)
    if isinstance(rows, Blocks):
        parts = _documents(rows, row, tokenizer)
    elif rows.seqs_per_row == 2:
        parts = _pair(sequences, tokenizer)
    else:
        parts = [_part("", *sequences[0], tokenizer)]
    tokens, trained = sum(len(ids) for ids, _ in sequences), sum(int(mask.sum()) for _, mask in sequences)
    where = place(*rows.row_id(row))
    return Sample(row + 1, where, tokens, trained, None if np.isnan(value) else value, parts)


def _part(title: str, tokens: np.ndarray, trained: np.ndarray, tokenizer: Any, begin: int = 0) -> Part:
    """A sequence from `begin` on; the tokens before help to decode it."""
    shown = spans(tokens, trained, tokenizer, begin)
    return Part(title, len(tokens) - begin, int(trained[begin:].sum()), shown)


def _pair(sequences: list[tuple[np.ndarray, np.ndarray]], tokenizer: Any) -> list[Part]:
    """The prompt that both share once, then what each goes on with."""
    shared = _shared_prompt(sequences)
    titles = ("chosen", "rejected")
    (tokens, trained), _ = sequences
    prompt = [_part("prompt", tokens[:shared], trained[:shared], tokenizer)] if shared else []
    return [*prompt, *(_part(title, *s, tokenizer, shared) for title, s in zip(titles, sequences))]


def _shared_prompt(sequences: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Untrained tokens with which both begin."""
    (a, trained_a), (b, trained_b) = sequences
    most = min(len(a), len(b))
    differs = (a[:most] != b[:most]) | trained_a[:most] | trained_b[:most]
    return int(differs.argmax()) if differs.any() else most


def _documents(rows: Blocks, row: int, tokenizer: Any) -> list[Part]:
    """One part for each document in a block, whether attention crosses from one to the next or not."""
    tokens = np.concatenate([ids for ids, _ in rows.sequences(row)])
    trained = np.concatenate([mask for _, mask in rows.sequences(row)])
    parts, begin = [], 0
    for source, line, num, continued in rows.documents(row):
        title = place(source, line) + (" (goes on)" if continued else "")
        parts.append(_part(title, tokens[begin : begin + num], trained[begin : begin + num], tokenizer))
        begin += num
    return parts
