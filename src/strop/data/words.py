"""Byte-pair encoding by looking words up: the tokenizer's own ids, several times faster.

A byte-level BPE tokenizer cuts a text into words by a regular expression and encodes each word on its own, so
the ids of a word seen before can be looked up. That is done only where it is proven equal: the tokenizer must
be of that form (GPT-2, Llama 3, Qwen, SmolLM and their like), each character must have been seen to be cut by
our regular expression as by the tokenizer itself, and a text that holds one of its added tokens, or anything
else that is not proven, goes through the tokenizer.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel(use_regex=True) cuts by."""
ASCII_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r"\t-\r "}
"""For `re`, which is faster and enough for a text of ASCII characters."""
MAX_WORDS = 300_000
"""Looked-up words, at most: about 60 MB."""


class WordEncoder:
    """`encode(text)` -> ids int32, or None where the tokenizer must do it."""

    def __init__(self, backend: Any, pattern: str, added: list[str]) -> None:
        self._backend = backend
        self._pattern = regex.compile(pattern)
        self._ascii = _ascii_pattern(pattern)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._words = _Words(backend)
        self._trusted: set[str] = set()
        self._doubtful: set[str] = set()
        if self._ascii is not None:
            letters = [chr(i) for i in range(128)]
            self._ascii_ok = {c for c in letters if _same_cut(backend, self._ascii, c)}
            self._trust(set(letters))

    @classmethod
    def of(cls, tokenizer: Any) -> WordEncoder | None:
        """None for a tokenizer of another form."""
        if not tokenizer.is_fast:
            return None
        backend = tokenizer.backend_tokenizer
        settings = json.loads(backend.to_str())
        pattern = _pattern(settings)
        if pattern is None:
            return None
        try:
            return cls(backend, pattern, [token["content"] for token in settings["added_tokens"]])
        except regex.error:
            return None

    def __call__(self, text: str) -> np.ndarray | None:
        if self._added is not None and self._added.search(text):
            return None
        if text.isascii() and self._ascii is not None:
            if not self._ascii_ok.issuperset(text):
                return None
            words = self._ascii.findall(text)
        else:
            letters = set(text)
            self._trust(letters - self._trusted)
            if not self._trusted.issuperset(letters):
                return None
            words = self._pattern.findall(text)
        if len(self._words) > MAX_WORDS:
            self._words.clear()
        try:
            ids = b"".join(map(self._words.__getitem__, words))
        except _NotOneWord:
            return None
        return np.frombuffer(ids, dtype=np.int32)

    def _trust(self, letters: set[str]) -> None:
        for letter in letters - self._doubtful:
            good = _same_cut(self._backend, self._pattern, letter)
            (self._trusted if good else self._doubtful).add(letter)


class _NotOneWord(Exception):
    """A word that the tokenizer would cut further when it stands alone."""


class _Words(dict[str, bytes]):
    """word -> its ids, packed."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> bytes:
        if len(self._backend.pre_tokenizer.pre_tokenize_str(word)) != 1:
            raise _NotOneWord
        ids = self._backend.encode(word, add_special_tokens=False).ids
        packed = np.array(ids, dtype=np.int32).tobytes()
        if len(word) <= 64:
            self[word] = packed
        return packed


def _pattern(settings: dict[str, Any]) -> str | None:
    """What the tokenizer cuts words by, from its own description; None if it does more than that."""
    model, cutter = settings["model"], settings["pre_tokenizer"]
    if settings["normalizer"] is not None or model["type"] != "BPE" or model.get("dropout"):
        return None
    steps = cutter["pretokenizers"] if cutter and cutter["type"] == "Sequence" else [cutter]
    plain = {"type": "ByteLevel", "add_prefix_space": False}
    last = steps[-1] or {}
    if any(last.get(key) != value for key, value in plain.items()):
        return None
    if len(steps) == 1:
        return GPT2 if last.get("use_regex", True) else None
    split = steps[0]
    whole = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if len(steps) != 2 or last.get("use_regex", True) or not whole:
        return None
    return split["pattern"].get("Regex")


def _ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """The same cut of ASCII text for `re`; None where a class has no counterpart."""
    out, inside, at = [], False, 0
    while at < len(pattern):
        name = next((n for n in ASCII_CLASSES if pattern.startswith(n, at)), None)
        if name is not None:
            out.append(ASCII_CLASSES[name] if inside else f"[{ASCII_CLASSES[name]}]")
        elif pattern.startswith(r"\S", at) and not inside:
            name = r"\S"
            out.append(rf"[^{ASCII_CLASSES[chr(92) + 's']}]")
        else:
            name = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
            if name in (r"\p", r"\P", r"\S"):
                return None
            inside = inside != (name == ("]" if inside else "["))
            out.append(name)
        at += len(name)
    try:
        return re.compile("".join(out))
    except re.error:
        return None


def _same_cut(backend: Any, pattern: Any, c: str) -> bool:
    """Whether a character is cut like the tokenizer does it beside every other kind of character."""
    try:
        probe = f"a{c}a 1{c}1 .{c}.  {c} {c}{c}\n{c}\n\n{c}\t{c}'{c}s'S{c}  "
        cuts = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(probe)]
        words = pattern.findall(probe)
    except UnicodeEncodeError:
        return False
    edges = np.cumsum([0, *map(len, words)]).tolist()
    return "".join(words) == probe and cuts == list(zip(edges[:-1], edges[1:]))
