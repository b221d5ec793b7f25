"""A packed micro batch: sequences side by side in one long row of tokens, without padding.

Shapes: T tokens, S sequences, R rows (S = R x seqs_per_row; sequences of a row are neighbours, chosen
before rejected). A thread makes batches ahead of the loop. It is a thread and not a worker process since
processes would inherit blocked signals and the memory maps are cheap to read.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from strop.data.blocks import Blocks
from strop.data.draws import token_keys
from strop.data.mismatched import Mismatched
from strop.data.store import TokenStore

DUMMY_LENGTH = 2
"""Tokens in each sequence of the batch that stands in where a rank has no rows."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One packed micro batch. A dummy (no rows) has seqs_per_row sequences and nothing trained."""

    tokens_T: Tensor
    """int64 [T]."""
    positions_T: Tensor
    """int64 [T], from 0 in each sequence, or from where a shared prompt ends."""
    cu_seqlens: Tensor
    """int32 [S + 1]."""
    trained_T: Tensor
    """bool [T]: position t is trained to predict token t from the tokens before it."""
    rows: np.ndarray
    """int64 [R] row ids."""
    max_seqlen: int
    ref_logp_T: Tensor | None = None
    """fp32 [T]: reference log-probs of trained tokens, 0 elsewhere."""
    value_R: Tensor | None = None
    """fp32 [R] (a dummy: [1]): the number that each row of a token store brings along for its loss, NaN where
    it has none."""
    baseline: float = 0.0
    """What rewards are compared with, the same in all batches of a step; see `strop.baseline`."""
    draw_T: Tensor | None = None
    """int32 [T]: the keys of random draws (strop.data.draws); None: nothing is drawn, as in validation."""
    cu_keys: Tensor | None = None
    """int32 [S + 1], where prompts are shared: the same sums as cu_seqlens with the shared prompts counted.
    A sequence with more keys than tokens goes on where the prompt of the one before it ends."""

    known_N: Tensor | None = None
    """int64 [N]: where trained_T is True, made in host memory: looking for it on a GPU would wait for it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of its rows, a shared prompt counted for each of its sequences."""
        return len(self.tokens_T) if self.cu_keys is None else int(self.cu_keys[-1])

    @property
    def previous_T(self) -> Tensor:
        """int64 [T]: where the token before each token stands. Of a sequence's first token this means
        something only after a shared prompt."""
        previous_T = torch.arange(-1, len(self.tokens_T) - 1, device=self.tokens_T.device)
        if self.cu_keys is None:
            return previous_T
        # A dummy shares nothing, and a first sequence has none before it: theirs is -1 or unused.
        num_shared_S = self.cu_keys.diff() - self.cu_seqlens.diff()
        last_of_prompt_S = self.cu_seqlens.roll(1)[:-1] + num_shared_S - 1
        starts_S = self.cu_seqlens[:-1].long()
        return previous_T.scatter(0, starts_S, torch.where(num_shared_S > 0, last_of_prompt_S, starts_S - 1))

    @property
    def index_N(self) -> Tensor:
        """int64 [N]: where the trained tokens stand."""
        return self.trained_T.nonzero()[:, 0] if self.known_N is None else self.known_N

    @property
    def is_dummy(self) -> bool:
        """True where a rank has no rows: it runs the same collectives, and its loss must count 0."""
        return len(self.rows) == 0

    def row_edges(self) -> list[int]:
        """[R + 1]: trained tokens before each row, and all. Looks at values, so call it in host memory."""
        before = np.concatenate([[0], np.cumsum(self.trained_T.numpy())])
        num_seqs = len(self.cu_seqlens) - 1
        return before[self.cu_seqlens[:: num_seqs // max(len(self.rows), 1)].numpy()].tolist()

    def trained_only(self, index_N: Tensor) -> Batch:
        """As a loss sees it: with no tokens but those trained, which are at index_N."""
        before = torch.nn.functional.pad(self.trained_T.cumsum(0), (1, 0))
        return dataclasses.replace(
            self,
            tokens_T=self.tokens_T[index_N],
            positions_T=self.positions_T[index_N],
            cu_seqlens=before[self.cu_seqlens].to(self.cu_seqlens.dtype),
            trained_T=self.trained_T[index_N],
            ref_logp_T=None if self.ref_logp_T is None else self.ref_logp_T[index_N],
            known_N=None,
            draw_T=None,
            cu_keys=None,
        )

    def part(self, tokens: slice, rows: slice) -> Batch:
        """Some tokens with the rows that they belong to, for a loss. Of a row that is cut, what is inside."""
        num_rows, num_seqs = max(len(self.rows), 1), len(self.cu_seqlens) - 1
        edges = self.cu_seqlens[rows.start * num_seqs // num_rows : rows.stop * num_seqs // num_rows + 1]
        return dataclasses.replace(
            self,
            tokens_T=self.tokens_T[tokens],
            positions_T=self.positions_T[tokens],
            cu_seqlens=edges.clamp(tokens.start, tokens.stop) - tokens.start,
            trained_T=self.trained_T[tokens],
            known_N=None,
            rows=self.rows[rows],
            ref_logp_T=None if self.ref_logp_T is None else self.ref_logp_T[tokens],
            value_R=None if self.value_R is None else self.value_R[rows],
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def ready_for(self, device: torch.device) -> Batch:
        """The same batch, where `device` is a GPU in page-locked memory: from other memory a copy waits until
        all is done that the GPU was asked for before."""
        return self._map(lambda tensor: tensor.pin_memory()) if device.type == "cuda" else self

    def _map(self, function: Any) -> Batch:
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


def make_batch(
    store: TokenStore | Mismatched | Blocks,
    rows: np.ndarray,
    ref: np.ndarray | None = None,
    draw: tuple[int, int] | None = None,
) -> Batch:
    """Pack `rows` of the store in the given order; no rows give a dummy.

    ref: fp32 [total], laid out like store.tokens. draw: (seed, step) of what is drawn at random.
    """
    rows = np.asarray(rows, dtype=np.int64)
    sequences = [sequence for row in rows for sequence in store.sequences(row)]
    if not sequences:
        return _dummy(store.seqs_per_row, rows, with_ref=ref is not None, draws=draw is not None)
    seqlens = np.array([len(tokens) for tokens, _ in sequences])
    first_positions = [0] * len(sequences)
    shares = not isinstance(store, Blocks) and store.shared_R is not None
    if not isinstance(store, Blocks):
        first_positions = [first for row in rows for first in store.first_positions(row)]
    trained = np.concatenate([trained for _, trained in sequences])
    ref_logp_T = None
    if ref is not None:
        assert not isinstance(store, Blocks)
        ref_logp = np.concatenate([ref[a:b] for row in rows for a, b in store.spans(row)])
        ref_logp_T = torch.from_numpy(np.where(trained, ref_logp, 0).astype(np.float32))
    positions = np.concatenate(
        [np.arange(p, p + n, dtype=np.int64) for p, n in zip(first_positions, seqlens)]
    )
    draw_T = None
    if draw is not None:
        lengths = store.row_lengths[rows]
        places = np.concatenate([np.arange(n) for n in lengths]) if isinstance(store, Blocks) else positions
        draw_T = torch.from_numpy(token_keys(*draw, np.repeat(rows, lengths), places))
    return Batch(
        tokens_T=torch.from_numpy(np.concatenate([tokens for tokens, _ in sequences]).astype(np.int64)),
        positions_T=torch.from_numpy(positions),
        cu_seqlens=_cumulated(seqlens),
        trained_T=torch.from_numpy(trained),
        known_N=torch.from_numpy(np.flatnonzero(trained)),
        rows=rows,
        max_seqlen=int(seqlens.max()),
        value_R=torch.from_numpy(store.values_R[rows]) if not isinstance(store, Blocks) else None,
        ref_logp_T=ref_logp_T,
        draw_T=draw_T,
        cu_keys=_cumulated(seqlens + first_positions) if shares else None,
    )


def _cumulated(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _dummy(seqs_per_row: int, rows: np.ndarray, *, with_ref: bool, draws: bool) -> Batch:
    """Tokens of id 0, so that a rank without rows enters the same collectives as the others."""
    total = seqs_per_row * DUMMY_LENGTH
    return Batch(
        tokens_T=torch.zeros(total, dtype=torch.int64),
        positions_T=torch.arange(DUMMY_LENGTH).repeat(seqs_per_row),
        cu_seqlens=torch.arange(0, total + 1, DUMMY_LENGTH, dtype=torch.int32),
        trained_T=torch.zeros(total, dtype=torch.bool),
        known_N=torch.zeros(0, dtype=torch.int64),
        rows=rows,
        max_seqlen=DUMMY_LENGTH,
        value_R=torch.full((1,), torch.nan),
        ref_logp_T=torch.zeros(total) if with_ref else None,
        draw_T=torch.zeros(total, dtype=torch.int32) if draws else None,
    )


class Prefetcher(Generic[Item]):
    """Runs an iterable in a thread, at most `depth` items ahead, and hands them out in order.

        with Prefetcher(make_batch(store, rows) for rows in bins) as batches:
            for batch in batches: ...

    An exception of the iterable is raised in the consumer, after the items before it. `close` returns as
    soon as the item being made is done; it is safe to call twice.
    """

    def __init__(self, items: Iterable[Item], depth: int = 2) -> None:
        assert depth >= 1
        self._items = iter(items)
        self._depth = depth
        self._ready: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error = None
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as raised:  # handed to the consumer, whatever it is
            error = raised
        finally:
            with self._changed:
                self._error, self._finished = error, True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._ready and not self._closed:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
