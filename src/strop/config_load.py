"""How a configuration is read: YAML text -> entries (key, value, where it stands) -> checked -> one tree.

YAML nodes are flattened to dotted keys that remember file and line; the words of the command line become
entries of the same kind. Each entry's key is looked up in the schema (or the table of aliases) and its
value held against the field's type, so that a mistake is reported with the line that it was made in.
OmegaConf then merges the file and the command line, in this order, into the schema's defaults and resolves
`${...}`. Nothing here knows a particular key; that is `config_schema.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from strop import similar
from strop.aliases import ABSENT, ALIASES
from strop.errors import UserError, first_line

COMMAND_LINE = "command line"
INTERPOLATION = "${"
MAX_DEPTH = 100
"""Of nested YAML. What reads it calls itself for each level, and Python's stack is finite."""
NULL = "tag:yaml.org,2002:null"


class TooDeep(yaml.composer.ComposerError):
    """Other words that are no YAML may be meant as plain text; these are not."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's core types: 1e-5 is a number, yes and on are text, only true and false are booleans."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            problem = "anchors are not supported; write ${section.key} to repeat a value"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        if self.depth == MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
            raise TooDeep(None, None, problem, self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a plain name"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key_node.value in mapping:
                problem = f"{key_node.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            mapping[key_node.value] = self.construct_object(value_node, deep=deep)
        return mapping


# SafeLoader's table is shared with every other user of PyYAML: this class gets an empty one of its own.
setattr(Loader, "yaml_implicit_resolvers", {})  # noqa: B010


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
for _tag, _pattern in (
    (NULL, "~|null|Null|NULL|"),
    ("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE"),
    ("tag:yaml.org,2002:int", "[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("tag:yaml.org,2002:float", _FLOAT),
):
    Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Entry:
    """One setting as the user wrote it."""

    key: str
    """Dotted."""
    value: Any
    """As YAML reads it."""
    text: Optional[str]
    """The characters of a scalar (on the command line of a mapping too), for keys that take text:
    `revision: 1e10` is a commit, not a number."""
    where: str
    """"configs/dpo.yaml:12" or "command line"."""


@dataclass(frozen=True)
class Leaf:
    """One key of the schema."""

    hint: Any
    default: Any
    doc: str


# ---------------------------------------------------------------------------------------------- schema


def leaves(schema: type) -> dict[str, Leaf]:
    """Every key of a tree of dataclasses, dotted, in its order, with type, default and docstring."""
    docs = _docstrings(Path(inspect.getfile(schema)))
    found: dict[str, Leaf] = {}

    def walk(cls: type, prefix: str, default: Any) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            value = getattr(default, f.name)
            if dataclasses.is_dataclass(value):
                walk(type(value), f"{prefix}{f.name}.", value)
            else:
                doc = docs.get((cls.__name__, f.name), "")
                found[prefix + f.name] = Leaf(hints[f.name], value, doc)

    walk(schema, "", schema())
    return found


def _docstrings(source: Path) -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal that stands under the field."""
    docs = {}
    for cls in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for item, following in zip(cls.body, cls.body[1:]):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[cls.name, item.target.id] = " ".join(str(following.value.value).split())
    return docs


def sections(keys: typing.Iterable[str]) -> set[str]:
    """Every proper prefix of dotted keys."""
    return {key[:i] for key in keys for i, c in enumerate(key) if c == "."}


def nearest(key: str, known: Mapping[str, Leaf]) -> Optional[str]:
    """The key that was probably meant: the same name elsewhere, else the most alike in the tree."""
    candidates = {k: k for k in known} | {k: alias.key for k, alias in ALIASES.items()}
    name = key.rsplit(".", 1)[-1]
    same_name = [k for k in candidates if k.rsplit(".", 1)[-1] == name]
    if same_name:
        return candidates[max(same_name, key=lambda k: difflib.SequenceMatcher(None, key, k).ratio())]

    def likeness(k: str) -> float:
        whole = difflib.SequenceMatcher(None, key, k).ratio()
        last = difflib.SequenceMatcher(None, name, k.rsplit(".", 1)[-1]).ratio()
        return max(whole, last)

    best = max(candidates, key=likeness)
    return candidates[best] if likeness(best) >= 0.7 else None


