"""What must hold before anything is submitted, and what is written first: the stages' configurations.

A run that has begun keeps its configuration: a change is refused unless asked for, as a run itself would do
after its time in the queue; a larger `max_steps` extends it. Whoever trains a stage anew, or further, would
leave the runs that began with its former export behind: that is refused too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from strop import config as config_module
from strop import files
from strop.config import Config
from strop.errors import UserError
from strop.pipeline import graph as graph_module
from strop.pipeline import parts as parts_module
from strop.pipeline.graph import Graph
from strop.pipeline.parts import Part
from strop.pipeline.spec import Pipeline
from strop.pipeline.standing import ACTIVE, Standing
from strop.slurm import attempts


def plan(pipeline: Pipeline, executor: str, allow_change: bool) -> tuple[Graph, list[Part], set[str]]:
    """The graph with what is known of earlier calls, the parts, and the stages whose configuration is to be
    written anew. Nothing is written. UserError."""
    directory = pipeline.directory
    old = graph_module.read(directory)
    cwd = os.getcwd()
    if old is not None and old.cwd != cwd:
        raise UserError(f"{directory} was begun in {old.cwd}: relative paths mean something else in {cwd}")
    changed, extended = set(), set()
    for stage in pipeline.stages:
        if stage.config is None:
            continue
        run = pipeline.run(stage)
        kept = _kept(parts_module.config_file(pipeline, stage.name))
        if kept is None:
            if attempts.read_all(run):
                raise UserError(
                    f"{run} exists already, and not as a stage of this pipeline: give it another name"
                )
            changed.add(stage.name)
            continue
        lines = config_module.differences(kept, config_module.to_dict(stage.config))
        if kept.get("algo") != stage.algo:
            lines = [f"algo: {kept.get('algo')} -> {stage.algo}"]
        if lines and (run / "config.yaml").exists() and not allow_change:
            raise UserError(
                f"stage {stage.name}: its configuration differs from the one that {run} was begun with "
                "(--allow-config-change to go on all the same; or remove that run, or name the pipeline "
                "differently, to begin anew):\n  " + "\n  ".join(lines)
            )
        if lines or kept != config_module.to_dict(stage.config):
            changed.add(stage.name)
        if lines or _is_longer(stage.config, kept):
            extended.add(stage.name)
    found = parts_module.of(pipeline, ["run.allow_config_change=true"] if allow_change else [])
    if executor == "local":
        _count_ranks(found)
    graph = Graph(pipeline.name, directory, str(pipeline.file), cwd, executor, {})
    graph = graph_module.merged(old, graph, found)
    for node in graph.nodes.values():
        if node.run is not None and node.kind == "run":
            # A job that waits for its first attempt reads the new configuration when it begins.
            begun = bool(attempts.read_all(Path(node.run)))
            node.again = begun and (node.again or node.stage in extended)
    return graph, found, changed


def _count_ranks(found: Sequence[Part]) -> None:
    for part in found:
        try:
            if part.kind == "run":
                parts_module.local_ranks(part.slurm)
        except UserError as error:
            raise UserError(f"stage {part.stage}: {error}") from error


def _kept(file: Path) -> Optional[dict[str, Any]]:
    return yaml.safe_load(file.read_text()) if file.exists() else None


def _is_longer(new: Config, kept: Mapping[str, Any]) -> bool:
    """Whether a run that has finished is to go on."""
    steps, epochs = kept["train"]["max_steps"], kept["train"]["max_epochs"]
    if new.train.max_steps is None or steps is None:
        return new.train.max_steps != steps or new.train.max_epochs > epochs
    return new.train.max_steps > steps


def refuse_conflicts(graph: Graph, standings: Mapping[str, Standing]) -> None:
    """A stage that must run (again) although one that began with its export has trained already."""
    for node in graph.nodes.values():
        if node.kind != "run" or standings[node.name].state in ("done", *ACTIVE):
            continue
        for other in graph.nodes.values():
            if other.kind == "run" and node in graph.starts_from(other):
                assert other.run is not None
                if attempts.committed_step(Path(other.run)) is not None:
                    raise UserError(
                        f"stage {node.stage} has to train, but {other.stage} has trained from its former "
                        f"export already: remove {other.run}, or name the pipeline differently"
                    )


def refuse_running(standings: Mapping[str, Standing], everything: bool) -> None:
    """Without Slurm nothing of it may be under way (`everything`), with Slurm nothing outside of it."""
    for standing in standings.values():
        if standing.active and (everything or (standing.job_id or "").startswith("local-")):
            raise UserError(f"{standing.name} is {standing.state} (job {standing.job_id}): wait, or --cancel")


def write(pipeline: Pipeline, graph: Graph, changed: Collection[str]) -> None:
    """First what has to be done again, then the configurations that say so."""
    graph.write()
    for stage in pipeline.stages:
        if stage.config is not None and stage.name in changed:
            text = config_module.dump_yaml(stage.config)
            files.write_atomic(parts_module.config_file(pipeline, stage.name), text)
