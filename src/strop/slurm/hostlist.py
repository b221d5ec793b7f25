"""Slurm's short form for lists of hosts: "gpu[1-3,07-09],login1" names seven hosts."""

from __future__ import annotations

import itertools
import re


def expand(text: str) -> list[str]:
    """All names in order. Zero padding is kept ("07-09" -> 07 08 09); several brackets multiply.

    Raises ValueError for brackets that do not match and ranges that run backwards.
    """
    names: list[str] = []
    for part in _split_outside_brackets(text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        if any("[" in piece or "]" in piece for piece in pieces):
            raise ValueError(f"brackets do not match in host list {text!r}")
        # re.split alternates: text, bracket, text, bracket, ..., text
        choices = [_ranges(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


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
        values += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return values
