"""Slurm's short form for lists of hosts: "gpu[1-3,07-09],login1" names seven hosts."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import Optional

LARGEST = 1 << 18
"""No cluster has as many nodes, and no job as many ranks."""


def expand(text: str) -> list[str]:
    """All names in order. Zero padding is kept ("07-09" -> 07 08 09); several brackets multiply.

    Raises ValueError for brackets that do not match, ranges that run backwards, and more than LARGEST names.
    """
    names: list[str] = []
    for part in _split_outside_brackets(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        if any("[" in piece or "]" in piece for piece in pieces):
            raise ValueError(f"brackets do not match in host list {text!r}")
        # re.split alternates: text, bracket, text, bracket, ..., text
        choices = [_ranges(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        _bound(len(names) + math.prod(map(len, choices)), text)
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _bound(number: int, text: str) -> None:
    if number > LARGEST:
        raise ValueError(f"{text[:80]!r} names more than {LARGEST} hosts")


def ranges(numbers: Iterable[int], limit: Optional[int] = None) -> str:
    """The other way round, for ranks: "0-36,38-511" of sorted or unsorted numbers. Beyond `limit` parts the
    rest is counted."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n <= parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    shown = [str(low) if low == high else f"{low}-{high}" for low, high in parts[:limit]]
    left = 0 if limit is None else sum(high - low + 1 for low, high in parts[limit:])
    return ",".join(shown) + (f" and {left} more" if left else "")


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _ranges(text: str) -> list[str]:
    values: list[str] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not dash:
            values.append(part)
            continue
        if int(low) > int(high):
            raise ValueError(f"range {part!r} runs backwards")
        _bound(len(values) + int(high) - int(low), text)
        values += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return values
