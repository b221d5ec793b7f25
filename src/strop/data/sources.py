"""From what the configuration names to a stream of raw rows.

`data.train` names a file (JSONL, JSON, Parquet; .gz for the first two), a directory with training.jsonl
and the like, a directory that `datasets` saved, a hub set, the short name of one (adapters.py), or a list of
these. `find` turns the names into `Source`s, `read` streams (source, line number, fields) out of one, with
the fields that its adapter makes, where it has one; `digest` is the address of its content.
A line that cannot be read is passed on as a `BadRow`; what makes a whole source unusable is an error.
`in_split` deals rows out to train, validation and test by a hash of their content, so that equal rows land
on the same side, whatever file they are in.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop import similar
from strop.config import DataConfig
from strop.data import adapt, hub
from strop.data.ledger import BadRow
from strop.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")
"""Plain text, for continued pretraining only."""
FILE_NAMES = {"train": ("training", "train"), "validation": ("validation",), "test": ("test",)}
READ_ROWS = 1000
"""Rows of a Parquet file or a hub set in memory at a time."""


@dataclass(frozen=True)
class Source:
    name: str
    """As the messages call it: the path, or hub name and split."""
    format: str
    """jsonl, json, parquet, or hub (whatever `datasets` loads)."""
    path: str
    """Of the file or saved directory; the name of a hub set."""
    subset: str | None = None
    """Hub sets: configuration name."""
    split: str | None = None
    """Hub sets: the split there."""
    adapter: adapt.Use | None = None
    """What makes our fields of its rows."""


@dataclass(frozen=True)
class Row:
    source: str
    line: int
    """From 1; the number of the row where the format has no lines."""
    fields: dict[str, Any]
    dealt_by: Any = None
    """Where one line was made into several rows: all of them, which `data.split` keeps together; not text."""


def find(config: DataConfig, split: str, kind: str) -> list[Source]:
    """The sources of `train` or `validation`; none where the configuration has no validation set.

    kind: preference, sft or text, what an adapter is to make of the rows.
    """
    check_split(config)
    check_adapter(config)
    if split == "train" or config.split is not None:
        if config.train is None:
            raise UserError("data.train is not set: a file, a directory, a hub name or a list of these")
        key = "data.train"
        return [find_one(name, key, "train", config, kind) for name in names(config.train, key)]
    if config.validation is not None:
        key = "data.validation"
        return [find_one(name, key, "validation", config, kind) for name in names(config.validation, key)]
    found = [beside(name, config, kind) for name in names(config.train, "data.train")]
    return [source for source in found if source is not None]


def check_adapter(config: DataConfig) -> None:
    """UserError for a `data.adapter` that no entry of data.train would go through."""
    entries = config.train if isinstance(config.train, (list, tuple)) else [config.train]
    short = [entry for entry in entries if entry in adapt.TABLE and not Path(entry).exists()]
    if config.adapter is not None and config.train is not None and len(short) == len(entries):
        repository = adapt.TABLE[short[0]].repository
        raise UserError(
            f"data.adapter: {short[0]} brings its own adapter, so {config.adapter} would have nothing to do; "
            f"name the set {repository} to have it read by another one"
        )


def check_split(config: DataConfig) -> None:
    """UserError for a data.split that is no shares, or that data.validation contradicts."""
    if config.split is None:
        return
    shares(config.split)
    if config.validation is not None:
        raise UserError(
            "data.split and data.validation are both given: the validation set is one or the other"
        )


def names(value: Any, key: str) -> list[str]:
    names = value if isinstance(value, (list, tuple)) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key}: a path, a hub name or a list of these, not {value!r}")
    return list(names)


def find_one(name: str, key: str, split: str, config: DataConfig, kind: str) -> Source:
    path = Path(name).expanduser()
    if path.exists():
        say_path(name, key)
    if path.is_file():
        return as_file(path, name, key, adapt.of_path(config, kind))
    if path.is_dir():
        source = directory(path, name, split, config, kind)
        if source is None:
            raise UserError(
                f"{key}: {name} has none of {', '.join(_wanted(split))}\n  it holds: {_listing(path)}"
            )
        return source
    if looks_like_path(name):
        raise UserError(f"{key}: no such file or directory: {name}{_nearest(path)}")
    use = adapt.of_name(name, key, config, kind)
    repository = adapt.TABLE[name].repository if name in adapt.TABLE else name
    return _hub(repository, repository, split, config, use)


@functools.cache
def say_path(name: str, key: str) -> None:
    """Once, of a path here that is called as a known set is."""
    if name in adapt.TABLE:
        log.info("%s: %s is taken from here, where something has this name, and not from the hub", key, name)


def beside(name: str, config: DataConfig, kind: str) -> Source | None:
    """The validation set that lies beside a training set, where there is one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return directory(path, name, "validation", config, kind, beside=True)
    if path.exists() or looks_like_path(name):
        return None
    if _split_of(config, "validation", adapt.of_name(name, "data.train", config, kind)) is None:
        return None
    return find_one(name, "data.train", "validation", config, kind)


