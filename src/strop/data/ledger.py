"""What happened to every row: read, used, cut, left out and why.

The ledger is filled while rows are tokenised, kept beside the token store (so that a cache hit knows it
too) and copied to `data/ledger.json` of the run. Rows that cannot be used travel through the pipeline as
`BadRow` and meet the user's policy here, in the order of the input.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strop.config import DataConfig
from strop.data import intact
from strop.data.store import TokenisedRow
from strop.errors import UserError

EXAMPLES = 5
"""Rows named for each reason, the first ones."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on as it is."""

    source: str
    line: int
    reason: str
    """A short constant: not_json, not_utf8, not_an_object, wrong_fields, empty, not_unicode, template,
    boundary, same_pair, no_trained_token, over_length, too_long (a document), or one of noise.REASONS."""
    message: str
    """For the user: what is wrong with this very row, without its place."""
    tokens: int = 0
    """Its length where that is known; where it is far too long, data.max_length + 1."""
    half: bool = False
    """As `TokenisedRow.half`."""
    wanted: bool = False
    """An adapter left it out though it is sound: no error, and no part of `data.max_dropped_fraction`."""
    dealt_by: Any = field(default=None, repr=False, compare=False)
    """What `data.split` would deal it out by; None for what could not be read, which is told of every set."""

    @property
    def place(self) -> str:
        return place(self.source, self.line)


def place(source: str, line: int) -> str:
    """How messages call a row."""
    return (
        f"{source}, {'line' if any(mark in source for mark in ('.jsonl', '.txt', '.md')) else 'row'} {line}"
    )


def refuse_or_keep(row: BadRow, config: DataConfig) -> None:
    """UserError where the policy for such a row is to stop; the caller counts it otherwise."""
    if row.wanted:
        return
    long = row.reason == "over_length"
    if config.over_length == "error" if long else config.on_bad_row == "error":
        lenient = "over_length=drop" if long else "on_bad_row=skip"
        raise UserError(
            f"{row.place}: {row.message}\n  (data.{lenient} leaves such rows out and counts them)"
        )


@dataclass
class Dropped:
    """Rows of one source left out for one reason, or cut by one policy."""

    rows: int = 0
    tokens: int = 0
    """Their tokens, where they were tokenised; of rows that were cut, those that are gone. A row far beyond
    data.max_length counts as one token longer than that."""
    examples: list[dict[str, str | int]] = field(default_factory=list)
    """[{line, message}] of the first few."""
    wanted: bool = False
    """As `BadRow.wanted`."""
    halves: int = 0
    """Of the rows, those that are halves of pairs."""

    def add(self, line: int, message: str, tokens: int) -> None:
        self.rows += 1
        self.tokens += tokens
        if len(self.examples) < EXAMPLES:
            self.examples.append({"line": line, "message": message})


@dataclass
class SourceLedger:
    """The rows of one file or hub set."""

    name: str
    used: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest sequence that is used."""
    other_split: int = 0
    """Rows that `data.split` gives to another set; not counted as read."""
    halves: int = 0
    """Rows that are halves of pairs, used or dropped; two are one line, as a pair that cannot be used is."""
    merged_boundary: int = 0
    """Used rows in which a token spans the end of the prompt; it is trained."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    truncated: dict[str, Dropped] = field(default_factory=dict)
    """By policy (data.over_length); these rows are used."""

    @property
    def num_dropped(self) -> int:
        return sum(entry.rows for entry in self.dropped.values())

    @property
    def read(self) -> int:
        return self.used + self.num_dropped


