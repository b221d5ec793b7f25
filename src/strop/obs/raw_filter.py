"""Bytes as a rank writes them -> the same without secrets, as soon as they may be seen.

A write may hold half a token, so a line is held until it ends, by \\n or, as progress bars do it, by \\r. One
that has stood unfinished for a while is given out up to its last blank, if nothing in it looks like the
beginning of a secret; one that is too long is cut where the cut makes no difference to what is masked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from strop.obs.secrets import MARKER

LONGEST = 256 << 10
"""Characters of an unfinished line that are held."""
KEPT = 16 << 10
"""Of a line that is cut so much stays at least: no token is longer."""
TRIES = 6
KEY_LINES = 400
"""A private key has fewer lines."""

_ENDS = re.compile("(?<=[\n\r])")
_BEGINS_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_ENDS_KEY = re.compile(r"-----END [A-Z ]*PRIVATE KEY-----")
_SUSPECT = re.compile(r"key|token|secret|pass|credential|bearer|basic|://|-----", re.IGNORECASE)


class Filter:
    def __init__(self, redact: Callable[[str], str], known: Sequence[str]):
        self._line = b""
        """The unfinished one."""
        self._shown = 0
        """Characters of it, as redacted, that were given out."""
        self._key_lines = 0
        """How many more lines belong to a private key, at most."""
        self.learn(redact, known)

    def learn(self, redact: Callable[[str], str], known: Sequence[str]) -> None:
        self._redact = redact
        self._of_words = [value for value in known if len(value.split()) > 1]

    @property
    def unfinished(self) -> bool:
        return bool(self._line)

    def feed(self, data: bytes) -> bytes:
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        out = self._finish(self._line + data[:end]) if end else b""
        self._line = data[end:] if end else self._line + data
        while len(self._line) > LONGEST:
            out += self._cut()
        return out

    def idle(self) -> bytes:
        """The beginning of a line that has not been finished for a while, if it is harmless."""
        text = _decoded(self._line)
        stop = max(text.rfind(" "), text.rfind("\t")) + 1
        text = text[:stop]
        if stop <= self._shown or self._key_lines or _SUSPECT.search(text) or self._redact(text) != text:
            return b""
        if any(text.endswith(value[:n]) for value in self._of_words for n in range(1, len(value))):
            return b""
        new, self._shown = text[self._shown :], stop
        return _encoded(new)

    def end(self) -> bytes:
        """The rest: nothing more will come."""
        return self._finish(self._line) if self._line else b""

    def _finish(self, block: bytes) -> bytes:
        """Whole lines; the first may have been begun."""
        text = _decoded(block)
        if self._key_lines or self._redact(text) != text:  # what is harmless as one text is so line by line
            text = "".join(map(self._one, _ENDS.split(text)))
        out, self._line, self._shown = text[self._shown :], b"", 0
        return _encoded(out)

    def _one(self, line: str) -> str:
        if self._key_lines:
            end = _ENDS_KEY.search(line)
            self._key_lines = 0 if end else self._key_lines - 1
            return self._redact(line[end.end() :]) if end else ""
        begin = _BEGINS_KEY.search(line)
        if begin and not _ENDS_KEY.search(line, begin.end()):
            self._key_lines = KEY_LINES
            return self._redact(line[: begin.start()]) + MARKER + "\n"
        return self._redact(line.rstrip("\r\n")) + line[len(line.rstrip("\r\n")) :]

    def _cut(self) -> bytes:
        text = _decoded(self._line)
        whole = self._redact(text)
        for halvings in range(TRIES):
            stop = (len(text) - KEPT) >> halvings
            head, rest = self._redact(text[:stop]), text[stop:]
            if head + self._redact(rest) == whole:
                break
        else:  # one secret from end to end
            head, rest = MARKER, text[-KEPT:]
        out, self._line, self._shown = head[self._shown :], _encoded(rest), 0
        return _encoded(out)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