def as_file(path: Path, name: str, key: str, use: adapt.Use | None = None) -> Source:
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return Source(name, suffix.split(".")[1], str(path), adapter=use)
    raise UserError(f"{key}: {name} has none of the endings {', '.join(SUFFIXES)}")


def directory(
    path: Path, name: str, split: str, config: DataConfig, kind: str, beside: bool = False
) -> Source | None:
    """training.jsonl and the like by name, else what `datasets` saved or a copy of a hub set. beside: for
    validation, of a directory that is named for training."""
    wanted = _wanted(split)
    found = [entry for entry in path.iterdir() if entry.name.lower() in wanted and entry.is_file()]
    found.sort(key=lambda entry: (wanted.index(entry.name.lower()), entry.name))
    if len(found) > 1:
        raise UserError(f"{name} holds both {found[0].name} and {found[1].name}: name one of them")
    use = adapt.of_path(config, kind)
    if found:
        return as_file(found[0], str(Path(name) / found[0].name), name, use)
    if not any((path / mark).exists() for mark in ("dataset_dict.json", "state.json", "data", "README.md")):
        return None
    if (path / "state.json").exists():
        key = "hub_split" if split == "train" else "hub_validation_split"
        hub.check_saved(path, name, f"data.{key}", getattr(config, key), beside)
        return None if beside else Source(f"{name}:{split}", "hub", str(path), adapter=use)
    if split == "validation" and config.hub_validation_split is None:
        wanted_split = _split_of(config, split, use)
        if wanted_split is None or wanted_split not in hub.splits(path, _subset(config, use)):
            return None
    return _hub(name, str(path), split, config, use)


def _wanted(split: str) -> list[str]:
    return [stem + suffix for stem in FILE_NAMES[split] for suffix in SUFFIXES]


def _hub(name: str, path: str, split: str, config: DataConfig, use: adapt.Use | None) -> Source:
    """What `datasets` loads from the hub or a directory; subset and split as set, else by the adapter."""
    subset, own_split = _subset(config, use), _split_of(config, split, use)
    if own_split is None:
        raise UserError(
            f"data.hub_validation_split is not set: which split of {name} is for validation? "
            "(data.split makes one)"
        )
    full = f"{name}{'/' + subset if subset else ''}:{own_split}"
    return Source(full, "hub", path, subset, own_split, use)


def _subset(config: DataConfig, use: adapt.Use | None) -> str | None:
    return config.hub_subset or (use.known.subset if use is not None and use.known is not None else None)


def _split_of(config: DataConfig, split: str, use: adapt.Use | None) -> str | None:
    form = adapt.form(use)
    if split == "train":
        return config.hub_split or (form.train if form is not None else "train")
    return config.hub_validation_split or (form.validation if form is not None else None)


