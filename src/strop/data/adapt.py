"""From the rows as a data set has them to rows with our fields, by an adapter of the table or a user's own.

An entry of `data.train` says by its name, or `data.adapter` says for all others, which adapter its rows go
through: `of_name` and `of_path` decide that once, and the answer, a `Use`, goes with the `Source`. `rows`
applies it while the rows are read: one row in, none, one or several out, all with the line that they came
from; where a row is a group of lines (a message tree), neighbours are put together first. `identity` is what
a token store must be addressed by.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strop import similar, user_code
from strop.config import DataConfig
from strop.data.adapters import TABLE, Adapter, Form, LeftOut, Made
from strop.data.fields import Refused, listed, short
from strop.data.ledger import BadRow, place
from strop.errors import UserError
from strop.obs import secrets

if TYPE_CHECKING:
    from strop.data.sources import Row

KEY = "data.adapter"
NONE = "none"
ROWS_OF = {
    "preference": "preference pairs",
    "unpaired": "answers that are called good or bad, or pairs",
    "sft": "answers to be learnt",
    "text": "text",
}
SERVED_BY = {"unpaired": "preference"}
"""Kinds that take the rows of another one."""


@dataclass(frozen=True)
class Use:
    """An adapter for one source."""

    name: str
    """In TABLE, or the dotted path of a user's function or class."""
    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    """What a user's class is made with, or what a function gets beside the row."""

    @property
    def known(self) -> Adapter | None:
        return TABLE.get(self.name)


def named(name: str) -> str | None:
    """The name in TABLE of a data set that is called by it or by its repository's name."""
    if name in TABLE:
        return name
    return next((own for own, adapter in TABLE.items() if adapter.repository.lower() == name.lower()), None)


def of_name(name: str, key: str, config: DataConfig, kind: str) -> Use | None:
    """For an entry that is no path. A short name brings its own adapter, whatever `data.adapter` says; the
    name of a repository does where that is not set."""
    _check_args(config)
    if name in TABLE:
        return _of_table(name, key, kind)
    if config.adapter is None and (own := named(name)) is not None:
        return _of_table(own, key, kind)
    return of_path(config, kind)


def of_path(config: DataConfig, kind: str) -> Use | None:
    """For files and directories: what `data.adapter` says."""
    _check_args(config)
    if config.adapter is None or config.adapter == NONE:
        return None
    if (own := named(config.adapter)) is not None:
        if config.adapter_args:
            raise UserError(
                f"data.adapter_args: {config.adapter} takes none; they are for a class of your own"
            )
        return _of_table(own, KEY, kind)
    if not user_code.is_path(config.adapter):
        hint = similar.meant_or_known(config.adapter.lower(), TABLE)
        raise UserError(
            f"{KEY}: no adapter is called {config.adapter!r}{hint} (or package.module:name, or none)"
        )
    if secrets.MARKER in str(config.adapter_args):
        raise UserError(
            f"data.adapter_args: {secrets.MARKER} stands for a secret that a run's config.yaml does not "
            "keep: give it, for example as ${oc.env:NAME}"
        )
    return Use(config.adapter, kind, dict(config.adapter_args))


def _check_args(config: DataConfig) -> None:
    if config.adapter_args and config.adapter in (None, NONE):
        raise UserError("data.adapter_args: there is no data.adapter to take them")


def _of_table(name: str, key: str, kind: str) -> Use:
    served = SERVED_BY.get(kind, kind)
    if served not in TABLE[name].forms:
        holds = " and ".join(ROWS_OF[own] for own in TABLE[name].forms)
        others = ", ".join(own for own, adapter in TABLE.items() if served in adapter.forms)
        raise UserError(
            f"{key}: {name} holds {holds}, and this algorithm needs {ROWS_OF[kind]}, as in {others}"
        )
    return Use(name, kind)


def form(use: Use | None) -> Form | None:
    """The form of a set of the table."""
    if use is None or use.known is None:
        return None
    return use.known.forms[SERVED_BY.get(use.kind, use.kind)]


def identity(use: Use | None) -> list[Any]:
    """What the adapted rows depend on beside the rows."""
    if use is None:
        return []
    if use.known is not None:
        return [use.name, use.known.version]
    return [use.name, use.args, user_code.digest(use.name, KEY)]


