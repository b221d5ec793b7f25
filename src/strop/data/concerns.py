"""What in a set deserves a second look, and what to do about it: the warnings of tools.look_at_data.

A concern is a warning (training would go wrong, or learn what nobody meant) or a note (it may be meant).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strop.config import Config, trains_reward_model
from strop.data import labels, noise, repeats
from strop.data.inspect import Look
from strop.data.ledger import BadRow, Ledger, place
from strop.data.render import Renderer, chat_template
from strop.data.sources import Row
from strop.data.store import TokenStore
from strop.data.tokenise import special_ids

BIASED = 0.65
"""Chosen answers that are longer (or shorter) than rejected ones so often are told by their length."""
FEW = 20
"""Fewer rows say nothing about a tendency."""
OUTLIER = 8
"""A sequence so many times as long as the 99th percentile stands out."""
COMMON = 8
"""A beginning of so many tokens that all sequences share is a prompt of the template or of the data."""
EXAMPLES = 3
ADVICE = {
    "same_pair": "such a pair teaches nothing: take it out, or see why the answers are equal",
    "over_length": "data.max_length is the key to raise",
    "no_trained_token": "there is no answer to learn: take the rows out",
    "empty": "there is no answer to learn: take the rows out",
    "template": "change the rows, or the template (model.chat_template)",
}


@dataclass(frozen=True)
class Concern:
    level: str
    """warn or note."""
    name: str
    """A constant, for programs."""
    text: str
    advice: str = ""
    count: int = 0
    share: float = 0.0
    """Of the set's rows."""
    examples: list[str] = field(default_factory=list)
    """Places of the first rows."""


def of_set(look: Look, config: Config, tokenizer: Any, templated: bool) -> list[Concern]:
    """templated: the rows went through a chat template."""
    out = [*_dropped(look.ledger, config), *_boundaries(look)]
    out += [*_beginnings(look, tokenizer, templated), *_endings(look, tokenizer), *_content(look, templated)]
    if not look.is_text:
        out += _prompts(look, config, tokenizer)
    if look.seqs_per_row == 2:
        out += _length_bias(look)
    if look.name == "train" and isinstance(look.rows, TokenStore) and look.rows.kind == "unpaired":
        out += _labels(look.rows, config)
    if look.name == "train" and isinstance(look.rows, TokenStore) and trains_reward_model(config.algo):
        out += _margins(look, look.rows)
    out += _repeated(look)
    return out


def _margins(look: Look, store: TokenStore) -> list[Concern]:
    """Pairs that allow the rejected answer the higher score."""
    rows = np.flatnonzero(store.values_R < 0)
    if not len(rows):
        return []
    text = "have a negative margin: their rejected answer may score higher, by as much"
    advice = "exchange chosen and rejected if these are the wrong way round, else leave the margin out"
    return [_concern(look, "warn", "negative_margin", text, advice, count=len(rows), rows=rows[:3].tolist())]


def _labels(store: TokenStore, config: Config) -> list[Concern]:
    """Too many desirable or undesirable rows, as the trainer will say it."""
    num_good = int((store.values_R == 1).sum())
    num_bad = store.num_rows - num_good
    line = labels.imbalance(num_good, num_bad, config.kto)
    few = min(num_good, num_bad)
    share = few / store.num_rows
    return [Concern("warn", "label_imbalance", line, count=few, share=share)] if line else []


def _concern(
    look: Look,
    level: str,
    name: str,
    text: str,
    advice: str = "",
    *,
    count: int,
    rows: Iterable[int] = (),
) -> Concern:
    """`text` follows "12 of 340 rows (3.5%) "."""
    share = count / look.num_rows
    head = f"{count:,} of {look.num_rows:,} {unit(look)} ({percent(share)}) "
    examples = [place(*look.place(row)) for row in rows]
    return Concern(level, name, head + text, advice, count, share, examples)


def unit(look: Look) -> str:
    return "documents" if look.is_text else "rows"


def percent(share: float) -> str:
    """0.03%, 4.0%, 37%: two digits that tell."""
    value = 100 * share
    if value >= 10 or value == 0:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if value >= 0.1 else f"{value:.1g}%"


