"""What a set holds, in a few lines of text: rows, tokens, and how long they are."""

from __future__ import annotations

import numpy as np

from strop.data.blocks import Blocks
from strop.data.sets import RowSet


def describe(rows: RowSet, limit: int) -> str:
    """Tokens and lengths of the documents (CPT) or sequences of a set; `limit`: data.max_length."""
    if isinstance(rows, Blocks):
        lengths = np.concatenate([np.diff(p.corpus.offsets[p.begin : p.end + 1]) for p in rows.parts])
        what = f"{len(lengths):,} documents, {rows.num_rows:,} blocks of {limit:,} tokens"
    else:
        lengths = np.diff(rows.offsets)
        what = f"{rows.num_rows:,} rows, {len(lengths):,} sequences"
    return f"{what}, {int(lengths.sum()):,} tokens\ntokens each: {histogram(lengths, limit)}"


def histogram(lengths: list[int] | np.ndarray, limit: int) -> str:
    """ "min 12, median 40, mean 51, p95 120, max 250 (limit 256)  ▁▃█▅▂▁": eight equal classes up to max."""
    values = np.array(lengths)
    counts, _ = np.histogram(values, bins=8, range=(0, int(values.max())))
    bars = "".join(" ▁▂▃▄▅▆▇█"[int(np.ceil(8 * n / counts.max()))] for n in counts)
    p95 = int(np.percentile(values, 95))
    return (
        f"min {values.min()}, median {int(np.median(values))}, mean {values.mean():.0f}, p95 {p95}, "
        f"max {values.max()} (limit {limit})  |{bars}|"
    )