def rows(raw: Iterable[Row | BadRow], use: Use | None) -> Iterator[Row | BadRow]:
    """The rows of a source as the adapter makes them. UserError for what a user's code raises."""
    if use is None:
        yield from raw
        return
    make = _of_user(use) if use.known is None else _checked(use)
    group = use.known.group if use.known is not None else None
    if group is not None:
        for unit in _grouped(raw, group):
            yield from (
                [unit] if isinstance(unit, BadRow) else _made(unit[0], [row.fields for row in unit], make)
            )
        return
    for row in raw:
        yield from [row] if isinstance(row, BadRow) else _made(row, row.fields, make)


def _made(row: Row, fields: Any, make: Callable[[Any, Row], Made]) -> Iterator[Row | BadRow]:
    """`dealt_by` keeps all rows of one line on one side of `data.split`; documents of text are each dealt by
    their own text, so that equal ones land together whatever line they came from (parts.split_of)."""
    try:
        made = make(fields, row)
    except Refused as refused:
        yield BadRow(row.source, row.line, refused.reason, refused.message, dealt_by=fields)
        return
    if made is None or made == []:
        made = LeftOut("left_out")
    if isinstance(made, LeftOut):
        yield BadRow(row.source, row.line, made.reason, made.message, dealt_by=fields, wanted=True)
    elif isinstance(made, dict):
        yield dataclasses.replace(row, fields=made)
    else:
        for one in made:
            yield dataclasses.replace(row, fields=one, dealt_by=made)


def _checked(use: Use) -> Callable[[Any, Row], Made]:
    """The table's function, behind a look at the fields that it relies on."""
    chosen = form(use)
    assert chosen is not None

    def make(fields: Any, row: Row) -> Made:
        for own in fields if isinstance(fields, list) else [fields]:
            for name, types in chosen.needs.items():
                value = own.get(name)
                if isinstance(value, bool) or not isinstance(value, types):
                    raise Refused("wrong_fields", _lacking(use, name, types, own))
        return chosen.make(fields)

    return make


def _lacking(use: Use, name: str, types: tuple[type, ...], fields: dict[str, Any]) -> str:
    if fields.get(name) is not None:
        wanted = " or ".join(kind.__name__ for kind in types)
        return f"{name} is of type {type(fields[name]).__name__}, where {use.name} has {wanted}"
    return f"it lacks {name}, which the rows of {use.name} have; its fields are {listed(fields)}"


def _of_user(use: Use) -> Callable[[Any, Row], Made]:
    """A user's function, or an object of the user's class, with its errors told."""
    function: Any = user_code.load(use.name, KEY)
    args = use.args
    if inspect.isclass(function):
        try:
            function, args = function(**use.args), {}
        except Exception as error:
            raise UserError(f"{KEY}: making {use.name} failed: {user_code.told(error, use.name)}") from error
        if not callable(function):
            raise UserError(f"{KEY}: {use.name} is a class without __call__(self, row)")

    def make(fields: Any, row: Row) -> Made:
        try:
            made = function(fields, **args)
        except Refused:
            raise
        except (Exception, SystemExit) as error:
            told = user_code.told(error, use.name)
            raise UserError(f"{place(row.source, row.line)}: {use.name} failed: {told}") from error
        parts = made if isinstance(made, list) else [made]
        if not all(isinstance(part, dict) for part in parts) and not isinstance(made, (LeftOut, type(None))):
            raise UserError(
                f"{place(row.source, row.line)}: {use.name} gave {short(made)}, not fields (a dict), a list "
                "of them, or None"
            )
        return made

    return make


def _grouped(raw: Iterable[Row | BadRow], key: str) -> Iterator[list[Row] | BadRow]:
    """Neighbours with the same value. UserError for a value that comes back, whose group would be torn."""
    held: list[Row] = []
    done: set[Any] = set()
    for row in raw:
        if isinstance(row, BadRow):
            yield row
            continue
        value = row.fields.get(key)
        if not isinstance(value, str):
            lacking = f"it lacks {key}, by which rows belong together"
            yield BadRow(row.source, row.line, "wrong_fields", lacking, dealt_by=row.fields)
            continue
        if held and value != held[0].fields[key]:
            yield held
            done.add(held[0].fields[key])
            held = []
        if value in done:
            raise UserError(
                f"{place(row.source, row.line)}: {key} {value} was there before, with others between: "
                f"the rows must be sorted by {key}"
            )
        held.append(row)
    if held:
        yield held
