"""What tools.look_at_data prints: text with what cannot be seen made visible, tables, bars, concerns.

Lines that are not data fit `Paper.width`. On a terminal trained text is green, special tokens are cyan, both
at once green on a bar; elsewhere trained text stands between ⟦ and ⟧. Colours are closed at every end of a
line, for `less -R`. Data reaches a terminal without control characters.
"""

from __future__ import annotations

import copy
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from strop.config import Config
from strop.data import inspect
from strop.data.concerns import Concern, pair_lengths, percent
from strop.data.inspect import Look, Steps
from strop.data.ledger import Ledger
from strop.data.looking import GENERAL, Report
from strop.data.samples import Part, Sample
from strop.data.spans import Span
from strop.obs.log_text import printable

STYLES = {
    ("trained", False): "32",
    ("trained", True): "1;7;32",
    ("context", True): "36",
    "head": "1",
    "warn": "33",
    "note": "36",
    "dim": "2",
}
BEGIN_CHARS, END_CHARS = 1200, 400
"""Shown of a longer span, unless all of it is asked for."""
MOST_PARTS = 8
"""Documents shown of a block."""
_VISIBLE = {"\n": "⏎\n", "\t": "→\t", "\r": "␍"}
_EDGE_BLANKS = re.compile(r"\A +| +(?=\n)| +\Z")
_JOINERS = "\u200c\u200d"
"""Parts of words and emoji in some scripts, not hidden signs."""


@dataclass(frozen=True)
class Paper:
    colour: bool
    width: int = 80
    full: bool = False
    """Long spans whole."""

    def style(self, text: str, key: object) -> str:
        """Every line of the text in a colour of its own, which less -R needs."""
        code = STYLES.get(key) if self.colour else None  # type: ignore[call-overload]
        if code is None:
            return text
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def heading(self, text: str) -> str:
        return self.style(f"── {text} ".ljust(self.width, "─"), "head")

    def wrap(self, text: str, first: str = "", rest: str = "") -> str:
        """Paragraphs within the width; a word that is too long, such as a path, is not cut."""
        wrapper = textwrap.TextWrapper(self.width, break_long_words=False, break_on_hyphens=False)
        lines = []
        for i, line in enumerate(text.splitlines()):
            wrapper.initial_indent, wrapper.subsequent_indent = rest if i else first, rest
            lines.append(wrapper.fill(line))
        return "\n".join(lines)


def visible(text: str) -> str:
    """Line breaks, tabs, blanks at both ends and of lines, unusual blanks and invisible signs made visible;
    control characters as escapes."""
    text = _EDGE_BLANKS.sub(lambda match: "·" * len(match[0]), text)
    return "".join(_VISIBLE.get(c) or (_sign(c) if not c.isascii() else printable(c)) for c in text)


def _sign(c: str) -> str:
    hidden = unicodedata.category(c) in ("Cf", "Zs", "Zl", "Zp", "Co", "Cn") and c not in _JOINERS
    return f"‹U+{ord(c):04X}›" if hidden else str(printable(c))


def legend(paper: Paper) -> str:
    if not paper.colour:
        return "⟦trained⟧  context  ⏎ line break  → tab  · blank at an end"
    words = [
        paper.style("trained", ("trained", False)),
        paper.style("trained special token", ("trained", True)),
        "context",
        paper.style("special token", ("context", True)),
        paper.style("⏎ line break  → tab  · blank at an end", "dim"),
    ]
    return "  ".join(words)


def spans_text(spans: Iterable[Span], paper: Paper) -> str:
    out = []
    inside = False
    for span in spans:
        if span.trained != inside and not paper.colour:
            out.append("⟦" if span.trained else "⟧")
        inside = span.trained
        kind = "trained" if span.trained else "context"
        for text, shown in _shortened(span, paper.full):
            out.append(
                paper.style(visible(text), (kind, span.special)) if shown else paper.style(text, "dim")
            )
    return "".join(out).rstrip("\n") + ("⟧" if inside and not paper.colour else "")


