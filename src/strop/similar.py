"""What to say of a name that there is not: the ones like it, or the ones that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 12
"""Names that are listed where none is like the one that was given."""


def names(word: str, known: Iterable[str]) -> list[str]:
    """The most alike first, at most three."""
    return difflib.get_close_matches(word, list(dict.fromkeys(known)))


def asked(found: Iterable[str]) -> str:
    """For the end of a message; empty if nothing was found."""
    text = " or ".join(found)
    return f"; did you mean {text}?" if text else ""


def meant(word: str, known: Iterable[str]) -> str:
    """For the end of a message; empty if no known name is like the word."""
    return asked(names(word, known))


def meant_or_known(word: str, known: Iterable[str]) -> str:
    """For the end of a message: names like the word, else the first ones that there are."""
    known = list(dict.fromkeys(known))
    listed = f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known[:MOST])}" if known else ""
    return meant(word, known) or listed
