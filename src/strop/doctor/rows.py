"""The first rows of each source through the trainer's own renderer and tokeniser.

What comes out is counted in the trainer's ledger, so the same rows are bad, too long or equal as in the
run itself. `Scan` keeps what the other checks need: lengths, shares, a few examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from strop.config import KINDS, Config
from strop.data import labels, noise, sources
from strop.data.ledger import BadRow, Ledger, place
from strop.data.lengths import histogram
from strop.data.render import Options, Rendered, Renderer, chat_template
from strop.data.repeats import digest
from strop.data.sources import Source
from strop.data.store import TokenisedRow
from strop.data.tokenise import Tokeniser
from strop.doctor.checks import Checks
from strop.errors import UserError

EXACT_BYTES = 256 * 2**20
"""JSONL files up to this size are counted; of larger ones the number of rows is estimated."""


@dataclass
class Scan:
    """What the looked-at rows of one set are like."""

    split: str
    ledger: Ledger
    total_rows: int = 0
    """Of all sources, looked at or not; `exact` says whether it was counted."""
    exact: bool = True
    complete: bool = True
    """All rows were looked at."""
    row_tokens: list[int] = field(default_factory=list)
    """Tokens of each usable row (both sides of a pair)."""
    sequence_tokens: list[int] = field(default_factory=list)
    examples: list[TokenisedRow] = field(default_factory=list)
    templated: int = 0
    plain: int = 0
    contents: dict[bytes, list[tuple[str, int]]] = field(default_factory=dict)
    """Digest of a row's tokens -> where it stands."""
    good: int = 0
    """Usable rows whose value is 1: the desirable ones of an unpaired set."""
    blocks: Optional[int] = None
    """Rows of a set of text, as far as the looked-at documents tell."""

    def add(self, row: TokenisedRow, over_length: str = "drop") -> None:
        """A usable row (a document of text): its lengths, an example, whether it was there before."""
        self.ledger.use(row, over_length)
        lengths = [len(tokens) for tokens, _ in row.sequences]
        self.row_tokens.append(sum(lengths))
        self.good += row.value == 1
        self.sequence_tokens += lengths
        if len(self.examples) < 64:
            self.examples.append(row)
        content = digest(tokens for tokens, _ in row.sequences)
        self.contents.setdefault(content, []).append((row.source, row.line))

    @property
    def usable_rows(self) -> int:
        """Rows of the whole set that will be used, as far as the looked-at ones tell."""
        if self.blocks is not None:
            return self.blocks
        seen = self.ledger.read + sum(e.other_split for e in self.ledger.sources.values())
        return round(self.total_rows * self.ledger.used / seen) if seen else 0


def scan(config: Config, tokenizer: Any, kind: str, split: str, limit: Optional[int]) -> Scan:
    """Look at `limit` rows of each source (None: all). Raises UserError for what makes a source unusable."""
    result = Scan(split, Ledger(split))
    template = chat_template(config.model.chat_template, tokenizer)
    renderer = Renderer(kind, tokenizer, template, Options.of(config, kind))
    tokeniser = Tokeniser(tokenizer, config.data.max_length, config.data.over_length)
    found = sources.find(config.data, split, kind)
    for row in tokeniser(_rendered(found, config, split, renderer, limit, result)):
        if isinstance(row, BadRow):
            result.ledger.drop(row)
            continue
        result.add(row, config.data.over_length)
    return result


def _rendered(
    found: list[Source], config: Config, split: str, renderer: Renderer, limit: Optional[int], result: Scan
) -> Iterator[Rendered | BadRow]:
    for source in found:
        taken = last = 0
        for row in itertools.islice(sources.read(source), limit):
            taken, last = taken + 1, row.line
            if sources.elsewhere(row, config.data, split):
                result.ledger.of(source.name).other_split += 1
                continue
            if isinstance(row, BadRow):
                yield row
                continue
            for rendered in renderer.rows(row):
                if isinstance(rendered, Rendered):
                    result.templated += rendered.templated
                    result.plain += not rendered.templated
                yield rendered
        total, exact = num_rows(source, taken, last) if taken == limit else (taken, True)
        result.total_rows += total
        result.exact = result.exact and exact
        result.complete = result.complete and taken >= total