def _shortened(span: Span, full: bool) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the span's)."""
    left_out = len(span.text) - BEGIN_CHARS - END_CHARS
    if full or left_out <= 0:
        yield span.text, True
        return
    yield span.text[:BEGIN_CHARS], True
    yield f" [... {left_out:,} characters left out, --full shows them ...] ", False
    yield span.text[-END_CHARS:], True


def sample_text(sample: Sample, title: str, total: int, what: str, paper: Paper) -> str:
    """One row or block; total: how many the set has."""
    value = "" if sample.value is None else f", value {sample.value:g}"
    lines = [
        paper.heading(f"{title}: {printable(sample.place)}"),
        paper.wrap(
            f"{what} {sample.row:,} of {total:,}, {sample.tokens:,} tokens, {sample.trained:,} trained{value}"
        ),
    ]
    shown = sample.parts if paper.full else sample.parts[:MOST_PARTS]
    for part in shown:
        lines += _part_text(part, paper)
    if len(shown) < len(sample.parts):
        lines.append(f"[... {len(sample.parts) - len(shown)} more documents, --full shows them ...]")
    return "\n".join(lines) + "\n"


def _part_text(part: Part, paper: Paper) -> list[str]:
    body = spans_text(part.spans, paper)
    if not part.title:
        return [body]
    counts = f"{part.tokens:,} tokens" + (f", {part.trained:,} trained" if part.trained else "")
    return [paper.style(f"{printable(part.title)} ({counts}):", "head"), body]


def ledger_text(ledger: Ledger, paper: Paper) -> str:
    """The ledger's table without its title, sources' names cut at their beginning where it is too wide."""
    over = max(len(line) for line in ledger.table().split("\n")) - paper.width
    if over > 0:
        room = max(12, max(len(entry.name) for entry in ledger.sources.values()) - over)
        ledger = copy.deepcopy(ledger)
        for entry in ledger.sources.values():
            entry.name = entry.name if len(entry.name) <= room else "…" + entry.name[1 - room :]
    return str(printable(ledger.table().partition("\n")[2]))


def lengths_text(look: Look, limit: int, paper: Paper) -> str:
    """A table of percentiles and a histogram."""
    series = {"tokens": look.lengths_S}
    if look.seqs_per_row == 2:
        chosen, rejected = look.trained_S.reshape(-1, 2).T
        series = {"prompt": look.prompts_S[::2], "chosen": chosen, "rejected": rejected, **series}
    elif not look.is_text:
        series = {"prompt": look.prompts_S, "trained": look.trained_S, **series}
    names = ("min", "mean", "p50", "p90", "p99", "max")
    rows = [f"{'':9}" + "".join(f"{name:>10}" for name in names)]
    for name, values in series.items():
        numbers = inspect.summary(values)
        rows.append(f"{name:9}" + "".join(f"{numbers[key]:>10,.0f}" for key in names))
    what = "document" if look.is_text else "sequence"
    title = f"tokens of a {what} (data.max_length={limit:,}; {len(look.lengths_S):,} {what}s)"
    return "\n".join([*rows, "", title, *bars(look, paper)])


def bars(look: Look, paper: Paper) -> Iterator[str]:
    """The histogram, and how many rows were left out as too long."""
    found = [(f"{a:,}" if a == b else f"{a:,} - {b:,}", n) for a, b, n in inspect.bins(look.lengths_S)]
    name_width = max(len(name) for name, _ in found)
    most, total = max(n for _, n in found), sum(n for _, n in found)
    count_width = max(len(f"{n:,}") for _, n in found)
    room = min(60, paper.width - name_width - count_width - 11)
    for name, n in found:
        eighths = max(round(8 * room * n / most), n > 0)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
        yield f"{name:>{name_width}}  {n:>{count_width},} {percent(n / total):>6}  {bar}".rstrip()
    dropped = [entry.dropped.get("over_length") for entry in look.ledger.sources.values()]
    too_long = sum(rows.rows for rows in dropped if rows is not None)
    if too_long:
        share = percent(too_long / look.ledger.read)
        yield f"{too_long:,} of {look.ledger.read:,} rows ({share}) are longer and left out"


