"""The first documents of each source through the trainer's own filters and encoder; blocks by arithmetic."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Optional

import numpy as np

from strop.config import Config
from strop.data import documents, noise, parts
from strop.data.corpus import Corpus
from strop.data.documents import Piece
from strop.data.encode import TextEncoder
from strop.data.ledger import BadRow, Ledger
from strop.data.sets import Maker
from strop.data.sources import Source
from strop.data.store import TokenisedRow
from strop.doctor.rows import Scan, num_rows


def scan(config: Config, maker: Maker, tokenizer: Any, split: str, limit: Optional[int]) -> Scan:
    """Look at `limit` documents of each source (None: all) and of each store. UserError as the trainer's."""
    result = Scan(split, Ledger(split))
    found, shared = maker.text_sources(split)
    encoder, filters = TextEncoder(tokenizer), noise.build(config.prepare)
    part = config.data.split if shared else None
    tokens = 0.0
    for entry, own in found.items():
        for source in own:
            tokens += _look(config, entry, source, part, encoder, filters, limit, result)
    if shared:
        for entry, made in maker.stores().items():
            tokens += _look_into(entry, made, split, limit, result)
    length = config.data.max_length
    result.blocks = -(-round(tokens) // (length - 1))
    result.row_tokens = [min(length, round(tokens))] if tokens else []
    return result


def _look(
    config: Config,
    entry: str,
    source: Source,
    part: Optional[str],
    encoder: TextEncoder,
    filters: list[noise.Filter],
    limit: Optional[int],
    result: Scan,
) -> float:
    """The tokens of a source, estimated from its first documents."""
    pieces = documents.pieces(0, source, config.prepare)
    read = itertools.chain.from_iterable(documents.read(source, p, config.prepare) for p in pieces)
    taken = last = size = tokens = 0
    for item in itertools.islice(read, limit):
        taken, last = taken + 1, item.line
        if isinstance(item, BadRow):
            result.ledger.drop(item)
            continue
        size += len(item.text.encode())
        noisy = next((told for check in filters if (told := check(item.text))), None)
        if noisy is not None:
            result.ledger.drop(BadRow(entry, item.line, *noisy))
        elif _split(item.text, part) != result.split and part is not None:
            result.ledger.of(entry).other_split += 1
        else:
            [ids] = encoder([item.text])
            tokens += len(ids)
            result.add(TokenisedRow(source.name, item.line, [(ids, np.arange(len(ids)) > 0)]))
    total = _num_documents(source, pieces, taken, last, size) if taken == limit else taken
    result.total_rows += total
    result.exact = result.exact and total == taken
    result.complete = result.complete and total == taken
    return tokens * total / taken if taken else 0.0


def _split(text: str, part: Optional[str]) -> str:
    return parts.SPLITS[int(parts.split_of(parts.hash_array([text]), part)[0])]


def _num_documents(source: Source, pieces: list[Piece], taken: int, last_line: int, size: int) -> int:
    """Of a whole source; text files by the size of the documents looked at."""
    if source.format == "text":
        return max(taken, round(taken * Path(source.path).stat().st_size / max(size, 1)))
    if source.format == "hub":
        return pieces[-1].end
    return num_rows(source, taken, last_line)[0]


def _look_into(entry: str, made: Corpus, split: str, limit: Optional[int], result: Scan) -> int:
    """The tokens of a store that is ready, which needs no estimate."""
    own = [r for r in made.ranges if r.split == split]
    rows = [row for r in own for row in range(r.begin, r.end)]
    for row in rows[:limit]:
        ids = made.document(row)
        result.add(TokenisedRow(entry, made.row_id(row)[1], [(ids, np.arange(len(ids)) > 0)]))
    result.total_rows += len(rows)
    result.complete = result.complete and limit is None
    return sum(int(made.offsets[r.end] - made.offsets[r.begin]) for r in own)