# ------------------------------------------------------------------------------------- file and words


def read_file(path: Path, section_names: set[str]) -> list[Entry]:
    """The settings of a YAML file, in its order, each with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}{_similar_files(path)}") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise UserError(f"configuration file {path} cannot be read: {reason}") from None
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise UserError(f"configuration file {path} is empty; model.path and data.train are needed")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines at the top")
        return list(_flatten(loader, root, "", str(path), section_names))
    except yaml.YAMLError as e:
        mark, reason = getattr(e, "problem_mark", None), getattr(e, "problem", None) or first_line(e)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None


def _similar_files(path: Path) -> str:
    present = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    if close := similar.names(path.name, present):
        return similar.asked(str(path.parent / name) for name in close)
    return f"; {path.parent} has " + ", ".join(sorted(present)[:8]) if present else ""


def _flatten(
    loader: Loader, node: yaml.MappingNode, prefix: str, file: str, section_names: set[str]
) -> Iterator[Entry]:
    """Entries of a mapping. A mapping under a key that cannot be a section is that key's value."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{file}:{line}: a key must be a plain name")
        key = prefix + key_node.value
        if key in lines:
            raise UserError(f"{file}:{line}: {key} is given twice (first in line {lines[key]})")
        lines[key] = line
        is_section = key in section_names
        if is_section and isinstance(value_node, yaml.MappingNode):
            yield from _flatten(loader, value_node, key + ".", file, section_names)
        elif not (is_section and value_node.tag == NULL):  # `optim:` with all under it commented out
            yield _entry(loader, key, value_node, f"{file}:{line}")


def read_words(words: Sequence[str | Entry]) -> list[Entry]:
    """The settings of the command line: `a.b=value`, value as in YAML. Read ones come first as they are."""
    entries = [word for word in words if isinstance(word, Entry)]
    for word in (word for word in words if isinstance(word, str)):
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{COMMAND_LINE}: {word!r} is not key=value")
        try:
            loader = Loader(text)
            node = loader.get_single_node() or yaml.ScalarNode("tag:yaml.org,2002:null", "")
            # `data.prompt_template=Question: {input}` is a mapping, and text for a key that takes text
            entries.append(_entry(loader, key, node, COMMAND_LINE, text))
        except (TooDeep, yaml.reader.ReaderError) as error:
            raise UserError(f"{COMMAND_LINE}: {key} is {getattr(error, 'problem', 'no YAML text')}") from None
        except yaml.YAMLError:
            # Not YAML (`model.chat_template={% for ...`): text, which the type check refuses for other keys
            entries.append(Entry(key, text, text, COMMAND_LINE))
    return entries


def _entry(loader: Loader, key: str, node: yaml.Node, where: str, written: str | None = None) -> Entry:
    of_mapping = written if isinstance(node, yaml.MappingNode) else None
    text = node.value if isinstance(node, yaml.ScalarNode) else of_mapping
    return Entry(key, loader.construct_document(node), text, where)


# ------------------------------------------------------------------------------------ checks and merge


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: _is_number(v) and isinstance(v, int)),
    float: ("a number", _is_number),
    str: ("text", lambda v: isinstance(v, str)),
    list[float]: ("a list of numbers", lambda v: isinstance(v, list) and all(map(_is_number, v))),
    dict[str, Any]: ("a mapping", lambda v: isinstance(v, dict)),
    Any: ("text or a list of texts", lambda v: not isinstance(v, dict)),
}
"""The types that the schema uses: how a message names each, and what belongs to it."""


def fit(entry: Entry, hint: Any) -> Any:
    """The entry's value as the field's type; UserError if it is of another."""
    value, text = entry.value, entry.text
    inner, optional = _without_none(hint)
    if value is None and (optional or inner is Any):
        return None
    if inner is str and text is not None and value is not None:
        return text
    if text is not None and INTERPOLATION in text and not isinstance(value, dict):
        return text  # resolved, and checked once more, after the merge
    name, belongs = KINDS[inner]
    if not belongs(value):
        raise UserError(
            f"{entry.where}: {entry.key} is {_show(entry)}, expected {name}{' or null' if optional else ''}"
        )
    if inner is float:
        return float(value)
    return [float(v) for v in value] if inner == list[float] else value


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], True
    return hint, False


