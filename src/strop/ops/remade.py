"""Tensors that a backward makes again in place of keeping them: outputs of norms, which their inputs, kept
anyway, give for little. The layers that take such an output share it when its time comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

from torch import Tensor


class Maker:
    """Makes one tensor for all its users' backwards. Holds nothing but between the first and the last."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._num_users = 0
        self._waiting = 0
        self._made: Optional[Tensor] = None

    def add_user(self) -> None:
        self._num_users += 1

    def make(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor again, from what a user's own ctx saved of the parts."""
        made = self._make(*parts) if self._made is None else self._made
        self._waiting = (self._waiting or self._num_users) - 1
        self._made = made if self._waiting else None
        return made


class Source(NamedTuple):
    """What a tensor was made from, and how; lives as long as the tensor."""

    maker: Maker
    parts: tuple[Tensor, ...]
    version: int


def note(tensor: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> None:
    """`make(*parts)` gives the bits of `tensor` again."""
    tensor._strop_source = Source(Maker(make), parts, tensor._version)  # type: ignore[attr-defined]


def source_of(tensor: Tensor) -> Optional[Source]:
    """None where the tensor has to be kept: no source is known, or it was changed since."""
    source = getattr(tensor, "_strop_source", None)
    return source if source is not None and source.version == tensor._version else None
