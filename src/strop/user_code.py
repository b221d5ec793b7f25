"""A user's own function or class, named in the configuration as `package.module:name` (or with a dot).

Modules are found where Python finds them, and in the working directory. What is made with such code is kept
under the digest of its source, so that a changed function never serves what the old one made. An exception
in it is the user's error: the message shows its own line.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from strop import similar
from strop.errors import UserError, first_line


def is_path(name: str) -> bool:
    """Whether the name means a module's attribute rather than something of ours."""
    module, _, attribute = _parts(name)
    return bool(attribute) and all(
        part.isidentifier() for part in [*module.split("."), *attribute.split(".")]
    )


def _parts(name: str) -> tuple[str, str, str]:
    return name.partition(":") if ":" in name else name.rpartition(".")


def load(name: str, key: str) -> Callable[..., Any]:
    """What `name` stands for. UserError naming `key` if it cannot be imported or is not to be called."""
    module_name, _, attribute = _parts(name)
    if not is_path(name):
        raise UserError(f"{key}: {name!r} is not package.module:name")
    module = _import(module_name, name, key)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = similar.meant(part, dir(found))
            raise UserError(f"{key}: {module_name} ({module.__file__}) has no {attribute}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}: {name} is {type(found).__name__}, not a function or a class")
    return found


def _import(module_name: str, name: str, key: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{key}: importing {module_name} failed: {told(error, name)}") from error
        raise UserError(
            f"{key}: there is no module {error.name}, neither in {here} nor among the installed ones"
        ) from None
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may leave
        raise UserError(f"{key}: importing {module_name} failed: {told(error, name)}") from error


def digest(name: str, key: str) -> str:
    """Address of the source of the module, and of those beside it or below that it has names from."""
    load(name, key)
    hasher = hashlib.blake2b(digest_size=16)
    for path in _source_files(sys.modules[_parts(name)[0]]):
        content = path.read_bytes()
        hasher.update(f"{path.name} {len(content)}\n".encode() + content)
    return hasher.hexdigest()


def _source_files(module: ModuleType) -> list[Path]:
    """Of the module, and of the modules that it has names from or imports, also within a function only, as
    far as they lie in the folder that it was found in (for a module in a package: that beside the outermost
    package too); installed ones and strop itself do not count."""
    if not module.__file__:
        return []
    path = Path(module.__file__).resolve()
    depth = module.__name__.count(".") + (path.name == "__init__.py")
    root = path.parents[depth]
    found: dict[Path, None] = {}
    waiting = [(module.__name__, path)]
    while waiting:
        name, path = waiting.pop()
        inside = path.is_file() and root in path.parents and "site-packages" not in path.parts
        if not inside or path in found or name.partition(".")[0] == "strop":
            continue
        found[path] = None
        for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
            other = value if isinstance(value, ModuleType) else sys.modules.get(_home(value))
            if other is not None and getattr(other, "__file__", None):
                waiting.append((other.__name__, Path(other.__file__ or "").resolve()))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [
            (imported, file) for imported in _imported(path, package) for file in _files_of(imported, root)
        ]
    return sorted(found)


def _imported(path: Path, package: str) -> set[str]:
    """Full names of what a source file imports anywhere in it; `from a import b` may mean the module a.b. Of
    a.b.c, a and a.b are imported, too."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # no Python: nothing can be imported by it, and its content counts
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            home = ".".join([*above, *filter(None, [node.module])])
            names |= {home} | {f"{home}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name]
    return {".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)}


def _files_of(name: str, root: Path) -> list[Path]:
    """Where a module would lie below the folder that the user's one was found in."""
    place = root.joinpath(*name.split("."))
    return [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]


def _home(value: Any) -> str:
    """Name of the module that a function or class was defined in."""
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""


def told(error: BaseException, name: str) -> str:
    """The exception and the deepest line of the user's own module that it came through."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError):
        return f"{text}\n  {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    module = sys.modules.get(_parts(name)[0])
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if module is not None and f.filename == module.__file__]
    outside = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    shown = (own or outside)[-1:]
    return text + "".join(f"\n  {f.filename}:{f.lineno}, in {f.name}: {f.line or ''}" for f in shown)