def _show(entry: Entry) -> str:
    if entry.value is None:
        return "null"
    return repr(entry.value if entry.text is None or isinstance(entry.value, dict) else entry.text)


def rename(entry: Entry, notes: list[str], algo: str) -> Entry:
    """The entry under our key, if it was written under a name of the table of aliases."""
    alias = ALIASES.get(entry.key)
    if alias is None:
        return entry
    value, text = entry.value, entry.text
    if alias.translate is not None or alias.translate_for is not None:
        try:
            value = alias.translate(value) if alias.translate else value
            value = alias.translate_for(algo, value) if alias.translate_for else value
        except ValueError as e:
            raise UserError(f"{entry.where}: {entry.key} is {_show(entry)}: {e}") from None
        if value is not entry.value:
            text = value if isinstance(value, str) else None
    if alias.note:
        note = f"{entry.key} is {alias.key} here"
        notes.append(note + (f"; {alias.remark}" if alias.remark else ""))
    return Entry(alias.key, value, text, entry.where)


def place(entry: Entry, known: Mapping[str, Leaf], free_form: str) -> Entry:
    """The entry with its value fitted to the schema; UserError for a key that the schema lacks."""
    plus, key = entry.key.startswith("+"), entry.key.lstrip("+")
    if key.startswith(free_form + "."):
        return dataclasses.replace(entry, key=key)
    if plus:
        raise UserError(
            f"{entry.where}: +{key} adds a key, which only {free_form} allows (+{free_form}.name=value)"
            + meant(key, known)
        )
    if key in known:
        return dataclasses.replace(entry, value=fit(entry, known[key].hint))
    if key in sections(known):
        raise UserError(f"{entry.where}: {key} is a section; set its keys, such as {_first_key(key, known)}")
    raise UserError(f"{entry.where}: unknown key {key}{meant(key, known)}")


def meant(key: str, known: Mapping[str, Leaf]) -> str:
    if key in ABSENT:
        return f"; {ABSENT[key]}"
    guess = nearest(key, known)
    return similar.asked([guess]) if guess else "; --help lists all keys"


def _first_key(section: str, known: Mapping[str, Leaf]) -> str:
    return next(k for k in known if k.startswith(section + "."))


def refuse_contradictions(layer: Sequence[Entry]) -> None:
    """A file that sets one key under two names must mean the same by both."""
    first: dict[str, Entry] = {}
    for entry in layer:
        other = first.setdefault(entry.key, entry)
        if other.value != entry.value:
            raise UserError(
                f"{entry.where}: {entry.key} is {_show(entry)}, but {other.where} makes it {_show(other)}"
            )


def merge(
    schema: type, known: Mapping[str, Leaf], layers: Sequence[Sequence[Entry]]
) -> tuple[Any, dict[str, str]]:
    """Defaults < layers in their order. Returns the tree and, for each key that was set, where."""
    where = {entry.key: entry.where for layer in layers for entry in layer}
    defaults = OmegaConf.structured(schema)
    for part in (defaults, *filter(OmegaConf.is_config, defaults.values())):  # frozen: omegaconf 2.3 minds
        OmegaConf.set_readonly(part, False)
    try:
        tree = OmegaConf.merge(defaults, *(_nested(layer) for layer in layers))
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as e:
        key = str(e.full_key or "")
        place_ = where.get(key.partition("[")[0], COMMAND_LINE)
        raise UserError(f"{place_}: {key}: ${{...}} cannot be resolved: {first_line(e)}") from None
    for key, place_ in where.items():
        if key in known:
            value = plain
            for part in key.split("."):
                value = value[part]
            fit(Entry(key, value, None, place_), known[key].hint)
    return OmegaConf.to_object(tree), where


def _nested(layer: Sequence[Entry]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry in layer:
        *path, name = entry.key.split(".")
        target = tree
        for part in path:
            target = target.setdefault(part, {})
        target[name] = entry.value
    return tree
