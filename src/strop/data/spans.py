"""Tokens back to text, in spans that are trained or not, special tokens apart: how a row is shown.

The tokens are those of a store, so what is shown is what is trained. A span is decoded as what its tokens add
to the text before them: a tokenizer that glues bytes to characters, or drops the blank that begins a text,
gives the right text only so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Span:
    text: str
    trained: bool
    special: bool
    """Special tokens (BOS, end of turn, ...), not text that looks like them."""
    tokens: int


def special_mask(tokenizer: Any) -> np.ndarray:
    """bool [largest id + 1]: special tokens, those that a chat template writes included."""
    special = {int(t) for t, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    mask = np.zeros(max(len(tokenizer), max(special, default=0) + 1), dtype=np.bool_)
    mask[sorted(special)] = True
    return mask


def spans(tokens: np.ndarray, trained: np.ndarray, tokenizer: Any, begin: int = 0) -> list[Span]:
    """tokens int32 [T], trained bool [T] -> the text of each run of tokens of one kind, from `begin` on."""
    special = special_mask(tokenizer)[tokens]
    kinds = 2 * trained.astype(np.int8) + special
    changes = np.flatnonzero(np.diff(kinds)) + 1
    edges = [begin, *changes[changes > begin].tolist(), len(tokens)]
    ids = tokens.tolist()
    out = []
    for a, b in zip(edges, edges[1:]):
        if special[a]:
            text = "".join(tokenizer.convert_ids_to_tokens(ids[a:b]))
        else:
            text = _added_text(ids, a, b, tokenizer)
        out.append(Span(text, bool(trained[a]), bool(special[a]), b - a))
    return out


def _added_text(ids: list[int], a: int, b: int, tokenizer: Any) -> str:
    """What tokens [a, b) add to the text of those before; alone, if a character is cut in two there."""
    before, text = _decode(ids[:a], tokenizer), _decode(ids[:b], tokenizer)
    return text[len(before) :] if text.startswith(before) else _decode(ids[a:b], tokenizer)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
