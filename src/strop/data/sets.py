"""The sets of a run (train, validation, and those watched beside): prepared once, then opened by every rank.

`prepare` gives, for each set, where it lies: the directory of a token store (rows of SFT and DPO), or ranges
of documents in corpora (text). Rank 0 does it at the start of a run, `tools.prepare` beforehand; both find
what is there already, since stores are named by their content. Only `open_set` is left to the other ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

from strop.config import Config, DataConfig
from strop.config_check import REFERENCE_FREE
from strop.data import corpus, documents, intact, noise, plan, prepare_text, sources
from strop.data.blocks import Blocks
from strop.data.corpus import Corpus, Range
from strop.data.ledger import Ledger
from strop.data.prepare import has_validation as rows_have_validation
from strop.data.prepare import prepare as prepare_rows
from strop.data.sources import Source
from strop.data.store import TokenStore
from strop.errors import UserError

Place = Union[str, list[tuple[str, int, int]]]
"""Of a set: a store's directory, or [(corpus's directory, first document, behind the last)]."""
RowSet = Union[TokenStore, Blocks]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Maker:
    """What prepares the sets of one configuration. kind: text, preference, unpaired or sft."""

    config: Config
    kind: str
    tokenizer: Any
    tokenizer_digest: str
    cache_dir: Path
    workers: int = 1
    progress: Progress = lambda done, total: None

    def names(self) -> list[str]:
        """train, validation where there is one, and the names of `validation.watch`."""
        c = self.config
        if c.validation.watch and _has_reference(c):
            algo = c.algo.upper() + (f" with dpo.loss={c.dpo.loss}" if c.algo == "dpo" else "")
            raise UserError(
                f"validation.watch: not for {algo}, which would need reference log-probs of each set"
            )
        if self.kind == "text":
            beside = any(documents.beside(entry, c.data) for entry in _entries(c.data.train, "data.train"))
            validates = c.data.validation is not None or beside or self._share_of_validation() > 0
            validates = validates or bool(_ranges(self.stores(), "validation"))
        else:
            sources.find(c.data, "train", self.kind)  # a missing file is named before what it leads to
            validates = rows_have_validation(c.data, self.kind)
            for name, path in c.validation.watch.items():
                sources.find_one(path, f"validation.watch.{name}", "validation", c.data, self.kind)
        return ["train", *(["validation"] if validates else []), *c.validation.watch]

    def prepare(self, name: str) -> tuple[Place, Ledger]:
        """Where the set lies, and what became of its rows. UserError, StorageError as the makers below, and
        UserError for a store in which something else was written since it was made."""
        if self.kind == "text":
            place, ledger = self._text(name)
            ledger.check(self.config.data.max_dropped_fraction, wanted=noise.REASONS)
        else:
            place, ledger = self._rows(name)
        for path in directories(place):
            intact.check_seal(Path(path))
        return place, ledger

    def _rows(self, name: str) -> tuple[Place, Ledger]:
        config, split = self.config, name
        if name in config.validation.watch:
            data = dataclasses.replace(config.data, validation=config.validation.watch[name], split=None)
            config, split = dataclasses.replace(config, data=data), "validation"
        store, ledger = prepare_rows(
            config,
            self.tokenizer,
            self.tokenizer_digest,
            self.cache_dir,
            self.kind,
            split,
            lambda rows: self.progress(rows, 0),
        )
        ledger.split = name
        if name == "train" and config.data.weights is not None:
            _check_parts(store, config)
        return str(store.path), ledger

    def text_sources(self, name: str) -> tuple[dict[str, list[Source]], bool]:
        """(entry -> its sources, without stores; whether they are the training set's, of which `data.split`
        may give this set a part) of a set of text."""
        data, watch = self.config.data, self.config.validation.watch
        if name in watch:
            key = f"validation.watch.{name}"
            return {watch[name]: documents.find(watch[name], key, "validation", data)}, False
        if name == "validation" and data.validation is not None:
            key = "data.validation"
            return {
                e: documents.find(e, key, "validation", data) for e in _entries(data.validation, key)
            }, False
        entries = data_train(data)
        if name == "validation" and data.split is None:
            found = {entry: own for entry in entries if (own := documents.beside(entry, data))}
            if found:
                return found, False
        raw = [entry for entry in entries if not corpus.is_corpus(Path(entry).expanduser())]
        return {entry: documents.find(entry, "data.train", "train", data) for entry in raw}, True

    def _text(self, name: str) -> tuple[Place, Ledger]:
        found, shared = self.text_sources(name)
        if not shared:
            made = self._make(found, None, name)
            return _place([(made, r) for r in made.ranges]), _ledger(name, [(made, "train")])
        stores = self.stores()
        if found:
            stores |= dict.fromkeys(found, self._make(found, self.config.data.split, "train"))
        ordered = {entry: stores[entry] for entry in data_train(self.config.data)}
        ranges = _ranges(ordered, name)
        if name == "train" and self.config.data.weights is not None:
            lacking = [entry for entry in ordered if not any(e == entry for e, _, _ in ranges)]
            if lacking:
                raise UserError(
                    f"data.train: no document of {lacking[0]} is left, which data.weights counts on"
                )
        makers = [(made, name) for made in dict.fromkeys(ordered.values())]
        return _place([(made, r) for _, made, r in ranges]), _ledger(name, makers)

    def _make(self, found: dict[str, list[Source]], split: str | None, label: str) -> Corpus:
        return prepare_text.prepare(
            self.config,
            found,
            self.tokenizer,
            self.tokenizer_digest,
            self.cache_dir,
            split,
            self.workers,
            self.progress,
            label,
        )

    def stores(self) -> dict[str, Corpus]:
        """The entries of data.train that `tools.prepare` has made, opened and checked."""
        stores = {}
        for entry in data_train(self.config.data):
            if corpus.is_corpus(Path(entry).expanduser()):
                stores[entry] = Corpus.open(Path(entry).expanduser())
                theirs, ours = stores[entry].tokenizer, self.tokenizer_digest
                if theirs != ours:
                    model = self.config.model.tokenizer or self.config.model.path
                    raise UserError(
                        f"data.train: {entry} was prepared with another tokenizer (digest {theirs[:12]}) "
                        f"than that of {model} ({ours[:12]}): prepare it again with this one "
                        "(tools.prepare), or set model.tokenizer"
                    )
        return stores

    def _share_of_validation(self) -> float:
        split = self.config.data.split
        return sources.shares(split)[1] if split is not None else 0.0


def directories(place: Place) -> list[str]:
    """The stores of a set."""
    return [place] if isinstance(place, str) else list(dict.fromkeys(path for path, _, _ in place))


def content(place: Place) -> str:
    """Address of what a set holds: the same tokens in the same order have the same, wherever they lie."""
    if isinstance(place, str):
        return intact.content(Path(place))
    what = repr([(intact.content(Path(path)), begin, end) for path, begin, end in place])
    return hashlib.sha256(what.encode()).hexdigest()


def _has_reference(config: Config) -> bool:
    return config.algo == "kto" or (config.algo == "dpo" and config.dpo.loss not in REFERENCE_FREE)


def data_train(data: DataConfig) -> list[str]:
    """The entries of data.train; UserError as `sources.check_split` and `check_adapter`."""
    sources.check_split(data)
    sources.check_adapter(data)
    return _entries(data.train, "data.train")


def _entries(value: Any, key: str) -> list[str]:
    entries = sources.names(value, key)
    twice = [entry for entry in entries if entries.count(entry) > 1]
    if twice:
        raise UserError(f"{key} names {twice[0]} twice")
    return entries


def _ranges(stores: dict[str, Corpus], split: str) -> list[tuple[str, Corpus, Range]]:
    """[(entry, corpus, its documents of that set)]; a ready-made store is one range, whatever is in it."""
    out = []
    for entry, made in stores.items():
        own = [r for r in made.ranges if r.split == split]
        if own and corpus.is_corpus(Path(entry).expanduser()):
            own = [Range(split, entry, own[0].begin, own[-1].end)]
        out += [(entry, made, r) for r in own if r.entry == entry]
    return out


def _place(ranges: list[tuple[Corpus, Range]]) -> Place:
    return [(str(made.path), r.begin, r.end) for made, r in ranges]


def _ledger(name: str, made: list[tuple[Corpus, str]]) -> Ledger:
    """The ledgers of several corpora as one. Two may have an entry of the same name."""
    ledger = Ledger(name)
    for one, split in made:
        if split != "train" and not any(r.split == split for r in one.ranges):
            continue
        for entry in Ledger.load(one.path / f"ledger-{split}.json").sources.values():
            own = f"{one.path}: {entry.name}" if entry.name in ledger.sources else entry.name
            ledger.sources[own] = dataclasses.replace(entry, name=own)
    return ledger


def _check_parts(store: TokenStore, config: Config) -> None:
    """UserError unless every entry of data.train has rows of its own in the store, as data.weights needs."""
    found = [source.name for source in sources.find(config.data, "train", store.kind)]
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"data.train names {name} twice; data.weights can give one entry more")
        if name not in store.sources:
            raise UserError(f"data.train: no row of {name} is left, which data.weights counts on")


def open_set(place: Place, config: Config, name: str) -> RowSet:
    """What `Maker.prepare` gave, opened. UserError for a blend that leaves a source out."""
    rows: RowSet
    if isinstance(place, str):
        rows = TokenStore.open(place)
    else:
        ranges = [(path, begin, end) for path, begin, end in place]
        rows = Blocks.open(ranges, config.data.max_length, config.cpt.cross_documents)
    weights = config.data.weights if name == "train" else None
    if weights is not None and 0 in (counts := plan.blend_counts(rows.part_rows, weights)):
        what = "row" if isinstance(place, str) else "block"
        raise UserError(
            f"data.weights: {weights[counts.index(0)]} of an epoch of {rows.num_rows:,} {what}s is less than "
            f"one {what}: raise it, or take more data"
        )
    return rows
