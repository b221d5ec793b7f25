"""From rendered texts to token ids and training masks, many rows at a time.

Every text is encoded once as a whole, without the tokenizer's own special tokens: a template has written
its own, plain text gets BOS here (where the tokenizer wants one) and EOS, never a second one. The mask
says which tokens are predicted and trained. For prompt and completion it begins after ids(prompt), if
those are a prefix of ids(prompt + completion); where the tokenizer merges across the boundary, and where
several turns are trained, it follows the characters that each token covers: a token that reaches into
the completion is trained. Pad ids play no part. A text that is many times too long to be used is found out
by its beginning, since an encoding takes some 100 bytes a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from strop.config import ModelConfig
from strop.data import cut
from strop.data.fields import Refused
from strop.data.ledger import BadRow
from strop.data.render import Rendered, Text, chat_template
from strop.data.store import TokenisedRow
from strop.errors import UserError, first_line

BATCH_ROWS = 512
BATCH_CHARS = 4_000_000
"""A batch is encoded when it has so many rows or characters, which bounds the memory."""
BEGINNING_TOKENS = 256
"""More than what stands around the end of a text's beginning can be counted wrong by."""
BEGINNING_CHARS_A_TOKEN = 6
"""Few texts need more characters for a token; for one that does a longer beginning is taken."""