def totals_text(look: Look, steps: Steps | None, micro_batch_tokens: int, paper: Paper) -> str:
    tokens, trained = int(look.lengths_S.sum()), int(look.trained_S.sum())
    lines = [f"{tokens:,} tokens, {trained:,} of them ({percent(trained / tokens)}) trained"]
    if look.is_text:
        lines[0] += f"; {look.num_rows:,} documents in {look.rows.num_rows:,} blocks"
    if look.seqs_per_row == 2:
        longer, decided, chosen, rejected = pair_lengths(look.trained_S)
        share = percent(longer / decided) if decided else "-"
        lines.append(
            f"the chosen answer is longer in {share} of the pairs that differ in length (mean {chosen:.0f} "
            f"against {rejected:.0f} tokens)"
        )
    if steps is not None:
        lines.append(
            f"an epoch is {steps.per_epoch:,} steps; {steps.total:,} steps are {steps.epochs:.2f} epochs, "
            f"{steps.epochs * steps.tokens_per_epoch / 1e6:,.2f} million tokens"
        )
        lines.append(
            f"micro batches of {micro_batch_tokens:,} tokens are {percent(steps.filled)} full, "
            f"{steps.micro_batches:.1f} a step and rank"
        )
        if steps.shared is not None:
            filled, micro_batches = steps.shared
            lines[-1] += (
                f"; where the prompt of a pair is computed once (train.shared_prefix), {percent(filled)} "
                f"full, {micro_batches:.1f}"
            )
    return "\n".join(paper.wrap(line, rest="  ") for line in lines)


def concern_text(concern: Concern, paper: Paper) -> str:
    head = f"[{concern.level}] "
    rest = " " * len(head)
    text = paper.wrap(str(printable(concern.text)), head, rest)
    text = paper.style(head.strip(), concern.level) + text[len(head) - 1 :]
    lines = [text]
    if concern.advice:
        lines.append(paper.wrap(concern.advice, rest + "-> ", rest + "   "))
    lines += [paper.wrap(str(printable(example)), rest, rest + "  ") for example in concern.examples]
    return "\n".join(lines)


def summary_text(concerns: Iterable[Concern], paper: Paper) -> str:
    levels = [concern.level for concern in concerns]
    warns, notes = levels.count("warn"), levels.count("note")
    if not warns + notes:
        return "nothing to warn of"
    return f"{warns} warning{'s' * (warns != 1)}, {notes} note{'s' * (notes != 1)}"


def set_text(report: Report, name: str, config: Config, paper: Paper) -> str:
    """Ledger, lengths and concerns of one set."""
    own = report.looks[name]
    steps = report.steps if name == "train" else None
    parts = [
        ledger_text(own.ledger, paper),
        lengths_text(own, config.data.max_length, paper),
        totals_text(own, steps, config.train.micro_batch_tokens, paper),
        *(concern_text(concern, paper) for concern in report.concerns[name]),
    ]
    return paper.heading(f"{printable(name)} set") + "\n" + "\n\n".join(parts) + "\n"


def report_text(report: Report, config: Config, shown: str, paper: Paper) -> Iterator[str]:
    """Everything, piece by piece; `shown`: the set of the samples. Concerns come last, to be seen."""
    own = report.looks[shown]
    if report.samples:
        yield legend(paper) + "\n"
    for i, sample in enumerate(report.samples, start=1):
        title = f"{printable(shown)} example {i} of {len(report.samples)}"
        yield sample_text(sample, title, own.rows.num_rows, "block" if own.is_text else "row", paper)
    for name in report.looks:
        yield set_text(report, name, config, paper)
    if general := report.concerns[GENERAL]:
        body = "\n\n".join(concern_text(concern, paper) for concern in general)
        yield paper.heading("the run") + "\n" + body + "\n"
    yield summary_text([c for found in report.concerns.values() for c in found], paper)
