"""Prompts and completions put together from the fields of a row: "Question: {input}\\nAnswer: ".

Braces as in str.format, but what stands in them is the name of a field and nothing else: no attributes, no
indices, no formats. A template comes from the configuration, a name in it is only ever looked up in the row.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError


class Unfilled(Exception):
    """Why a row cannot fill a template."""


@dataclass(frozen=True)
class Template:
    key: str
    """Of the configuration, for messages."""
    pieces: tuple[tuple[str, Optional[str]], ...]
    """[(text, field that follows it or None)]."""

    def fill(self, fields: dict[str, Any]) -> str:
        """The text for one row. Raises Unfilled."""
        return "".join(
            text + ("" if name is None else self._value(name, fields)) for text, name in self.pieces
        )

    def _value(self, name: str, fields: dict[str, Any]) -> str:
        if name not in fields:
            there = ", ".join(fields) or "(none)"
            raise Unfilled(f"{self.key} wants {{{name}}}; the row's fields are {there}")
        value = fields[name]
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        what = "null" if value is None else f"a {type(value).__name__}"
        raise Unfilled(f"{self.key} wants {{{name}}}, which is {what} and no text")


def parse(setting: Optional[str], key: str) -> Optional[Template]:
    """The template of a setting: its text, or that of the file it names. UserError for one that is none."""
    if setting is None:
        return None
    text = setting
    if "{" not in setting:
        try:
            text = Path(setting).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError):
            raise UserError(
                f"{key}: neither a template with {{names}} of fields nor a UTF-8 file of one: {setting!r}"
            ) from None
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{key}: {error}; a brace that is meant as one is written {{{{ or }}}}") from None
    for _, name, form, conversion in found:
        if name is not None and (not name or form or conversion is not None):
            raise UserError(f"{key}: between braces stands the name of a field alone, as in {{input}}")
    if not any(name is not None for _, name, _, _ in found):
        raise UserError(f"{key}: no {{name}} of a field in {setting!r}")
    return Template(key, tuple((text, name) for text, name, _, _ in found))
