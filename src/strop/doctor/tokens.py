"""Tokenizer and chat template: what they do to real rows, and which tokens are trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np

from strop.config import Config
from strop.data import ends
from strop.data.ends import Ends
from strop.data.render import chat_template
from strop.data.spans import spans, special_mask
from strop.data.store import TokenisedRow
from strop.data.tokenise import load_tokenizer
from strop.doctor.checks import Checks
from strop.doctor.model import Shape
from strop.doctor.rows import Scan
from strop.errors import UserError


def load(config: Config, checks: Checks, offline: bool) -> Optional[Any]:
    """The tokenizer as the trainer loads it; None if it is not here. `offline`: jobs do not ask the hub."""
    try:
        tokenizer = load_tokenizer(config.model, only_here=True)
        template = chat_template(config.model.chat_template, tokenizer)
    except UserError as error:
        name = config.model.tokenizer or config.model.path or ""
        if Path(name).exists() or name.startswith(("/", ".")):
            checks.fail("tokenizer", str(error), "name one that has it as model.tokenizer")
        else:
            level = checks.fail if offline else checks.warn
            level("tokenizer", f"that of {name} is not in the hub cache", f"hf download {name}")
        return None
    kind = "fast" if tokenizer.is_fast else "slow: boundaries inside a token cannot be found"
    special = f"bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}"
    checks.ok("tokenizer", f"{type(tokenizer).__name__} ({kind}), {len(tokenizer):,} tokens; {special}")
    if tokenizer.pad_token is None:
        checks.ok("tokenizer", "no pad token: none is needed, masks never follow from pad ids")
    if template is None:
        checks.warn("template", "none: only rows of plain text can be used", "else set model.chat_template")
    return tokenizer


def judge(scan: Scan, tokenizer: Any, shape: Optional[Shape], checks: Checks) -> None:
    """BOS, EOS, end of turn and vocabulary, by the usable rows that were looked at."""
    sequences = [item for row in scan.examples for item in row.sequences]
    if not sequences:
        return
    if scan.templated:
        checks.ok("template", f"renders {scan.templated:,} rows looked at")
    lengths = [len(tokens) for tokens, _ in sequences]
    flat, masks = (np.concatenate(arrays) for arrays in zip(*sequences))
    offsets = np.cumsum([0, *lengths])
    seen = ends.look(flat, masks, offsets, special_mask(tokenizer), tokenizer.bos_token_id)
    _beginnings(seen, tokenizer, checks)
    if shape is None or not shape.scores:  # a reward model writes nothing, and need not learn to stop
        _endings(seen, tokenizer, checks, plain=scan.plain > 0)
    if shape is not None:
        largest = max(int(tokens.max()) for tokens, _ in sequences)
        if max(largest, len(tokenizer) - 1) < shape.vocab_size:
            checks.ok("vocabulary", f"{len(tokenizer):,} tokens fit the embedding's {shape.vocab_size:,}")
        elif largest >= shape.vocab_size:
            text = f"token {largest} is used, the embedding has {shape.vocab_size:,} rows"
            checks.fail("vocabulary", text, "tokenizer and model do not belong together")
        else:
            text = f"the tokenizer knows {len(tokenizer):,}, the embedding has {shape.vocab_size:,} rows"
            checks.warn("vocabulary", text, "a row with one of the last tokens would end the run")


def _beginnings(seen: Ends, tokenizer: Any, checks: Checks) -> None:
    if tokenizer.bos_token_id is None:
        checks.ok("bos", "the tokenizer has none")
        return
    num, at_start = len(seen.last_S), int(seen.has_bos_S.sum())
    twice = int(seen.double_bos_S.sum())
    wanted = tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    if twice:
        text = f"{twice:,} of {num:,} sequences begin with it twice"
        checks.fail("bos", text, "take it out of the rows or of the chat template")
    elif wanted and at_start < num:
        text = f"the tokenizer puts {tokenizer.bos_token!r} before a text, {num - at_start:,} lack it"
        checks.warn("bos", text, "the chat template leaves it out: compare it with the model's card")
    else:
        checks.ok("bos", f"exactly one at the beginning of {at_start:,} of {num:,} sequences")


def _endings(seen: Ends, tokenizer: Any, checks: Checks, plain: bool) -> None:
    """Without a trained end-of-turn token the model never learns to stop."""
    num, twice = len(seen.last_S), int(seen.double_end_S.sum())
    untrained = int((seen.last_S == ends.NONE).sum())
    marks = [int(token) for token in dict.fromkeys(seen.last_S.tolist()) if token != ends.NONE]
    name = "end of turn"
    if twice:
        checks.warn(name, f"{twice:,} of {num:,} sequences end with it twice", "one is too many")
    if untrained:
        checks.warn(
            name,
            f"{untrained:,} of {num:,} sequences end without a trained end-of-turn token",
            "the model would not learn to stop: let the chat template write one after the answer",
        )
    if marks:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(t)) for t in marks)
        checks.ok(name, f"{names} is trained" + (" (eos, added to plain text)" if plain else ""))
    if marks and tokenizer.eos_token_id not in marks:
        text = f"rows end with {names}, the tokenizer's eos is {tokenizer.eos_token!r}"
        checks.warn(name, text, "generation stops where generation_config.json's eos_token_id says; add it")


def preview(row: TokenisedRow, tokenizer: Any, kind: str) -> Iterable[tuple[str, list[tuple[str, bool]]]]:
    """(title, [(text, trained)]) of each sequence of a row, as the model will see it."""
    titles = ("chosen", "rejected") if kind == "preference" else ("",)
    if kind == "unpaired":
        titles = ("desirable" if row.value == 1 else "undesirable",)
    for title, (tokens, trained) in zip(titles, row.sequences):
        by_mask = itertools.groupby(spans(tokens, trained, tokenizer), key=lambda span: span.trained)
        yield title, [("".join(span.text for span in own), mask) for mask, own in by_mask]
