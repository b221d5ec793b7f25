"""Where documents of plain text come from, and how they are read piece by piece.

An entry of `data.train` (a text file, a directory of files, JSONL, JSON, Parquet, a hub set) is one or more
`Source`s. `pieces` cuts them into stretches of a few megabytes that can be read on their own: a range of
bytes that begins and ends between documents, the row groups of a Parquet file, a range of rows; a packed
file is one piece. `read` streams the documents of a piece with the line that each begins at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from strop.config import DataConfig, PrepareConfig
from strop.data import adapt, intact, sources
from strop.data.ledger import BadRow
from strop.data.sources import TEXT_SUFFIXES, Row, Source
from strop.errors import UserError

KIND = "text"
"""Of the rows, for adapters."""
SUFFIXES = (*TEXT_SUFFIXES, *sources.SUFFIXES)
PIECE_BYTES = 4 * 2**20
"""A piece ends at the first document boundary after so many bytes."""
STEP_BYTES = 64 * 2**10
"""Read at a time while looking for that boundary."""
PIECE_ROWS = 20_000
"""Rows of a hub set in a piece."""
MAX_DOCUMENT_BYTES = 128 * 2**20
"""A document is held in memory as a whole, several times over; a longer one is refused."""


@dataclass(frozen=True)
class Document:
    source: str
    """Name of the file or hub set."""
    line: int
    """Where it begins there, from 1; its number where the format has no lines."""
    text: str


@dataclass(frozen=True)
class Piece:
    """A stretch of one source. Bytes for text and JSONL, row groups for Parquet, rows for hub sets."""

    source: int
    """Index into the sources."""
    begin: int
    end: int
    first_line: int
    """The line, or number of the row, that it begins with."""
    num_bytes: int
    """About; several small ones are prepared together."""


def find(entry: str, key: str, split: str, config: DataConfig) -> list[Source]:
    """The sources of one entry of `data.train` (split train) or of a validation set.

    A directory holds training.jsonl and the like, what `datasets` saved, or any files of text, which are all
    taken, in the order of their names. Raises UserError.
    """
    path = Path(entry).expanduser()
    if path.exists():
        sources.say_path(entry, key)
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{key}: {entry} has none of the endings {', '.join(SUFFIXES)}")
        return [_as_source(path, entry, key, config)]
    if not path.is_dir():
        return [sources.find_one(entry, key, split, config, KIND)]
    if (path / "offsets.npy").exists():  # else its ledgers would be taken for texts
        raise intact.damaged(path / "store.json", "missing")
    return _named(path, entry, key, split, config) or _all_files(path, entry, key, config)


def beside(entry: str, config: DataConfig) -> list[Source]:
    """The validation set that lies beside an entry of `data.train`, where there is one."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return _named(path, entry, "data.train", "validation", config, beside=True)
    found = sources.beside(entry, config, KIND)
    return [] if found is None else [found]


def _named(
    path: Path, entry: str, key: str, split: str, config: DataConfig, beside: bool = False
) -> list[Source]:
    """training.txt, training.jsonl and the like, or a set of `datasets`: one source or none."""
    files = [path / f"{stem}{suffix}" for stem in sources.FILE_NAMES[split] for suffix in TEXT_SUFFIXES]
    found = [_as_source(p, str(Path(entry) / p.name), key, config) for p in files if p.is_file()]
    source = sources.directory(path, entry, split, config, KIND, beside)
    if source is not None and (source.format != "hub" or _is_hub_set(path, entry, key)):
        found.append(source)
    if len(found) > 1:
        raise UserError(f"{entry} holds both {found[0].name} and {found[1].name}: name one of them")
    return found


def _as_source(file: Path, name: str, key: str, config: DataConfig) -> Source:
    if file.name.lower().endswith(TEXT_SUFFIXES):
        return Source(name, "text", str(file))
    return sources.as_file(file, name, key, adapt.of_path(config, KIND))


def _is_hub_set(path: Path, entry: str, key: str) -> bool:
    """Saved by `datasets`, or a copy of a hub set: not just texts with a README.md among them. UserError
    where it may be either: `datasets` would pass over the texts, and all files may be several splits."""
    if any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
        return True
    files = list(_files(path))
    data = [file for file in files if not file.name.lower().endswith(TEXT_SUFFIXES)]
    texts = [file for file in files if file not in data and file != path / "README.md"]
    if data and texts:
        marks = [mark for mark in ("README.md", "data") if (path / mark).exists()]
        raise UserError(
            f"{key}: {entry} holds {' and '.join(marks)}, as a copy of a hub set does, and beside "
            f"{data[0].relative_to(path)} texts such as {texts[0].relative_to(path)}: name the files to take "
            f"all of them, or move the texts away"
        )
    return bool(data)


def _all_files(path: Path, entry: str, key: str, config: DataConfig) -> list[Source]:
    found = [_as_source(p, str(Path(entry) / p.relative_to(path)), key, config) for p in _files(path)]
    if not found:
        raise UserError(f"{key}: {entry} holds no file that ends in {', '.join(SUFFIXES)}")
    return found


def _files(path: Path) -> Iterator[Path]:
    """All that can be read below a directory, hidden ones left out, in the order of their names."""
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and file.name.lower().endswith(SUFFIXES) and not hidden:
            yield file


