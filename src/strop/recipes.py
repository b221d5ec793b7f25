"""Jobs from Python: a recipe is a configuration that is changed by attribute and submitted by one call.

    import strop
    job = strop.recipes.dpo(model="/models/my-model", data="pairs.jsonl", nodes=2)
    job.optim.lr = 5e-7
    job.submit(partition="gpu", time="04:00:00")

What differs from the defaults is written to `<run.dir>/.recipes/`, in a file named by its content, and the
job is started with `--config` on it: exactly what a user would have typed, and still there at a requeue.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import yaml

from strop import config_load
from strop.aliases import ALIASES
from strop.config import FREE_FORM, Config, load
from strop.errors import UserError
from strop.slurm import naming

SHORTHAND = {
    "model": "model.path",
    "data": "data.train",
    "validation": "data.validation",
    "name": "run.name",
    "nodes": "cluster.nodes",
}
"""Arguments of a recipe, besides the short forms of the command line (max_steps, lr, seed, ...)."""


class Section:
    """A section of the configuration, read and set by attribute. An unknown name is an error."""

    def __init__(self, known: Mapping[str, config_load.Leaf], values: dict[str, Any], prefix: str = ""):
        object.__setattr__(self, "_known", known)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_prefix", prefix)

    _known: Mapping[str, config_load.Leaf]
    _values: dict[str, Any]
    _prefix: str

    def __getattr__(self, name: str) -> Any:
        key = self._prefix + name
        if key in config_load.sections(self._known):
            return Section(self._known, self._values, key + ".")
        if key in self._known:
            return self._values[key]
        raise AttributeError(f"unknown key {key}{config_load.meant(key, self._known)}")

    def __setattr__(self, name: str, value: Any) -> None:
        key = self._prefix + name
        text = value if isinstance(value, str) else None
        placed = config_load.place(config_load.Entry(key, value, text, "recipe"), self._known, FREE_FORM)
        self._values[key] = placed.value

    def __dir__(self) -> list[str]:
        under = (key[len(self._prefix) :] for key in self._known if key.startswith(self._prefix))
        return sorted({key.partition(".")[0] for key in under})


class Recipe:
    """One job: its algorithm and its configuration, whose sections are attributes of the recipe too."""

    def __init__(self, algo: str, settings: Mapping[str, Any]):
        self.algo = algo
        self._known = {key: leaf for key, leaf in config_load.leaves(Config).items() if key != "algo"}
        self._values = {key: copy.deepcopy(leaf.default) for key, leaf in self._known.items()}
        self.config = Section(self._known, self._values)
        for key, value in settings.items():
            *path, name = key.split(".")
            section = self.config
            for part in path:
                section = getattr(section, part)
            setattr(section, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("algo", "config") or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.config, name, value)

    def to_yaml(self) -> str:
        """What differs from the defaults."""
        tree: dict[str, Any] = {}
        for key, leaf in self._known.items():
            if self._values[key] != leaf.default:
                *path, name = key.split(".")
                target = tree
                for part in path:
                    target = target.setdefault(part, {})
                target[name] = self._values[key]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def write(self) -> Path:
        """The configuration file of this recipe, checked as `load` does. UserError for a mistake."""
        text = self.to_yaml()
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = naming.parent_directory(self.config.run.dir) / ".recipes" / f"{self.algo}-{digest}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        load(self.algo, path, [])
        return path

    def submit(self, executor: str = "slurm", wait: bool = False, dry_run: bool = False, **slurm: Any) -> Any:
        """Start the job: a `submission.Job`, or with `dry_run` the text for sbatch.

        `slurm` goes to sbatch: partition=, time=, account=, ... UserError, before anything is submitted, for
        a configuration that cannot be run.
        """
        from strop.submission import submit

        return submit(
            self.algo,
            ["--config", str(self.write())],
            nodes=self.config.cluster.nodes,
            executor=executor,
            wait=wait,
            dry_run=dry_run,
            **slurm,
        )


def _recipe(algo: str, model: Optional[str], nodes: int, shorthand: Mapping[str, Any]) -> Recipe:
    settings: dict[str, Any] = {"model.path": model, "cluster.nodes": nodes}
    short_forms = {name: alias.key for name, alias in ALIASES.items() if not alias.note}
    names = short_forms | SHORTHAND
    for name, value in shorthand.items():
        if name not in names:
            raise UserError(f"recipe: unknown argument {name}; expected one of {', '.join(sorted(names))}")
        settings[names[name]] = value
    return Recipe(algo, settings)


def dpo(model: Optional[str] = None, nodes: int = 1, **shorthand: Any) -> Recipe:
    """DPO of `model` (directory or hub name) on `nodes` nodes; e.g. data="a.jsonl", lr=5e-7, name="first".

    Further arguments are those of SHORTHAND and the short forms of the command line (max_steps, seed, ...).
    UserError for another one, or for a value of the wrong type.
    """
    return _recipe("dpo", model, nodes, shorthand)


def kto(model: Optional[str] = None, nodes: int = 1, **shorthand: Any) -> Recipe:
    """KTO of `model` on `nodes` nodes; the same arguments."""
    return _recipe("kto", model, nodes, shorthand)


def cpt(model: Optional[str] = None, nodes: int = 1, **shorthand: Any) -> Recipe:
    """Continued pretraining of `model` on `nodes` nodes; the same arguments."""
    return _recipe("cpt", model, nodes, shorthand)


def rm(model: Optional[str] = None, nodes: int = 1, **shorthand: Any) -> Recipe:
    """A reward model from `model` on `nodes` nodes; the same arguments."""
    return _recipe("rm", model, nodes, shorthand)


def sft(model: Optional[str] = None, nodes: int = 1, **shorthand: Any) -> Recipe:
    """SFT of `model` on `nodes` nodes; the same arguments."""
    return _recipe("sft", model, nodes, shorthand)
