"""Documents made of a few words, prepared and read back, and what the ledger says of them."""

from __future__ import annotations

import random

from strop.config import Config, DataConfig, PrepareConfig
from strop.data import sets
from strop.data.corpus import Corpus
from tests.unit.data_helpers import SENTENCES, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
WORDS = " ".join(SENTENCES).split()


def text(seed: int, num: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num))


def make(
    directory,
    files,
    entries=None,
    workers=1,
    cache="cache",
    progress=lambda done, total: None,
    data=None,
    **keys,
):
    """Prepare {file name: content or rows} -> (train range read back as texts, ledger, corpus)."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            write_jsonl(path, content)
    names = [str(directory / name) for name in (entries or files)]
    config = Config(data=DataConfig(train=names, **(data or {})), prepare=PrepareConfig(**keys))
    maker = sets.Maker(config, "text", TOKENIZER, "t", directory / cache, workers, progress)
    place, ledger = maker.prepare("train")
    made = Corpus.open(place[0][0])
    docs = [made.document(i) for _, begin, end in place for i in range(begin, end)]
    assert all(ids[-1] == EOS and EOS not in ids[:-1] for ids in docs)
    return [TOKENIZER.decode(ids[:-1]) for ids in docs], ledger, made


def reasons(ledger):
    return {reason: d.rows for entry in ledger.sources.values() for reason, d in entry.dropped.items()}


def rows(texts):
    return [{"text": one} for one in texts]