def load_tokenizer(config: ModelConfig, *, only_here: bool = False) -> Any:
    """The tokenizer, with the configured chat template. `only_here`: the hub is not asked. Raises UserError
    naming the key."""
    from transformers import AutoTokenizer

    name = config.tokenizer or config.path
    key = "model.tokenizer" if config.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=only_here,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer in {name!r} ({first_line(error)})") from error
    tokenizer.chat_template = chat_template(config.chat_template, tokenizer)
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Address of what a tokenizer does to text: its model and special tokens, not its chat template."""
    if tokenizer.is_fast:
        record = json.loads(tokenizer.backend_tokenizer.to_str())
        record.pop("padding"), record.pop("truncation")  # left there by the last call, not by the tokenizer
    else:
        record = tokenizer.get_vocab()
    record = {"tokenizer": record, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()


class Tokeniser:
    """Masks and limits for one tokenizer and one kind of rows."""

    def __init__(self, tokenizer: Any, max_length: int, over_length: str = "drop") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.over_length = over_length
        self.bos, self.eos = special_ids(tokenizer)

    def __call__(self, rows: Iterable[Rendered | BadRow]) -> Iterator[TokenisedRow | BadRow]:
        """The rows in their order, encoded in batches."""
        batch: list[Rendered | BadRow] = []
        chars = 0
        for row in rows:
            row = (self._far_too_long(row) or row) if isinstance(row, Rendered) else row
            batch.append(row)
            chars += sum(len(item.text) for item in row.texts) if isinstance(row, Rendered) else 0
            if len(batch) >= BATCH_ROWS or chars >= BATCH_CHARS:
                yield from self._batch(batch)
                batch, chars = [], 0
        yield from self._batch(batch)

    def _far_too_long(self, row: Rendered) -> BadRow | None:
        """The row as it is dropped, if the beginning of one of its texts has twice the tokens that it may
        have. Whatever follows could change the last word of that beginning, but never so many tokens."""
        if self.over_length not in ("drop", "error"):
            return None
        enough = 2 * self.max_length + BEGINNING_TOKENS
        for item in row.texts:
            chars = BEGINNING_CHARS_A_TOKEN * enough
            while chars < len(item.text):
                if len(encode(self.tokenizer, [item.text[:chars]])[0]) > enough:
                    message = (
                        f"{len(item.text):,} characters, more than data.max_length={self.max_length} tokens"
                    )
                    return BadRow(
                        row.source, row.line, "over_length", message, self.max_length + 1, half=row.half
                    )
                chars *= 4
        return None

    def _batch(self, rows: list[Rendered | BadRow]) -> Iterator[TokenisedRow | BadRow]:
        texts = [item for row in rows if isinstance(row, Rendered) for item in row.texts]
        masked = iter(self._masked(texts))
        for row in rows:
            if isinstance(row, BadRow):
                yield row
                continue
            sequences = [next(masked) for _ in row.texts]
            item: TokenisedRow | BadRow
            try:
                item = self._row(row, sequences)
            except Refused as refused:
                item = BadRow(row.source, row.line, refused.reason, refused.message)
            yield dataclasses.replace(item, half=True) if row.half else item

    def _masked(self, texts: list[Text]) -> list[tuple[list[int], np.ndarray | None, bool]]:
        """[(ids, trained bool [T], a token spans the boundary)]; no mask where there is no way to find it.

        A prompt is encoded once, however many completions it has. Offsets cost more than the ids do, so
        only the texts that need them are encoded with offsets.
        """
        all_ids = encode(self.tokenizer, [item.text for item in texts])
        prompts = [_prompt(item) for item in texts]
        distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        prompt_ids = dict(zip(distinct, encode(self.tokenizer, distinct)))
        masks: list[np.ndarray | None] = []
        for ids, prompt in zip(all_ids, prompts):
            before = prompt_ids[prompt] if prompt is not None else None
            holds = before is not None and ids[: len(before)] == before
            masks.append(np.arange(len(ids)) >= len(before or ()) if holds else None)
        rest = [i for i, mask in enumerate(masks) if mask is None]
        if self.tokenizer.is_fast and rest:
            for i, offsets in zip(rest, self._offsets([texts[i].text for i in rest])):
                masks[i] = _by_characters(texts[i], offsets)
        merged = {i for i in rest if prompts[i] is not None}
        return [(ids, mask, i in merged) for i, (ids, mask) in enumerate(zip(all_ids, masks))]

    def _row(
        self, row: Rendered, encoded: list[tuple[list[int], np.ndarray | None, bool]]
    ) -> TokenisedRow | BadRow:
        sequences = []
        for ids, trained, _ in encoded:
            if trained is None:
                raise Refused("boundary", "the tokenizer has no offsets to find the trained tokens by")
            sequences.append(self._finish(row, ids, trained))
        if len(sequences) == 2 and np.array_equal(sequences[0][0], sequences[1][0]):
            raise Refused("same_pair", "chosen and rejected are the same")
        if not all(trained.any() for _, trained in sequences):
            raise Refused("no_trained_token", "the completion has no token to train on")
        merged = any(merged for _, _, merged in encoded)
        longest = max(len(ids) for ids, _ in sequences)
        if longest <= self.max_length:
            return TokenisedRow(row.source, row.line, sequences, merged, row.value)
        tokens = sum(len(ids) for ids, _ in sequences)
        message = f"{longest:,} tokens, more than data.max_length={self.max_length}"
        short = None
        if self.over_length == "truncate_prompt_left":
            short = cut.prompt_left(sequences, self.max_length, self.tokenizer.bos_token_id)
            message += ", and the prompt is too short to cut that from it"
        elif self.over_length == "truncate_completion":
            short = cut.completion(sequences, self.max_length)
            message += ", and no completion is left by then"
        if short is None:
            return BadRow(row.source, row.line, "over_length", message, tokens)
        num_cut = tokens - sum(len(ids) for ids, _ in short)
        return TokenisedRow(row.source, row.line, short, merged, row.value, num_cut)

    def _finish(self, row: Rendered, ids: list[int], trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

    def _offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """The characters (begin, end) of each token of each text."""
        encodings = _backend(self.tokenizer).encode_batch(texts, add_special_tokens=False)
        return [encoding.offsets for encoding in encodings]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens, padding or truncation."""
    if not texts:
        return []
    if tokenizer.is_fast:
        return [e.ids for e in _backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, without the truncation and padding that its file or a former call left."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _prompt(item: Text) -> str | None:
    """What comes before the completion, if one completion runs to the end."""
    begin, end = item.trained[0]
    return item.text[:begin] if end == len(item.text) else None


def _by_characters(item: Text, offsets: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: tokens that reach into a trained span.

    Byte-level tokenizers may trim white space from offsets, which moves a start to the right and turns a
    token of white space into (end, end). Hence a token is judged by its end, and by its start only where
    it ends beyond the span.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    trained = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in item.trained:
        trained |= (ends > begin) & ((ends <= end) | (starts < end))
    return trained


def special_ids(tokenizer: Any) -> tuple[list[int], int | None]:
    """(ids that the tokenizer puts before a text, EOS or None), seen from what it does to one letter."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for begin in range(len(dressed) - len(plain) + 1):
        if dressed[begin : begin + len(plain)] == plain:
            return dressed[:begin], tokenizer.eos_token_id
    raise UserError("model.tokenizer encodes a text differently when it adds its special tokens")