def pieces(index: int, source: Source, config: PrepareConfig) -> list[Piece]:
    """The pieces of one source, in order."""
    if source.format == "parquet":
        return _row_groups(index, source)
    if source.format == "hub":
        num_rows = len(sources.load_hub(source))
        begins = range(0, num_rows, PIECE_ROWS)
        return [Piece(index, b, min(b + PIECE_ROWS, num_rows), b + 1, PIECE_BYTES) for b in begins]
    size = Path(source.path).stat().st_size
    cut = {"text": {"line": b"\n", "paragraph": b"\n\n"}.get(config.documents), "jsonl": b"\n"}
    mark = None if source.path.lower().endswith(".gz") else cut.get(source.format)
    if mark is None:
        return [Piece(index, 0, size, 1, size)]
    return list(_byte_ranges(index, source, mark))


def _byte_ranges(index: int, source: Source, mark: bytes) -> Iterator[Piece]:
    """Cut after the first `mark` that ends more than PIECE_BYTES behind the last cut."""
    begin, line = 0, 1
    with open(source.path, "rb") as file:
        while stretch := file.read(PIECE_BYTES):
            end, lines = begin + len(stretch), stretch.count(b"\n")
            tail = stretch[len(stretch) - len(mark) + 1 :]
            while more := file.read(STEP_BYTES):
                joined = tail + more
                found = joined.find(mark)
                used = found + len(mark) - len(tail) if found >= 0 else len(more)
                end, lines = end + used, lines + more.count(b"\n", 0, used)
                if found >= 0:
                    break
                tail = joined[len(joined) - len(mark) + 1 :]
            yield Piece(index, begin, end, line, end - begin)
            begin, line = end, line + lines
            file.seek(begin)


def _row_groups(index: int, source: Source) -> list[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise sources.damaged_parquet(source, 0, error) from None
    firsts = itertools.accumulate((group.num_rows for group in groups), initial=1)
    return [
        Piece(index, i, i + 1, first, group.total_byte_size)
        for i, (first, group) in enumerate(zip(firsts, groups))
    ]


def read(source: Source, piece: Piece, config: PrepareConfig) -> Iterator[Document | BadRow]:
    """The documents of a piece, in order; a BadRow for one that cannot be read."""
    if source.format == "text":
        yield from _read_text(source, piece, config.documents)
        return
    key = config.text_key if source.adapter is None else "text"
    for row in adapt.rows(_rows(source, piece), source.adapter):
        yield row if isinstance(row, BadRow) else _as_document(row, key)


def _rows(source: Source, piece: Piece) -> Iterator[Row | BadRow]:
    if source.format == "jsonl" and not source.path.lower().endswith(".gz"):
        with open(source.path, "rb") as file:
            file.seek(piece.begin)
            left, number = piece.end - piece.begin, piece.first_line
            while left > 0:
                line = file.readline()
                left -= len(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield sources.parse_line(source, number, line)
                number += 1
    elif source.format == "parquet":
        yield from sources.read_parquet(source, list(range(piece.begin, piece.end)), piece.first_line)
    elif source.format == "hub":
        rows = sources.load_hub(source).select(range(piece.begin, piece.end))
        for number, fields in enumerate(rows, start=piece.first_line):
            yield Row(source.name, number, fields)
    else:
        yield from sources.read_raw(source)


def _as_document(row: Row, key: str) -> Document | BadRow:
    text = row.fields.get(key)
    if not isinstance(text, str):
        problem = f"{key} is {json.dumps(text, default=str)[:40]}" if key in row.fields else f"no {key}"
        names = ", ".join(row.fields) or "(none)"
        message = f"{problem}, where a text is needed; it has the fields {names} (prepare.text_key names it)"
        return BadRow(row.source, row.line, "wrong_fields", message)
    return _checked(row.source, row.line, text)


def _checked(source: str, line: int, text: str) -> Document | BadRow:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    if text.isascii():
        return Document(source, line, text)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        message = f"character {error.start + 1} of the text is half a surrogate pair"
        return BadRow(source, line, "not_unicode", message)
    return _too_long(source, line, size) or Document(source, line, text)


def _too_long(source: str, line: int, size: int) -> BadRow | None:
    if size <= MAX_DOCUMENT_BYTES:
        return None
    message = (
        f"a document of {size / 2**20:,.0f} MiB, more than {MAX_DOCUMENT_BYTES // 2**20} MiB "
        "(prepare.documents=paragraph or line cuts a text file into more)"
    )
    return BadRow(source, line, "too_long", message)


def _read_text(source: Source, piece: Piece, documents: str) -> Iterator[Document | BadRow]:
    """The file as one document, or its paragraphs (between blank lines) or lines."""
    size = piece.end - piece.begin
    if documents == "file":
        yield _too_long(source.name, 1, size) or _decoded(source.name, 1, Path(source.path).read_bytes())
        return
    with open(source.path, "rb") as file:
        file.seek(piece.begin)
        left, number = size, piece.first_line
        held: list[bytes] = []
        while left > 0:
            line = file.readline()
            left -= len(line)
            if documents == "line" and line.strip():
                yield _decoded(source.name, number, line.rstrip(b"\r\n"))
            elif line.strip():
                held.append(line)
            if held and (left <= 0 or not line.strip()):
                first = number - len(held) + bool(line.strip())
                yield _decoded(source.name, first, b"".join(held).rstrip(b"\r\n"))
                held = []
            number += 1


def _decoded(source: str, line: int, content: bytes) -> Document | BadRow:
    """UTF-8, with a byte order mark or without."""
    if line == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        at, column = line + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1) + 1
        message = f"not UTF-8 (byte {column} of the line is 0x{content[error.start]:02x})"
        return BadRow(source, at, "not_utf8", message)
    return _too_long(source, line, len(content)) or Document(source, line, text)