def _dropped(ledger: Ledger, config: Config) -> list[Concern]:
    """Rows left out, by reason; not those that filters were asked to leave out."""
    out = []
    reasons = {reason for entry in ledger.sources.values() for reason in entry.dropped}
    for reason in sorted(reasons - set(noise.REASONS)):
        sources = ledger.sources.values()
        entries = [(entry.name, entry.dropped[reason]) for entry in sources if reason in entry.dropped]
        count = sum(rows.rows for _, rows in entries)
        examples = [
            f"{place(name, int(example['line']))}: {example['message']}"
            for name, rows in entries
            for example in rows.examples
        ]
        share = count / ledger.read
        text = f"{count:,} of {ledger.read:,} rows ({percent(share)}) are left out: {reason}"
        advice = ADVICE.get(reason, "correct them, or data.on_bad_row=skip leaves them out")
        meant = all(rows.wanted for _, rows in entries)  # by an adapter
        expected = meant or (reason == "over_length" and share <= config.data.max_dropped_fraction)
        level, advice = "note" if expected else "warn", "" if meant else advice
        out.append(Concern(level, reason, text, advice, count, share, examples[:3]))
    return out


def _boundaries(look: Look) -> list[Concern]:
    merged = sum(entry.merged_boundary for entry in look.ledger.sources.values())
    if not merged:
        return []
    text = "have a prompt whose tokens are no prefix of prompt + completion: a token spans the boundary"
    advice = "it is trained; end the prompts where a token ends (without a blank at the end)"
    return [_concern(look, "warn", "merged_boundary", text, advice, count=merged)]


def _beginnings(look: Look, tokenizer: Any, templated: bool) -> list[Concern]:
    out = []
    twice, without = look.found["double_bos"], look.found["no_bos"]
    bos = tokenizer.bos_token
    if twice.count:
        text = f"begin with BOS ({bos!r}) twice"
        advice = "take it out of the rows or of the chat template (model.chat_template)"
        out.append(_concern(look, "warn", "double_bos", text, advice, count=twice.count, rows=twice.examples))
    wanted = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in special_ids(tokenizer)[0]
    if wanted and without.count and not look.is_text:
        text = f"begin without BOS ({bos!r}), which the tokenizer puts before a text"
        advice = "the chat template leaves it out: compare it with the model's card" if templated else ""
        out.append(_concern(look, "warn", "no_bos", text, advice, count=without.count, rows=without.examples))
    return out


def _endings(look: Look, tokenizer: Any) -> list[Concern]:
    out = []
    without, twice = look.found["no_end"], look.found["double_end"]
    if without.count:
        text = "end without a trained EOS or end-of-turn token"
        advice = "the model would not learn to stop: let the chat template write one after the answer"
        if look.is_text:
            advice = "documents would run into each other: prepare the store again"
        out.append(
            _concern(look, "warn", "missing_eos", text, advice, count=without.count, rows=without.examples)
        )
    if twice.count:
        text, advice = "end with EOS or end of turn twice", "take one out of the rows or of the template"
        out.append(_concern(look, "warn", "double_eos", text, advice, count=twice.count, rows=twice.examples))
    if look.ends and tokenizer.eos_token_id not in look.ends:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in look.ends)
        text = f"sequences end with {names}, the tokenizer's EOS is {tokenizer.eos_token!r}"
        advice = "generation stops at eos_token_id of generation_config.json: add it there"
        out.append(Concern("note", "end_is_not_eos", text, advice))
    return out


def _content(look: Look, templated: bool) -> list[Concern]:
    out = []
    told = {
        "unknown": ("hold tokens that the tokenizer does not know", "look at their characters"),
        "empty_completion": (
            "have a completion without a visible character",
            "the model would learn to answer nothing: take them out",
        ),
    }
    if not templated:
        told["special_inside"] = (
            "hold special tokens in the midst of their text",
            "text that spells a special token becomes one: take it out, unless it is meant",
        )
    if look.is_text:  # blank documents are left out by the filters, and no document has a completion
        del told["empty_completion"]
    for name, (text, advice) in told.items():
        found = look.found[name]
        if found.count:
            out.append(_concern(look, "warn", name, text, advice, count=found.count, rows=found.examples))
    return out


def _prompts(look: Look, config: Config, tokenizer: Any) -> list[Concern]:
    """No prompt at all, the same beginning everywhere, sequences that stand out."""
    out = []
    bare = np.flatnonzero(look.prompts_S[:: look.seqs_per_row] <= 1)
    if len(bare) and config.sft.train_on != "everything":
        text = "have a prompt of one token or none"
        advice = "the model learns to say this to everything"
        out.append(_concern(look, "warn", "no_prompt", text, advice, count=len(bare), rows=bare[:3].tolist()))
    if len(look.common) >= COMMON and look.num_rows >= FEW and look.name == "train":
        begin = tokenizer.decode(look.common, skip_special_tokens=False)
        text = f"all sequences begin with the same {len(look.common)} tokens: {short(begin)}"
        advice = "prompt the trained model with them too"
        out.append(Concern("note", "common_prompt", text, advice, look.num_rows, 1.0))
    limit = OUTLIER * float(np.percentile(look.lengths_S, 99))
    far = np.unique(np.flatnonzero(look.lengths_S > limit) // look.seqs_per_row)
    if len(far):
        text = f"are longer than {OUTLIER} times the 99th percentile ({limit:,.0f} tokens)"
        out.append(
            _concern(look, "note", "outliers", text, "look at them", count=len(far), rows=far[:3].tolist())
        )
    return out


def short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:90] + " ... " + text[-25:])


