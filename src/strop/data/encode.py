"""Texts to token ids, for whole documents and many of them.

Words are looked up where that is proven equal (words.py). A document is encoded as it stands, gets the BOS
that its tokenizer puts before a text, and EOS; never a second one of either. A very long document is encoded
in stretches, cut before a blank between two letters, if the tokenizer gives the same ids that way (a probe
says so; else it is encoded as a whole).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from strop.data.tokenise import encode, special_ids
from strop.data.words import WordEncoder
from strop.errors import UserError

LONG_CHARS = 2_000_000
"""A longer document is encoded in stretches of about so many: an encoding takes some 100 bytes a token."""
CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
PROBE = "Two words and more, so that ten blanks lie between letters; it's 3 o'clock.\n\n  The end of it"


class TextEncoder:
    """Documents to ids with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos, eos = special_ids(tokenizer)
        if eos is None:
            raise UserError("model.tokenizer has no EOS token, which ends each document")
        self.eos: int = eos
        self._words = WordEncoder.of(tokenizer)
        self.cuts = self._cuts_change_nothing()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, BOS and EOS included."""
        cut = [self._stretches(text) for text in texts]
        encoded = iter(self._encode([stretch for stretches in cut for stretch in stretches]))
        return [self._finished([next(encoded) for _ in stretches]) for stretches in cut]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids without special tokens."""
        if self._words is None:
            return [np.array(ids, dtype=np.int32) for ids in encode(self.tokenizer, texts)]
        found = [self._words(text) for text in texts]
        rest = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(rest, encode(self.tokenizer, [texts[i] for i in rest])):
            found[i] = np.array(ids, dtype=np.int32)
        return [ids for ids in found if ids is not None]

    def _finished(self, parts: list[np.ndarray]) -> np.ndarray:
        ids = np.concatenate(parts)
        head = [] if ids[: len(self.bos)].tolist() == self.bos else self.bos
        tail = [] if len(ids) and ids[-1] == self.eos else [self.eos]
        return np.concatenate([head, ids, tail]).astype(np.int32) if head or tail else ids

    def _stretches(self, text: str) -> list[str]:
        if len(text) <= LONG_CHARS or not self.cuts:
            return [text]
        edges = [0]
        while len(text) - edges[-1] > LONG_CHARS and (found := CUT.search(text, edges[-1] + LONG_CHARS)):
            edges.append(found.start())
        return [text[a:b] for a, b in zip(edges, [*edges[1:], len(text)])]

    def _cuts_change_nothing(self) -> bool:
        [whole] = encode(self.tokenizer, [PROBE])
        for found in CUT.finditer(PROBE):
            left, right = encode(self.tokenizer, [PROBE[: found.start()], PROBE[found.start() :]])
            if left + right != whole:
                return False
        return True
