"""From rendered texts to token ids and training masks, many rows at a time.

Every text is encoded once as a whole, without the tokenizer's own special tokens: a template has written
its own, plain text gets BOS here (where the tokenizer wants one) and EOS, never a second one. The mask
says which tokens are predicted and trained. For prompt and completion it begins after ids(prompt), if
those are a prefix of ids(prompt + completion); where the tokenizer merges across the boundary, and where
several turns are trained, it follows the characters that each token covers: a token that reaches into
the completion is trained. Pad ids play no part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from strop.data.ledger import BadRow
from strop.data.render import Refused, Rendered, Text
from strop.data.store import TokenisedRow
from strop.errors import UserError

BATCH_ROWS = 512
BATCH_CHARS = 4_000_000
"""A batch is encoded when it has so many rows or characters, which bounds the memory."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Address of what a tokenizer does to text: its model and special tokens, not its chat template."""
    if tokenizer.is_fast:
        record = json.loads(tokenizer.backend_tokenizer.to_str())
        record.pop("padding"), record.pop("truncation")  # left there by the last call, not by the tokenizer
    else:
        record = tokenizer.get_vocab()
    record = {"tokenizer": record, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    ends: list[int] | None
    """[T] characters of the text up to the end of each token; None from a tokenizer without offsets."""
    starts: list[int] | None


class Tokeniser:
    """Masks and limits for one tokenizer and one kind of rows."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.bos, self.eos = _special_ids(tokenizer)

    def __call__(self, rows: Iterable[Rendered | BadRow]) -> Iterator[TokenisedRow | BadRow]:
        """The rows in their order, encoded in batches."""
        batch: list[Rendered | BadRow] = []
        chars = 0
        for row in rows:
            batch.append(row)
            chars += sum(len(item.text) for item in row.texts) if isinstance(row, Rendered) else 0
            if len(batch) >= BATCH_ROWS or chars >= BATCH_CHARS:
                yield from self._batch(batch)
                batch, chars = [], 0
        yield from self._batch(batch)

    def _batch(self, rows: list[Rendered | BadRow]) -> Iterator[TokenisedRow | BadRow]:
        texts = [item for row in rows if isinstance(row, Rendered) for item in row.texts]
        encoded = iter(zip(self._encode([item.text for item in texts]), self._prompts(texts)))
        for row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield self._row(row, [next(encoded) for _ in row.texts])
            except Refused as refused:
                yield BadRow(row.source, row.line, refused.reason, refused.message)

    def _row(self, row: Rendered, encoded: list[tuple[Encoded, list[int] | None]]) -> TokenisedRow | BadRow:
        sequences, merged_boundary = [], False
        for item, (full, prompt) in zip(row.texts, encoded):
            if prompt is not None and full.ids[: len(prompt)] == prompt:
                trained = np.arange(len(full.ids)) >= len(prompt)
            else:
                merged_boundary |= prompt is not None
                trained = self._by_characters(item, full)
            sequences.append(self._finish(row, item, full.ids, trained))
        if len(sequences) == 2 and np.array_equal(sequences[0][0], sequences[1][0]):
            return BadRow(row.source, row.line, "same_pair", "chosen and rejected are the same")
        if not all(trained.any() for _, trained in sequences):
            return BadRow(row.source, row.line, "no_trained_token", "the completion has no token to train on")
        longest = max(len(ids) for ids, _ in sequences)
        if longest > self.max_length:
            message = f"{longest:,} tokens, more than data.max_length={self.max_length}"
            return BadRow(row.source, row.line, "over_length", message, sum(len(ids) for ids, _ in sequences))
        return TokenisedRow(row.source, row.line, sequences, merged_boundary)

    def _finish(
        self, row: Rendered, item: Text, ids: list[int], trained: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Plain text gets the BOS and EOS it lacks; the first token is never trained."""
        tokens = np.array(ids, dtype=np.int32)
        if not row.templated:
            if self.eos is None:
                raise UserError(
                    "model.tokenizer has no EOS token, so a completion of plain text has no end; use messages"
                )
            if self.bos and ids[: len(self.bos)] != self.bos:
                tokens = np.concatenate([np.array(self.bos, dtype=np.int32), tokens])
                trained = np.concatenate([np.zeros(len(self.bos), dtype=np.bool_), trained])
            if not ids or ids[-1] != self.eos:
                tokens = np.append(tokens, np.int32(self.eos))
                trained = np.append(trained, True)
        trained[:1] = False
        return tokens, trained

    def _by_characters(self, item: Text, full: Encoded) -> np.ndarray:
        """bool [T]: tokens that reach into a trained span.

        Byte-level tokenizers may trim white space from offsets, which moves a start to the right and
        turns a token of white space into (end, end). Hence a token is judged by its end, and by its start
        only where it ends beyond the span.
        """
        if full.ends is None or full.starts is None:
            raise Refused("boundary", "the tokenizer has no offsets to find the trained tokens by")
        starts, ends = np.array(full.starts), np.array(full.ends)
        trained = np.zeros(len(full.ids), dtype=np.bool_)
        for begin, end in item.trained:
            trained |= (ends > begin) & ((ends <= end) | (starts < end))
        return trained

    def _prompts(self, texts: list[Text]) -> list[list[int] | None]:
        """ids(prompt) of each text that is a prompt and one completion; a shared prompt is encoded once."""
        prompts = [self._prompt(item) for item in texts]
        distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        ids = {prompt: encoded.ids for prompt, encoded in zip(distinct, self._encode(distinct))}
        return [None if prompt is None else ids[prompt] for prompt in prompts]

    def _prompt(self, item: Text) -> str | None:
        begin, end = item.trained[0]
        return item.text[:begin] if end == len(item.text) else None

    def _encode(self, texts: list[str]) -> list[Encoded]:
        """Without special tokens, padding or truncation."""
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        output = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=fast,
            verbose=False,
        )
        if not fast:
            return [Encoded(ids, None, None) for ids in output["input_ids"]]
        return [
            Encoded(ids, [end for _, end in offsets], [start for start, _ in offsets])
            for ids, offsets in zip(output["input_ids"], output["offset_mapping"])
        ]


def _special_ids(tokenizer: Any) -> tuple[list[int], int | None]:
    """(ids that the tokenizer puts before a text, EOS or None), seen from what it does to one letter."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for begin in range(len(dressed) - len(plain) + 1):
        if dressed[begin : begin + len(plain)] == plain:
            return dressed[:begin], tokenizer.eos_token_id
    raise UserError("model.tokenizer encodes a text differently when it adds its special tokens")