def _length_bias(look: Look) -> list[Concern]:
    longer, decided, chosen, rejected = pair_lengths(look.trained_S)
    if decided < FEW or max(longer, decided - longer) < BIASED * decided:
        return []
    which, count = ("longer", longer) if 2 * longer > decided else ("shorter", decided - longer)
    text = (
        f"have a chosen answer {which} than the rejected one (mean {chosen:.0f} against {rejected:.0f} "
        "tokens)"
    )
    advice = (
        "length alone tells which is better, and the model will learn it: balance the pairs, or take a loss "
        "that averages over tokens (dpo.loss=sigmoid_norm)"
    )
    return [_concern(look, "warn", "length_bias", text, advice, count=count)]


def pair_lengths(trained_S: np.ndarray) -> tuple[int, int, float, float]:
    """(pairs with a longer chosen answer, pairs of unequal lengths, mean tokens of chosen, of rejected)."""
    chosen, rejected = trained_S.reshape(-1, 2).T
    longer, decided = int((chosen > rejected).sum()), int((chosen != rejected).sum())
    return longer, decided, float(chosen.mean()), float(rejected.mean())


def _repeated(look: Look) -> list[Concern]:
    out = []
    rows, prompts = repeats.within(look.contents)
    if rows.count:
        advice = "they weigh twice: take them out"
        if look.is_text:
            advice += " (prepare.exact_duplicates=true)"
        out.append(_twice(look, look, "warn", "duplicates", "are equal to an earlier one", advice, rows))
    if prompts.count:
        text = "have the prompt of an earlier one and another completion"
        advice = "as it should be where questions have several answers"
        out.append(_twice(look, look, "note", "repeated_prompts", text, advice, prompts))
    return out


def leaks(train: Look, other: Look) -> list[Concern]:
    """What the training set gives away of another one."""
    rows, prompts = repeats.leakage(train.contents, other.contents)
    out = []
    if rows.count:
        text = f"of {other.name} are in the training set, too"
        advice = "its metrics would praise what was learned by heart: take them out of one set"
        out.append(_twice(other, train, "warn", "leakage", text, advice, rows))
    if prompts.count:
        text = f"of {other.name} have a prompt of the training set, with another completion"
        advice = "split by prompt, so that all answers to a question are on one side"
        out.append(_twice(other, train, "warn", "leaked_prompts", text, advice, prompts))
    return out


def _twice(
    look: Look, first: Look, level: str, name: str, text: str, advice: str, found: repeats.Repeats
) -> Concern:
    base = _concern(look, level, name, text, advice, count=found.count)
    for a, b in found.pairs(EXAMPLES):
        base.examples.append(f"{place(*look.place(a))} = {place(*first.place(b))}")
    return base


def of_template(config: Config, tokenizer: Any) -> list[Concern]:
    """Whether what opens an assistant's turn is prompt or trained, seen from a conversation made up."""
    template = chat_template(config.model.chat_template, tokenizer)
    if template is None or config.sft.train_on == "everything":
        return []
    turns = [("user", "Question?"), ("assistant", "Answer.")]
    row = Row("template", 1, {"messages": [{"role": role, "content": text} for role, text in turns]})
    rendered = Renderer("sft", tokenizer, template)(row)
    if isinstance(rendered, BadRow):
        return []  # it wants conversations of another kind; the real rows tell
    text, begin = rendered.texts[0].text, rendered.texts[0].trained[0][0]
    opening = text[begin : text.find("Answer.", begin)]
    if not opening:
        return []
    told = f"the template's generation prompt lacks {opening!r}, which is trained before each answer"
    advice = "generate with the same generation prompt, or let the template write it there"
    return [Concern("warn", "trained_header", told, advice)]


def of_policies(problems: Sequence[tuple[str, str]]) -> list[Concern]:
    """[(set, the error that training would end with)]."""
    return [
        Concern("warn", "training_stops", f"training would stop at the {name} set: {text}")
        for name, text in problems
    ]
