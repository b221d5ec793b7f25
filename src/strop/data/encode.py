"""Texts to token ids, for whole documents and many of them.

A document is encoded as it stands, gets the BOS that its tokenizer puts before a text, and EOS; never a
second one of either. A very long document is encoded in stretches, cut before a blank between two letters,
if the tokenizer gives the same ids that way (a probe says so; else it is encoded as a whole).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from strop.data.tokenise import encode, special_ids
from strop.errors import UserError

LONG_CHARS = 2_000_000
"""A longer document is encoded in stretches of about so many characters: an encoding takes ~100 bytes a token."""
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
        self.cuts = self._cuts_change_nothing()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, BOS and EOS included."""
        cut = [self._stretches(text) for text in texts]
        encoded = iter(encode(self.tokenizer, [stretch for stretches in cut for stretch in stretches]))
        return [self._finished([next(encoded) for _ in stretches]) for stretches in cut]

    def _finished(self, parts: list[list[int]]) -> np.ndarray:
        ids = [token for part in parts for token in part] if len(parts) > 1 else parts[0]
        head = [] if ids[: len(self.bos)] == self.bos else self.bos
        tail = [] if ids and ids[-1] == self.eos else [self.eos]
        return np.array([*head, *ids, *tail] if head or tail else ids, dtype=np.int32)

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
