"""The architecture, enforced: who may import whom, where the environment is read, how long things get.

Every rule is a function from one parsed file to complaints, and each is shown to catch a violation in a
tree made up for it.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    (
        "strop",
        "strop.errors",
        "strop.aliases",
        "strop.files",
        "strop.libraries",
        "strop.packages",
        "strop.similar",
        "strop.user_code",
    ),
    (
        "strop.config",
        "strop.config_check",
        "strop.config_load",
        "strop.config_schema",
        "strop.slurm",
        "strop.obs",
    ),
    ("strop.dist", "strop.ops"),
    (
        "strop.rollout",
        "strop.data",
        "strop.models",
        "strop.parallel",
        "strop.optim",
        "strop.checkpoint",
        "strop.eval",
        "strop.serve",
    ),
    ("strop.algos",),
    (
        "strop.train",
        "strop.loop",
        "strop.references",
        "strop.setup",
        "strop.trainer",
        "strop.baseline",
        "strop.saver",
        "strop.report",
        "strop.watchdog",
        "strop.preflight",
        "strop.stragglers",
        "strop.user_metrics",
        "strop.run",
        "strop.submission",
        "strop.recipes",
        "strop.pipeline",
        "strop.doctor",
    ),
    ("tools",),
)
"""From the bottom up. A module imports from its own layer and from those below."""
WITHOUT_TORCH = 1
"""The highest layer that may not import torch."""
HOST_PYTHON = (
    *("strop.slurm", "strop.errors", "strop.aliases", "strop.files"),
    *("strop.obs.secrets", "strop.obs.log_line", "strop.obs.raw_writer", "strop.obs.raw_filter"),
)
"""What runs on the host's bare python3 3.9 (with the packages' own empty __init__)."""
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LATER_THAN_3_9 = {("dataclass", "slots"), ("dataclass", "kw_only"), ("zip", "strict")}


@dataclass(frozen=True)
class Source:
    path: Path
    module: str
    text: str
    tree: ast.Module
    modules: frozenset[str]
    """All modules of the tree, to tell `from strop import config` from a name in strop/__init__.py."""

    def at(self, node, problem):
        return f"{self.path.name}:{node.lineno}: {problem}"


def sources(root):
    files = []
    for base, folder in ((root / "src", "strop"), (root, "tools")):
        for path in sorted((base / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            files.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    modules = frozenset(module for _, module in files)
    for path, module in files:
        text = path.read_text(encoding="utf-8")
        yield Source(path, module, text, ast.parse(text), modules)


def imports(source):
    """(node, full module name) of every import, those inside functions too."""
    package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in source.modules else base


def layer(module):
    """Index of the layer; None for a module that has none."""
    found = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "strop" and module.startswith(name + "."))
    ]
    return max(found)[1] if found else None


def is_ours(module):
    return module.partition(".")[0] in ("strop", "tools")


def is_under(module, names):
    return any(module == name or module.startswith(name + ".") for name in names)


def import_direction(source):
    own = layer(source.module)
    if own is None:
        yield f"{source.path.name}:1: {source.module} has no layer in test_layers.py"
        return
    for node, name in imports(source):
        if is_ours(name):
            other = layer(name)
            if other is None or other > own:
                yield source.at(node, f"{source.module} must not import {name}, which is above it")


def no_torch_at_the_bottom(source):
    if (layer(source.module) or 0) <= WITHOUT_TORCH:
        for node, name in imports(source):
            if name.partition(".")[0] in ("torch", "transformers", "datasets"):
                yield source.at(node, f"{source.module} must not import {name}")


def host_python(source):
    if not is_under(source.module, HOST_PYTHON) and source.module != "strop":
        return
    for node, name in imports(source):
        standard = name.partition(".")[0] in sys.stdlib_module_names
        if not (standard or name == "strop" or is_under(name, HOST_PYTHON)):
            yield source.at(node, f"{source.module} runs on the host's python3 and must not import {name}")
    try:
        ast.parse(source.text, feature_version=(3, 9))
    except SyntaxError as e:
        yield f"{source.path.name}:{e.lineno}: not Python 3.9: {e.msg}"
    postponed = any(
        isinstance(n, ast.ImportFrom) and n.module == "__future__" and n.names[0].name == "annotations"
        for n in source.tree.body
    )
    for node in ast.walk(source.tree):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for inner in (n for a in annotations if a is not None for n in ast.walk(a)):
            if isinstance(inner, ast.BinOp) and not postponed:
                yield source.at(inner, "X | Y in an annotation needs `from __future__ import annotations`")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for keyword in node.keywords:
                if (node.func.id, keyword.arg) in LATER_THAN_3_9:
                    yield source.at(node, f"{node.func.id}({keyword.arg}=) is not Python 3.9")


def environment_in_one_place(source):
    if source.module == "strop.slurm.env" or not is_under(source.module, ("strop",)):
        return
    names = ("environ", "environb", "getenv", "putenv", "unsetenv")
    for node in ast.walk(source.tree):
        read = (
            isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", "") == "os"
        )
        imported = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in names for alias in node.names)
        )
        if read or imported:
            yield source.at(node, "the environment is read in strop/slurm/env.py only")


def tool_names(source):
    name = source.path.stem
    if source.module.startswith("tools.") and name in sys.stdlib_module_names:
        yield f"{source.path.name}:1: a tool must not be named like the standard module {name}"


def sizes(source):
    if is_under(source.module, ("strop.ops",)):  # kernels
        return
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path.name}:1: {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            doc_lines = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            lines = node.end_lineno - node.lineno + 1 - doc_lines
            if lines > MAX_FUNCTION_LINES:
                yield source.at(node, f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")


def fields_have_docstrings(source):
    if source.module != "strop.config":
        return
    for cls in (n for n in source.tree.body if isinstance(n, ast.ClassDef)):
        for item, following in zip(cls.body, [*cls.body[1:], None]):
            if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation).endswith("Config"):
                continue
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if not documented:
                yield source.at(item, f"{cls.name}.{item.target.id} has no docstring under it")


RULES = (
    import_direction,
    no_torch_at_the_bottom,
    host_python,
    environment_in_one_place,
    tool_names,
    sizes,
    fields_have_docstrings,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project(rule):
    assert [complaint for source in sources(ROOT) for complaint in rule(source)] == []


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60

VIOLATIONS = [
    (
        import_direction,
        "src/strop/data/a.py",
        "from strop.train import x\n",
        "strop.data.a must not import strop.train, which is above it",
    ),
    (
        import_direction,
        "src/strop/dist.py",
        "def f():\n    from strop import checkpoint\n",
        "strop.dist must not import strop.checkpoint, which is above it",
    ),
    (
        import_direction,
        "src/strop/obs/a.py",
        "from ..algos import dpo\n",
        "strop.obs.a must not import strop.algos, which is above it",
    ),
    (
        import_direction,
        "src/strop/algos/a.py",
        "import tools.x\n",
        "strop.algos.a must not import tools.x, which is above it",
    ),
    (
        import_direction,
        "src/strop/errors.py",
        "from strop.config import Config\n",
        "strop.errors must not import strop.config, which is above it",
    ),
    (import_direction, "src/strop/helpers.py", "", "strop.helpers has no layer in test_layers.py"),
    (
        no_torch_at_the_bottom,
        "src/strop/obs/a.py",
        "def f():\n    import torch.cuda\n",
        "strop.obs.a must not import torch.cuda",
    ),
    (
        no_torch_at_the_bottom,
        "src/strop/slurm/a.py",
        "from torch import nn\n",
        "strop.slurm.a must not import torch",
    ),
    (no_torch_at_the_bottom, "src/strop/config.py", "import torch\n", "strop.config must not import torch"),
    (
        host_python,
        "src/strop/slurm/a.py",
        "import yaml\n",
        "strop.slurm.a runs on the host's python3 and must not import yaml",
    ),
    (
        host_python,
        "src/strop/slurm/a.py",
        "from strop.config import load\n",
        "strop.slurm.a runs on the host's python3 and must not import strop.config",
    ),
    (
        host_python,
        "src/strop/slurm/a.py",
        "match x:\n    case 1: pass\n",
        "not Python 3.9: Pattern matching is only supported in Python 3.10 and greater",
    ),
    (
        host_python,
        "src/strop/slurm/a.py",
        "def f(x: int | None): pass\n",
        "X | Y in an annotation needs `from __future__ import annotations`",
    ),
    (host_python, "src/strop/errors.py", "zip(a, b, strict=True)\n", "zip(strict=) is not Python 3.9"),
    (
        environment_in_one_place,
        "src/strop/dist.py",
        "import os\nos.environ['A']\n",
        "the environment is read in strop/slurm/env.py only",
    ),
    (
        environment_in_one_place,
        "src/strop/slurm/a.py",
        "from os import getenv\n",
        "the environment is read in strop/slurm/env.py only",
    ),
    (tool_names, "tools/profile.py", "", "a tool must not be named like the standard module profile"),
    (sizes, "tools/a.py", "\n" * 401, "401 lines, more than 400"),
    (sizes, "src/strop/data/a.py", LONG_FUNCTION, "f has 61 lines, more than 60"),
    (
        fields_have_docstrings,
        "src/strop/config.py",
        "class A:\n    x: int = 1\n    y: int = 2\n    'Y.'\n",
        "A.x has no docstring under it",
    ),
]

FINE = [
    (import_direction, "src/strop/train.py", "from strop.algos import dpo\nimport strop.config, torch\n"),
    (import_direction, "src/strop/data/a.py", "from . import b\nfrom strop.errors import UserError\n"),
    (import_direction, "tools/a.py", "from strop.train import x\nfrom tools import b\n"),
    (no_torch_at_the_bottom, "src/strop/dist.py", "import torch\n"),
    (
        host_python,
        "src/strop/slurm/a.py",
        "from __future__ import annotations\nimport os\ndef f(x: int | None): pass\n",
    ),
    (host_python, "src/strop/obs/a.py", "import yaml\n"),
    (environment_in_one_place, "src/strop/slurm/env.py", "import os\nos.environ['A']\n"),
    (environment_in_one_place, "tools/a.py", "import os\nos.environ['A']\n"),
    (sizes, "src/strop/ops/a.py", "\n" * 401),
    (sizes, "tools/a.py", "\n" * 400),
    (sizes, "tools/a.py", LONG_FUNCTION.replace("    x = 1\n", "    '''a\n    b'''\n", 1)),
    (
        fields_have_docstrings,
        "src/strop/config.py",
        "class A:\n    x: XConfig = 1\n    y: int = 2\n    'Y.'\n",
    ),
]


def complaints(rule, root, path, text):
    for folder in ("src/strop/algos", "src/strop/data", "src/strop/slurm"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    for name in ("train", "checkpoint", "config", "errors"):
        (root / f"src/strop/{name}.py").touch()
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return [complaint for source in sources(root) for complaint in rule(source)]


@pytest.mark.parametrize(("rule", "path", "text", "expected"), VIOLATIONS)
def test_a_violation_is_caught(tmp_path, rule, path, text, expected):
    [complaint] = complaints(rule, tmp_path, path, text)
    assert complaint.startswith(Path(path).name + ":")
    assert complaint.split(": ", 1)[1] == expected


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_what_is_allowed_passes(tmp_path, rule, path, text):
    assert complaints(rule, tmp_path, path, text) == []


def test_every_rule_has_a_violation():
    assert {rule for rule, *_ in VIOLATIONS} == set(RULES)