@dataclass
class Ledger:
    """The rows of one set (train, validation)."""

    split: str
    sources: dict[str, SourceLedger] = field(default_factory=dict)
    overlap: dict[str, Any] | None = None
    """What this set shares with the training set (strop.data.repeats); None: not looked for."""

    def of(self, source: str) -> SourceLedger:
        return self.sources.setdefault(source, SourceLedger(source))

    def use(self, row: TokenisedRow, over_length: str = "drop") -> None:
        """over_length: the policy that has cut it, if it was."""
        entry = self.of(row.source)
        if row.num_cut:
            total = sum(len(tokens) for tokens, _ in row.sequences) + row.num_cut
            policy = entry.truncated.setdefault(over_length, Dropped())
            policy.add(row.line, f"{row.num_cut:,} of {total:,} tokens cut", row.num_cut)
        entry.used += 1
        entry.halves += row.half
        entry.merged_boundary += row.merged_boundary
        for tokens, trained in row.sequences:
            entry.tokens += len(tokens)
            entry.trained_tokens += int(trained.sum())
            entry.longest = max(entry.longest, len(tokens))

    def drop(self, row: BadRow) -> None:
        entry = self.of(row.source).dropped.setdefault(row.reason, Dropped(wanted=row.wanted))
        entry.add(row.line, row.message, row.tokens)
        entry.halves += row.half
        self.of(row.source).halves += row.half

    def drop_many(
        self,
        source: str,
        reason: str,
        rows: int,
        tokens: int,
        examples: Iterable[tuple[int, str]],
        wanted: bool = False,
    ) -> None:
        """Rows counted elsewhere: [(line, message)] of the first ones."""
        entry = self.of(source).dropped.setdefault(reason, Dropped(wanted=wanted))
        entry.rows += rows
        entry.tokens += tokens
        room = EXAMPLES - len(entry.examples)
        entry.examples += [{"line": line, "message": text} for line, text in list(examples)[:room]]

    @property
    def used(self) -> int:
        return sum(entry.used for entry in self.sources.values())

    @property
    def truncated(self) -> int:
        return sum(cut.rows for entry in self.sources.values() for cut in entry.truncated.values())

    @property
    def read(self) -> int:
        return sum(entry.read for entry in self.sources.values())

    def check(self, max_dropped_fraction: float, wanted: Collection[str] = ()) -> None:
        """UserError if too many rows were left out (for other reasons than `wanted` ones), or all of them.

        Counted as lines, of which two halves are one, so that a file is judged alike by all algorithms; those
        that an adapter was to leave out are not counted at all.
        """
        entries = self.sources.values()
        left_out = [(reason in wanted, d) for entry in entries for reason, d in entry.dropped.items()]
        meant = sum(d.rows for _, d in left_out if d.wanted)
        read = self.read - meant - sum(entry.halves for entry in entries) / 2
        dropped = sum(d.rows - d.halves / 2 for filtered, d in left_out if not (d.wanted or filtered))
        if self.used and dropped <= max_dropped_fraction * read:
            return
        if not self.read:
            elsewhere = sum(entry.other_split for entry in self.sources.values())
            why = f": data.split gives all {elsewhere:,} rows to the other sets" if elsewhere else ""
            raise UserError(f"the {self.split} set has no rows{why}")
        lines = [
            f"{_number(dropped)} of {_number(read)} rows of the {self.split} set ({dropped / read:.1%}) were "
            f"dropped, more than data.max_dropped_fraction={max_dropped_fraction} allows"
            if dropped > max_dropped_fraction * read
            else f"all {self.read:,} rows of the {self.split} set were dropped"
        ]
        for entry in self.sources.values():
            for reason, rows in entry.dropped.items():
                first = rows.examples[0]
                advice = "; data.max_length is the key to raise" if reason == "over_length" else ""
                lines.append(
                    f"  {rows.rows:,} {reason}, the first at "
                    f"{place(entry.name, int(first['line']))}: {first['message']}{advice}"
                )
        raise UserError("\n".join(lines))

    def as_json(self) -> dict[str, Any]:
        totals = {"read": self.read, "used": self.used, "dropped": self.read - self.used}
        totals["truncated"] = self.truncated
        entries = [{"read": entry.read, **dataclasses.asdict(entry)} for entry in self.sources.values()]
        overlap = {} if self.overlap is None else {"overlap": self.overlap}
        return {"split": self.split, **totals, **overlap, "sources": entries}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Ledger:
        record = intact.record(path)
        ledger = cls(split=record["split"])
        for entry in record["sources"]:
            del entry["read"]
            for name in ("dropped", "truncated"):
                entry[name] = {reason: Dropped(**rows) for reason, rows in entry.get(name, {}).items()}
            ledger.sources[entry["name"]] = SourceLedger(**entry)
        return ledger

    def table(self) -> str:
        """Plain text, one line a source, the reasons below it."""
        head = ("source", "read", "used", "dropped", "tokens", "trained", "longest")
        body: list[tuple[str, ...]] = []
        for entry in self.sources.values():
            numbers = (entry.read, entry.used, entry.num_dropped, entry.tokens, entry.trained_tokens)
            body.append((entry.name, *(f"{n:,}" for n in (*numbers, entry.longest))))
            for reason, rows in entry.dropped.items():
                body.append((f"  {reason}", "", "", f"{rows.rows:,}", f"{rows.tokens:,}", "", ""))
            for policy, rows in entry.truncated.items():
                body.append((f"  {policy}", "", f"({rows.rows:,})", "", f"(-{rows.tokens:,})", "", ""))
            if entry.merged_boundary:
                body.append(
                    ("  prompt ends inside a token", "", f"({entry.merged_boundary:,})", "", "", "", "")
                )
            if entry.other_split:
                body.append(("  other split", f"({entry.other_split:,})", "", "", "", "", ""))
        return f"{self.split} set\n" + columns([head, *body]) + self._overlap_text()

    def _overlap_text(self) -> str:
        found = self.overlap
        if not found or not found["rows"] + found["prompts"]:
            return ""
        text = (
            f"\nwarning: {found['rows']:,} of {found['of']:,} rows are training rows, too, and "
            f"{found['prompts']:,} others have a prompt of one; nothing was taken out. The first:"
        )
        return text + "".join(f"\n  {example}" for example in found["examples"])


def _number(lines: float) -> str:
    """1,234 or, where one half of a pair is among them, 1,234.5."""
    return f"{lines:,.1f}".removesuffix(".0")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right, as wide as needed."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    )
