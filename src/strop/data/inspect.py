"""What a prepared set is like: lengths, beginnings and ends, repeats. The numbers behind tools.look_at_data.

The set is the trainer's own (a token store, or blocks of text), read once from beginning to end; 16 bytes a
row and 12 a sequence are kept of it. Nothing is judged here: see `concerns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strop.config import Config, TrainConfig
from strop.data import ends, plan, repeats, spans, units
from strop.data.blocks import Blocks
from strop.data.ledger import Ledger
from strop.data.repeats import Contents
from strop.data.sets import RowSet
from strop.data.store import WORTH_SHARING, TokenStore
from strop.data.units import Chunk

EXAMPLES = 3
COMMON = 512
"""So many tokens at most of a beginning that all sequences share."""
PACKED_STEPS = 20
"""Optimiser steps whose micro batches are packed to see how full they are."""
_BLANK = re.compile(r"(?:[ĠĊĉč▁\s]|<0x(?:20|0A|09|0D)>)*")


@dataclass
class Found:
    """Rows (documents) with a property."""

    count: int = 0
    examples: list[int] = field(default_factory=list)

    def add(self, rows: np.ndarray) -> None:
        self.count += len(rows)
        self.examples += rows[: EXAMPLES - len(self.examples)].tolist()


@dataclass
class Look:
    """One set. S sequences, R rows of `seqs_per_row` sequences (documents: one)."""

    name: str
    ledger: Ledger
    rows: RowSet
    seqs_per_row: int
    lengths_S: np.ndarray
    """int32: tokens."""
    prompts_S: np.ndarray
    """int32: tokens before the first trained one."""
    trained_S: np.ndarray
    """int32: trained tokens."""
    contents: Contents
    found: dict[str, Found]
    """double_bos, no_bos, no_end, double_end, special_inside, unknown, empty_completion."""
    ends: dict[int, int]
    """Special token that ends a sequence, trained -> sequences."""
    common: list[int]
    """Tokens that every sequence begins with, if there is more than one."""

    @property
    def num_rows(self) -> int:
        """Rows, or documents."""
        return len(self.contents.whole_R)

    @property
    def is_text(self) -> bool:
        return isinstance(self.rows, Blocks)

    def place(self, row: int) -> tuple[str, int]:
        return units.place_of(self.rows, row)


class Inspector:
    """Adds up one set, chunk by chunk."""

    def __init__(self, tokenizer: Any, seqs_per_row: int) -> None:
        self.tokenizer = tokenizer
        self.per_row = seqs_per_row
        self.special_V = spans.special_mask(tokenizer)
        self.silent_V = self.special_V | _blank_mask(tokenizer, len(self.special_V))
        ordinary = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}
        self.unknown = None if tokenizer.unk_token_id in ordinary else tokenizer.unk_token_id
        names = ("double_bos", "no_bos", "no_end", "double_end", "special_inside", "unknown")
        self.found = {name: Found() for name in (*names, "empty_completion")}
        self.ends: dict[int, int] = {}
        self.common: list[int] | None = None
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.hashes: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, chunk: Chunk) -> None:
        offsets = chunk.offsets_S1
        begins, stops = offsets[:-1], offsets[1:]
        tokens, trained = chunk.tokens_T, chunk.trained_T
        sums = _sum_each(trained, begins)
        self.columns.append(
            tuple(column.astype(np.int32) for column in (np.diff(offsets), chunk.prompts_S, sums))
        )
        self.hashes.append(repeats.hashes(chunk, self.per_row))
        self._look_at_ends(chunk)
        special = self.special_V[tokens]
        inner = special.copy()
        inner[begins] = False
        for back in range(1, ends.ENDING + 1):
            inner[np.maximum(stops - back, begins)] = False
        self._note("special_inside", chunk, _sum_each(inner, begins) > 0)
        if self.unknown is not None:
            self._note("unknown", chunk, _sum_each(tokens == self.unknown, begins) > 0)
        self._note("empty_completion", chunk, self._without_text(chunk))
        self._share_beginning(chunk)

    def _note(self, name: str, chunk: Chunk, which_S: np.ndarray) -> None:
        rows = which_S.reshape(-1, self.per_row).any(axis=1)
        self.found[name].add(np.flatnonzero(rows) + chunk.first)

    def _look_at_ends(self, chunk: Chunk) -> None:
        seen = ends.look(
            chunk.tokens_T, chunk.trained_T, chunk.offsets_S1, self.special_V, self.tokenizer.bos_token_id
        )
        self._note("double_bos", chunk, seen.double_bos_S)
        self._note("no_bos", chunk, ~seen.has_bos_S)
        self._note("no_end", chunk, seen.last_S == ends.NONE)
        self._note("double_end", chunk, seen.double_end_S)
        for token, count in zip(*np.unique(seen.last_S, return_counts=True)):
            if token != ends.NONE:
                self.ends[int(token)] = self.ends.get(int(token), 0) + int(count)

    def _without_text(self, chunk: Chunk) -> np.ndarray:
        """bool [S]: all trained tokens are blanks, line breaks or special. The tokens' spelling finds the
        candidates, their text decides."""
        begins = chunk.offsets_S1[:-1]
        speaks = chunk.trained_T & ~self.silent_V[chunk.tokens_T]
        candidates = _sum_each(speaks, begins) == 0
        for s in np.flatnonzero(candidates).tolist():
            a, b = chunk.offsets_S1[s : s + 2].tolist()
            own = chunk.tokens_T[a:b][chunk.trained_T[a:b]]
            candidates[s] = not self.tokenizer.decode(own[~self.special_V[own]].tolist()).strip()
        return candidates

    def _share_beginning(self, chunk: Chunk) -> None:
        begins, stops = chunk.offsets_S1[:-1], chunk.offsets_S1[1:]
        if self.common is None:
            self.common = chunk.tokens_T[: min(int(stops[0]), COMMON)].tolist()
        for i, token in enumerate(self.common):
            at = begins + i
            if (at >= stops).any() or (chunk.tokens_T[at] != token).any():
                self.common = self.common[:i]
                break

    def look(self, name: str, rows: RowSet, ledger: Ledger) -> Look:
        lengths, prompts, trained = (np.concatenate(column) for column in zip(*self.columns))
        common = (self.common or []) if len(lengths) > 1 else []
        contents = Contents.gathered(rows, self.hashes)
        parts = (contents, self.found, self.ends, common)
        return Look(name, ledger, rows, self.per_row, lengths, prompts, trained, *parts)


def inspect(
    name: str,
    rows: RowSet,
    ledger: Ledger,
    tokenizer: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Look:
    """Read a set from beginning to end. progress(rows done, rows in all) after every few million tokens."""
    inspector = Inspector(tokenizer, rows.seqs_per_row)
    total = units.num_units(rows)
    for chunk in units.chunks(rows):
        inspector.add(chunk)
        progress(chunk.first + (len(chunk.offsets_S1) - 1) // rows.seqs_per_row, total)
    return inspector.look(name, rows, ledger)


def _sum_each(values_T: np.ndarray, begins_S: np.ndarray) -> np.ndarray:
    """int64 [S]: sums over the sequences that begin there; none is empty."""
    return np.add.reduceat(values_T.astype(np.int64), begins_S)


def _blank_mask(tokenizer: Any, size: int) -> np.ndarray:
    """bool [size]: tokens that may be white space only, by their spelling."""
    mask = np.zeros(size, dtype=np.bool_)
    mask[[i for token, i in tokenizer.get_vocab().items() if _BLANK.fullmatch(token)]] = True
    return mask


def summary(values: np.ndarray) -> dict[str, float]:
    """min, mean, max and percentiles of lengths."""
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}
    return {"min": int(values.min()), "mean": float(values.mean()), **percentiles, "max": int(values.max())}


def bins(values: np.ndarray, most: int = 12) -> list[tuple[int, int, int]]:
    """[(from, up to, count)], both ends inclusive: bins of one round width, or doubling where most values
    lie far below the largest."""
    low, high = int(values.min()), int(values.max())
    if high > 16 * max(float(np.median(values)), 1.0):
        edges = [0, *(1 << k for k in range(max(low.bit_length() - 1, 0), high.bit_length() + 1))]
    else:
        width = _round_up(max(1, (high - low) // most + 1))
        begin = low // width * width
        edges = list(range(begin, high + width + 1, width))
    counts, _ = np.histogram(values, bins=[edge - 0.5 for edge in edges])
    rows = [(a, b - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts)]
    while rows and rows[0][2] == 0:
        rows.pop(0)
    while rows and rows[-1][2] == 0:
        rows.pop()
    return rows


def _round_up(width: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 10 ** (len(str(width)) - 1)
    return next(step * scale for step in (1, 2, 5, 10) if step * scale >= width)


@dataclass(frozen=True)
class Steps:
    """A run over a training set, by the plan that the trainer follows."""

    per_epoch: int
    total: int
    epochs: float
    tokens_per_epoch: int
    trained_per_epoch: int
    filled: float
    """Share of micro_batch_tokens that the packed micro batches use, empty ones included."""
    micro_batches: float
    """Of each rank in a step, on average."""
    shared: tuple[float, float] | None
    """Both with the prompt of each pair once, where train.shared_prefix has or allows that."""


def steps(look: Look, config: Config, world_size: int) -> Steps:
    """The tokens of an epoch are those of an average one, where sources are blended."""
    train, num_rows = config.train, look.rows.num_rows
    per_epoch = plan.steps_per_epoch(num_rows, train.global_batch_size, train.limit_train_batches)
    total = train.max_steps or int(np.ceil(train.max_epochs * per_epoch))
    tokens, trained = (_of_epoch(look, of, config.data.weights) for of in (look.lengths_S, look.trained_S))
    packed = _packed(look, look.rows.row_lengths, config, world_size)
    once = _prompts_once(look.rows, train)
    shared = None if once is None else _packed(look, once, config, world_size)
    return Steps(per_epoch, total, total / per_epoch, tokens, trained, *packed, shared)


def _of_epoch(look: Look, counts_S: np.ndarray, weights: Sequence[float] | None) -> int:
    """Tokens, summed over as many rows of each source as an epoch has."""
    if weights is None:
        return int(counts_S.sum())
    rows = look.rows
    units = [p.end - p.begin for p in rows.parts] if isinstance(rows, Blocks) else rows.part_rows
    ends = np.cumsum(units)[:-1] * look.seqs_per_row
    sums = [int(own.sum()) for own in np.split(counts_S, ends)]
    epoch = plan.blend_counts(rows.part_rows, weights)
    return round(sum(num * new / old for num, new, old in zip(sums, epoch, rows.part_rows)))


def _prompts_once(rows: RowSet, config: TrainConfig) -> np.ndarray | None:
    """int64 [num_rows]: tokens of each pair with its prompt once; None where they are not shared."""
    if config.shared_prefix is False or not isinstance(rows, TokenStore) or rows.seqs_per_row == 1:
        return None
    once = rows.sharing_prompts().row_lengths
    pays = once.sum() < WORTH_SHARING * rows.row_lengths.sum()
    return once if config.shared_prefix or pays else None


def _packed(look: Look, row_lengths: np.ndarray, config: Config, world_size: int) -> tuple[float, float]:
    """filled and micro_batches of a few steps, spread over the first epoch."""
    c, weights, num_rows = config.train, config.data.weights, look.rows.num_rows
    per_epoch = plan.steps_per_epoch(num_rows, c.global_batch_size, c.limit_train_batches)
    tokens = bins_used = 0
    chosen = np.unique(np.linspace(0, per_epoch - 1, min(per_epoch, PACKED_STEPS)).astype(int)).tolist()
    for step in chosen:
        rows = plan.step_rows(num_rows, c.global_batch_size, c.seed, step, c.limit_train_batches)
        if weights is not None:
            rows = plan.blend(rows, look.rows.part_rows, weights, c.seed, epoch=0)
        packed = plan.pack(
            rows,
            row_lengths,
            world_size=world_size,
            max_tokens=c.micro_batch_tokens,
            max_rows=c.micro_batch_size,
        )
        bins_used += sum(len(own) for own in packed)
        tokens += int(row_lengths[rows].sum())
    return tokens / (bins_used * c.micro_batch_tokens), bins_used / world_size / len(chosen)
