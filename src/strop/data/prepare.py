"""Raw sources to a token store: once per run, by one process, kept by content.

sources -> rows of this split -> rendered -> tokenised -> counted in the ledger -> written aside, renamed.
The store's directory is named by everything that decides what is in it. So a second run with the same
data finds it, a changed file or setting never does, and two processes that prepare the same thing at once
end with one of two equal results. Ranks open it by its path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from strop.config import Config, DataConfig
from strop.data import adapt, sources
from strop.data.ledger import BadRow, Ledger, refuse_or_keep
from strop.data.render import Options, Rendered, Renderer, chat_template
from strop.data.sources import Source
from strop.data.store import FORMAT, TokenisedRow, TokenStore
from strop.data.tokenise import Tokeniser
from strop.errors import STORAGE_ERRNOS, StorageError

PIPELINE = 3
"""Raise it when the same row would be tokenised or masked in another way than before."""


def has_validation(config: DataConfig, kind: str) -> bool:
    """Whether the configuration names a validation set, or one lies beside the training set."""
    if config.split is not None:
        return sources.shares(config.split)[1] > 0
    return bool(sources.find(config, "validation", kind))


def prepare(
    config: Config,
    tokenizer: Any,
    tokenizer_digest: str,
    cache_dir: Path | str,
    kind: str,
    split: str = "train",
    progress: Callable[[int], None] = lambda rows_done: None,
) -> tuple[TokenStore, Ledger]:
    """The token store and ledger of one set: found in the cache, else made.

    kind: preference, unpaired or sft. split: train or validation (see `has_validation`). tokenizer: a
    transformers tokenizer. progress is called with the number of rows done, now and then.
    Raises UserError (key, file or row named; nothing is left behind) and StorageError.
    """
    found = sources.find(config.data, split, kind)
    template = chat_template(config.model.chat_template, tokenizer)
    options = Options.of(config, kind)
    digest = _digest(config, found, tokenizer_digest, template, options, kind, split)
    path = Path(cache_dir) / f"{kind}-{split}-{digest[:24]}"
    if not (path / "store.json").exists():
        ledger = Ledger(split)
        tokeniser = Tokeniser(tokenizer, config.data.max_length, config.data.over_length)
        rows = tokeniser(rendered(config, tokenizer, kind, split, ledger))
        try:
            TokenStore.write(
                path,
                _counted(rows, config.data, ledger, progress),
                kind=kind,
                digest=digest,
                finish=lambda aside: ledger.save(aside / "ledger.json"),
            )
        except OSError as error:
            if error.errno in STORAGE_ERRNOS:
                raise StorageError(error.errno, f"{error.strerror} (data.cache_dir)", str(path)) from error
            if not (path / "store.json").exists():  # else a twin was faster, and has removed our half of it
                raise
    for rubble in path.parent.glob(f"{path.name}.tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(rubble, ignore_errors=True)
    ledger = Ledger.load(path / "ledger.json")
    ledger.check(config.data.max_dropped_fraction)
    return TokenStore.open(path), ledger


def _digest(
    config: Config,
    found: list[Source],
    tokenizer_digest: str,
    template: str | None,
    options: Options,
    kind: str,
    split: str,
) -> str:
    """Address of the store's content, of the ledger, and so of the names of the sources too."""
    record = {
        "format": [FORMAT, PIPELINE],
        "kind": kind,
        "sources": [[source.name, sources.digest(source)] for source in found],
        "split": [split, config.data.split] if config.data.split is not None else split,
        "tokenizer": tokenizer_digest,
        "template": template,
        "max_length": config.data.max_length,
        "over_length": config.data.over_length,
        "on_bad_row": config.data.on_bad_row,
        "options": dataclasses.asdict(options),
    }
    if any(source.adapter is not None for source in found):
        record["adapters"] = [adapt.identity(source.adapter) for source in found]
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()


def rendered(
    config: Config, tokenizer: Any, kind: str, split: str, ledger: Ledger
) -> Iterator[Rendered | BadRow]:
    """The rows of all sources that belong to this split, as texts; the ledger gets those of other splits."""
    template = chat_template(config.model.chat_template, tokenizer)
    renderer = Renderer(kind, tokenizer, template, Options.of(config, kind))
    for source in sources.find(config.data, split, kind):
        for row in sources.read(source):
            if sources.elsewhere(row, config.data, split):
                ledger.of(source.name).other_split += 1
            else:
                yield from [row] if isinstance(row, BadRow) else renderer.rows(row)


def _counted(
    rows: Iterator[TokenisedRow | BadRow],
    config: DataConfig,
    ledger: Ledger,
    progress: Callable[[int], None],
) -> Iterator[TokenisedRow]:
    """The usable rows; the others meet the policies. Raises at the end if too many were left out."""
    for done, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            refuse_or_keep(row, config)
            ledger.drop(row)
        else:
            ledger.use(row, config.over_length)
            yield row
        if done % 1000 == 0:
            progress(done)
    ledger.check(config.max_dropped_fraction)
