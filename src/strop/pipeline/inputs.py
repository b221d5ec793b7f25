"""What the stages read must be there before anything is submitted, but for what earlier stages make.

Checked is what a job would look for first, by the same functions: data files and directories, models,
templates. A path inside of a run, or of a preparation's stores, that the stage hangs on is theirs to make.
Names of the hub are left to the job, which may see another cache and another network than this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Optional

from strop import config as config_module
from strop.config import KINDS, Config
from strop.data import corpus, documents, render, sources
from strop.errors import UserError
from strop.models.local import check_model
from strop.pipeline.spec import Pipeline, Stage


def check(pipeline: Pipeline, names: Collection[str]) -> None:
    """UserError that names stage, key and path of what is missing for the first of these stages."""
    read = {pipeline.stage(name).prepares or name for name in names}
    for stage in pipeline.stages:
        if stage.config is None or stage.name not in read:
            continue
        try:
            _check(pipeline, stage, stage.config)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error


def _check(pipeline: Pipeline, stage: Stage, config: Config) -> None:
    before = _before(pipeline, stage)

    def unless_made(path: Optional[str], look: Callable[[str], Any]) -> None:
        if path is None or any(_within(path, made) for name in before for made in _makes(pipeline, name)):
            return
        try:
            look(path)
        except UserError as error:
            for other in pipeline.stages:
                if other is not stage and any(_within(path, made) for made in _makes(pipeline, other.name)):
                    raise UserError(
                        f"{error}\n  stage {other.name} makes it: name it in `after` (or in `model`)"
                    ) from error
            raise

    model = config.model
    if model.path is None:
        raise UserError("model.path is not set")
    unless_made(model.path, check_model)
    unless_made(model.tokenizer, _tokenizer)
    if stage.algo in ("dpo", "kto"):
        key = f"{stage.algo}.reference"
        unless_made(getattr(config, stage.algo).reference, lambda path: check_model(path, key))
    render.chat_template(model.chat_template, None)
    render.Options.of(config, KINDS[stage.algo])
    for key, split, entry in _entries(config):
        unless_made(entry, functools.partial(_find, config, KINDS[stage.algo], key, split))


def _entries(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, split, what it names) of every file, directory or set that is read."""
    data = config.data
    if data.train is None:
        raise UserError("data.train is not set: a file, a directory, a hub name or a list of these")
    for entry in sources.names(data.train, "data.train"):
        yield "data.train", "train", entry
    for entry in sources.names(data.validation, "data.validation") if data.validation is not None else ():
        yield "data.validation", "validation", entry
    for name, entry in config.validation.watch.items():
        yield f"validation.watch.{name}", "validation", entry


def _find(config: Config, kind: str, key: str, split: str, entry: str) -> None:
    if kind != "text":
        sources.find_one(entry, key, split, config.data, kind)
    elif not corpus.is_corpus(Path(entry).expanduser()):
        documents.find(entry, key, split, config.data)


def _tokenizer(path: str) -> None:
    if sources.looks_like_path(path) and not Path(path).expanduser().is_dir():
        raise UserError(f"model.tokenizer: no such directory: {path}")


def _before(pipeline: Pipeline, stage: Stage) -> list[str]:
    """The stages that have ended when this one begins."""
    found: list[str] = []
    waiting = list(stage.after)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += pipeline.stage(name).after
    return found


def _makes(pipeline: Pipeline, name: str) -> list[Path]:
    stage = pipeline.stage(name)
    if stage.trains:
        return [pipeline.run(stage)]
    assert stage.prepares is not None
    config = pipeline.stage(stage.prepares).config
    assert config is not None
    return [config_module.cache_dir(config, pipeline.runs)]


def _within(path: str, directory: Path) -> bool:
    return Path(path).expanduser().absolute().is_relative_to(directory.absolute())