def looks_like_path(name: str) -> bool:
    """A hub name is `name` or `owner/name`; it has no data ending and no directory here starts it."""
    parts = name.split("/")
    return (
        name.lower().endswith((*SUFFIXES, *TEXT_SUFFIXES))
        or len(parts) > 2
        or parts[0] in ("", ".", "..", "~")
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def _nearest(path: Path) -> str:
    """Names like the missing one, in the deepest directory of its path that exists."""
    parent, missing = path.parent, path.name
    while not parent.is_dir():
        parent, missing = parent.parent, parent.name
    close = similar.names(missing, (entry.name for entry in parent.iterdir()))
    return similar.asked(str(parent / name) for name in close) or f"\n  {parent} holds: {_listing(parent)}"


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "nothing"


def digest(source: Source) -> str:
    """Hex digest of what the source holds: the bytes of a file, the fingerprint of a hub set."""
    if source.format == "hub":
        return str(load_hub(source)._fingerprint)
    with open(source.path, "rb") as file:
        hasher = hashlib.blake2b(digest_size=32)
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def read(source: Source) -> Iterator[Row | BadRow]:
    """Stream the rows of a source, as its adapter makes them. UserError if it has none or is damaged as a
    whole."""
    return adapt.rows(read_raw(source), source.adapter)


def read_raw(source: Source) -> Iterator[Row | BadRow]:
    """The rows as they are there."""
    readers = {"jsonl": _read_jsonl, "json": _read_json, "parquet": read_parquet, "hub": _read_hub}
    empty = True
    for row in readers[source.format](source):
        empty = False
        yield row
    if empty:
        raise UserError(f"{source.name}: the data set is empty")


def _open(source: Source) -> Any:
    """The bytes of a file, unpacked where it is a .gz."""
    return gzip.open(source.path) if source.path.lower().endswith(".gz") else open(source.path, "rb")


def _read_jsonl(source: Source) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with _open(source) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield parse_line(source, number, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source.name}: damaged gzip data after line {number} ({error})") from None


def parse_line(source: Source, number: int, line: bytes) -> Row | BadRow:
    try:
        value = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
        return BadRow(source.name, number, "not_utf8", message)
    except json.JSONDecodeError as error:
        return BadRow(source.name, number, "not_json", f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of 4,300 digits, brackets without end
        return BadRow(source.name, number, "not_json", f"not readable JSON: {error}")
    return _as_row(source, number, value)


def _as_row(source: Source, number: int, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(source.name, number, value)
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    message = f"{names.get(type(value), 'a number')}, not an object of fields"
    return BadRow(source.name, number, "not_an_object", message)


def _read_json(source: Source) -> Iterator[Row | BadRow]:
    """A list of objects; a .json file that does not begin with `[` holds one object a line, as often."""
    try:
        with _open(source) as file:
            text = file.read().decode("utf-8-sig")
        if not text.lstrip().startswith("["):
            yield from _read_jsonl(source)
            return
        rows = _list_of(source, text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source.name}: damaged gzip data ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source.name}: not UTF-8 at byte {error.start + 1}") from None
    for number, value in enumerate(rows, start=1):
        yield _as_row(source, number, value)


def _list_of(source: Source, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source.name}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # as in `parse_line`
        raise UserError(f"{source.name}: not readable JSON: {error}") from None


def read_parquet(source: Source, groups: list[int] | None = None, first: int = 1) -> Iterator[Row | BadRow]:
    """groups: row groups, all if None; first: the number of their first row."""
    import pyarrow
    import pyarrow.parquet

    number = first - 1
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=groups):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(source.name, number, fields)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise damaged_parquet(source, number, error) from None


def damaged_parquet(source: Source, row: int, error: Exception) -> Exception:
    """What to raise for an error of its reader: itself, where it is the disk's fault and not the file's."""
    if getattr(error, "errno", None):
        return error
    return UserError(f"{source.name}: damaged Parquet after row {row} ({error})")


def _read_hub(source: Source) -> Iterator[Row | BadRow]:
    number = 0
    for batch in load_hub(source).iter(batch_size=READ_ROWS):
        for values in zip(*batch.values()):
            number += 1
            yield Row(source.name, number, dict(zip(batch.keys(), values)))


def load_hub(source: Source) -> Any:
    """A `datasets.Dataset`: saved with save_to_disk, a local copy of a hub set, or from the hub."""
    return hub.load(source.name, source.path, source.subset, source.split)


def shares(split: str) -> tuple[float, float, float]:
    """ "98,1,1" -> shares of train, validation and test that add up to 1."""
    try:
        parts = [float(part) for part in str(split).split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts) or parts[0] == 0:
        raise UserError(f"data.split: three shares such as 98,1,1 (train, validation, test), not {split!r}")
    return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)


def elsewhere(row: Row | BadRow, config: DataConfig, split: str) -> bool:
    """Whether `data.split` gives the row to another set; what could not be read is told of every set."""
    if config.split is None or (isinstance(row, BadRow) and row.dealt_by is None):
        return False
    return in_split(row, config.split) != split


def in_split(row: Row | BadRow, split: str) -> str:
    """train, validation or test: decided by the row's content alone."""
    fields = row.fields if isinstance(row, Row) and row.dealt_by is None else row.dealt_by
    content = json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)
    word = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    point = int.from_bytes(word, "big") / 2**64
    train, validation, _ = shares(split)
    if point < train:
        return "train"
    return "validation" if point < train + validation else "test"
