"""Which documents are noise: each filter is a number of the text and a limit on it, off unless it is set.

The measures are those of published web filters (Rae et al. 2021, Gopher), reduced to one number each, so
that a limit can be chosen from what `tools.prepare` prints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from strop.config import PrepareConfig
from strop.errors import UserError

NOT_SYMBOLS = re.compile(r"[\w\s]+")
WORDS = re.compile(r"\w+")
UNBROKEN = 1_000_000
"""No text has so many characters in a row without white space, and a tokenizer would take gigabytes."""
FEW_WORDS = 20
"""Shorter texts repeat nothing that counts."""

REASONS = frozenset(
    ["empty", "short", "long", "unbroken", "repetition", "symbols", "language", "duplicate", "near_duplicate"]
)
"""Why a document is left out although nothing is wrong with its file."""

Filter = Callable[[str], "tuple[str, str] | None"]


def repetition(text: str) -> float:
    """Share of the word trigrams that have occurred before in the text; 0 for a text of few words."""
    words = WORDS.findall(text)
    if len(words) < FEW_WORDS:
        return 0.0
    total = len(words) - 2
    return 1 - len(set(zip(words, words[1:], words[2:]))) / total


def symbols(text: str) -> float:
    """Share of the characters that are neither letters, digits, underscores nor white space."""
    return len(NOT_SYMBOLS.sub("", text)) / max(1, len(text))


def build(config: PrepareConfig) -> list[Filter]:
    """The filters that are on: text -> (reason, message) where it is to be dropped."""
    filters: list[Filter] = [_length(config)]
    for reason, measure, limit in (
        ("repetition", repetition, config.max_repetition),
        ("symbols", symbols, config.max_symbols),
    ):
        if limit is not None:
            filters.append(_share(reason, measure, limit))
    if config.language is not None:
        filters.append(_language(config.language))
    return filters


def _length(config: PrepareConfig) -> Filter:
    least, most = max(1, config.min_chars), config.max_chars

    def check(text: str) -> tuple[str, str] | None:
        if not text.strip():
            return "empty", "an empty document"
        if len(text) < least:
            return "short", f"{len(text):,} characters, fewer than prepare.min_chars={least}"
        if most is not None and len(text) > most:
            return "long", f"{len(text):,} characters, more than prepare.max_chars={most}"
        if len(text) > UNBROKEN and max(map(len, text.split())) > UNBROKEN:
            return "unbroken", f"more than {UNBROKEN:,} characters without white space"
        return None

    return check


def _share(reason: str, measure: Callable[[str], float], limit: float) -> Filter:
    def check(text: str) -> tuple[str, str] | None:
        value = measure(text)
        return None if value <= limit else (reason, f"{value:.2f}, more than prepare.max_{reason}={limit}")

    return check


def _language(wanted: str) -> Filter:
    codes = [code.strip() for code in wanted.split(",")]
    try:
        import py3langid
    except ImportError:
        raise UserError(
            "prepare.language needs the Python package py3langid: pip install 'strop[language]'"
        ) from None
    identify: Any = py3langid.classify

    def check(text: str) -> tuple[str, str] | None:
        code = identify(text[:10_000])[0]
        return None if code in codes else ("language", f"{code}, not one of prepare.language={wanted}")

    return check