def num_rows(source: Source, taken: int, last_line: int) -> tuple[int, bool]:
    """(rows of a source, whether counted), without parsing the ones that were not looked at."""
    if source.adapter is not None:  # rows and lines need not be the same
        return sum(1 for _ in sources.read(source)), True
    if source.format == "jsonl" and source.path.endswith(".jsonl"):
        with open(source.path, "rb") as file:
            head = sum(len(line) for line in itertools.islice(file, last_line))
            size = file.seek(0, 2)
            if size > EXACT_BYTES:
                return round(size * taken / head), False
            file.seek(head)
            return taken + sum(1 for line in file if line.strip()), True
    if source.format == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(source.path) as file:
            return file.metadata.num_rows, True
    return sum(1 for _ in sources.read(source)), True


def judge(scan: Scan, config: Config, checks: Checks) -> None:
    """Bad rows, lengths and boundaries of one set."""
    ledger, data, name = scan.ledger, config.data, f"{scan.split} data"
    extent = "all" if scan.complete else "the first"
    about = "" if scan.exact else "about "
    checks.ok(
        name, f"{extent} {ledger.read:,} of {about}{scan.total_rows:,} rows looked at, {ledger.used:,} usable"
    )
    for entry in ledger.sources.values():
        for reason, dropped in entry.dropped.items():
            first = dropped.examples[0]
            if reason in noise.REASONS or dropped.wanted:
                what = "rows" if dropped.wanted else "documents"
                checks.ok(name, f"{dropped.rows:,} {what} left out as {reason}")
                continue
            where = place(entry.name, int(first["line"]))
            text = f"{dropped.rows:,} rows {reason}; the first: {where}: {first['message']}"
            long = reason == "over_length"
            if (data.over_length if long else data.on_bad_row) == "error":
                lenient = "over_length=drop" if long else "on_bad_row=skip"
                checks.fail(name, text, f"correct it, or data.{lenient} leaves such rows out")
            else:
                checks.warn(name, text, "data.max_length is the key to raise" if long else "")
        for policy, cut in entry.truncated.items():
            first = cut.examples[0]
            text = f"{cut.rows:,} rows cut by {policy}; the first: {place(entry.name, int(first['line']))}: "
            checks.warn(name, text + str(first["message"]), "data.max_length is the key to raise")
    try:
        ledger.check(data.max_dropped_fraction, wanted=noise.REASONS)
    except UserError as error:
        text = str(error).splitlines()[0]
        if scan.complete or not ledger.used:
            checks.fail(name, text, "correct the rows, or raise data.max_dropped_fraction or data.max_length")
        else:
            checks.warn(name, f"of the rows looked at: {text}", "if the others are alike, the run will stop")
    if scan.sequence_tokens:
        checks.ok(name, "tokens a sequence: " + histogram(scan.sequence_tokens, data.max_length))
    merged = sum(entry.merged_boundary for entry in ledger.sources.values())
    if merged:
        checks.warn(
            name,
            f"in {merged:,} rows the prompt's tokens are not the beginning of prompt+completion's",
            "a token spans the boundary and is trained; end the prompts where a token ends (no blank)",
        )
    if KINDS[config.algo] == "unpaired" and ledger.used and scan.split == "train":
        line = labels.imbalance(scan.good, ledger.used - scan.good, config.kto)
        level = checks.warn if line else checks.ok
        level("labels", line or f"{scan.good:,} of {ledger.used:,} rows are desirable")
        if ledger.used == 1 and scan.complete and config.kto.loss == "kto":
            checks.fail("labels", "a single row cannot be compared with others", "kto.loss=apo_zero_unpaired")
    if doubles := len(scan.row_tokens) - len(scan.contents):
        checks.warn(name, f"{doubles:,} rows are equal to an earlier one")


def compare(train: Scan, validation: Scan, checks: Checks) -> None:
    """Rows that stand in both sets."""
    both = [content for content in validation.contents if content in train.contents]
    extent = "" if train.complete and validation.complete else " among the rows looked at"
    if both:
        rows = sum(len(validation.contents[content]) for content in both)
        first, there = validation.contents[both[0]][0], train.contents[both[0]][0]
        text = (
            f"{rows:,} of {len(validation.row_tokens):,} validation rows are training rows too{extent}; "
            f"{place(*first)} is {place(*there)}"
        )
        checks.warn("validation data", text, "take them out of one set; data.split never does this")
    else:
        checks.ok("validation data", f"no row of it is a training row{extent}")
