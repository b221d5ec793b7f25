"""pipeline.yaml -> `Pipeline`: stages in an order in which they can run, each with its configuration.

name: demo                  the stages' runs are runs/demo-cpt, runs/demo-sft, ...
dir: runs                   directory of all runs
set: {data.cache_dir: ...}  strop's keys for all stages, over their files
slurm: {partition: low}     sbatch's long options for all jobs
stages:
  texts:                    its name
    algo: prepare           or an algorithm; default: the stage's name
    prepares: cpt           (prepare) the stage whose data it makes ready; default: the one that hangs on it
  sft:
    config: configs/sft.yaml      default: configs/<algo>.yaml
    set: {train.max_steps: 40}    over the file and the common `set`
    after: [texts]                what must have succeeded before; default: the stage above
    model: cpt                    a stage, whose export it starts from, or a path or hub name; default:
                                  the export of the run that it comes after, else model.path of its file
    slurm: {nodes: 2}             over the common ones
    export: {step: best, dtype: bf16, slurm: {mem: 32G}}    step: best, latest or a number; default: best
                                                            where there is checkpoint.best_metric
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from strop import config as config_module
from strop import config_load
from strop.config import ALGOS, Config, trains_reward_model
from strop.config_load import Entry
from strop.errors import UserError
from strop.pipeline import file as pipeline_file
from strop.pipeline.file import NAME, Raw, text
from strop.similar import meant_or_known
from strop.slurm import naming

OF_PREPARE = ("algo", "after", "prepares", "slurm")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Stage:
    name: str
    algo: str
    """prepare, or one of ALGOS."""
    after: tuple[str, ...]
    slurm: dict[str, Any]
    """sbatch's options, with underscores; true: an option without a value."""
    where: str
    """Its line in the file."""
    prepares: Optional[str] = None
    source: Optional[str] = None
    """The stage whose export is its model."""
    config: Optional[Config] = None
    """None for a preparation."""
    step: str = "latest"
    dtype: Optional[str] = None
    export_slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.algo != "prepare"


@dataclass(frozen=True)
class Pipeline:
    name: str
    runs: Path
    """Directory of all runs, absolute."""
    file: Path
    stages: tuple[Stage, ...]
    """Each behind those that it hangs on."""

    @property
    def directory(self) -> Path:
        return self.runs / f"{self.name}{naming.PIPELINE_SUFFIX}"

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def run(self, stage: Stage) -> Path:
        return self.runs / f"{self.name}-{stage.name}"

    def export(self, stage: Stage) -> Path:
        name = stage.step if stage.dtype is None else f"{stage.step}-{stage.dtype}"
        return self.run(stage) / "export" / name


def load(file: Path, words: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline and the configuration of every stage. UserError names file, line and key.

    `words`: name=X, dir=X, or STAGE.KEY=VALUE for a key of a stage's strop configuration.
    """
    common, raws = pipeline_file.read(file, words)
    name = _name(common, file)
    stages = {}
    above: tuple[str, ...] = ()
    for stage, raw in raws.items():
        stages[stage] = _stage(stage, raw, common, above, raws)
        above = (stage,)
    stages = _with_sources(stages, raws)
    ordered = _in_order(stages)
    runs = naming.parent_directory(text(common, "dir") or "runs")
    pipeline = Pipeline(name, runs, file, ordered)
    return _configured(pipeline, raws, common)


def directory(file: Path, words: Sequence[str]) -> Path:
    """Where the state of a pipeline is: of its name and `dir` alone, whatever else is wrong in the file."""
    common = pipeline_file.read_top(file, words)
    runs = naming.parent_directory(text(common, "dir") or "runs")
    return runs / f"{_name(common, file)}{naming.PIPELINE_SUFFIX}"


def _name(common: Raw, file: Path) -> str:
    name = text(common, "name") or file.stem
    if not NAME.fullmatch(name):
        raise UserError(f"{common.lines.get('name', file)}: name is {name!r}; use letters, digits, _ and -")
    return name


# -------------------------------------------------------------------------------------------- stages


def _stage(name: str, raw: Raw, common: Raw, above: tuple[str, ...], raws: Mapping[str, Raw]) -> Stage:
    algo = text(raw, "algo") or name
    if algo not in ("prepare", *ALGOS):
        told = "algo" in raw.lines
        what = f"{raw.lines['algo']}: algo is {algo!r}" if told else f"{raw.where}: stage {name} has no algo"
        raise UserError(f"{what}; expected prepare, {', '.join(ALGOS)}")
    if algo == "prepare":
        for key in raw.lines:
            if key.partition(".")[0] not in OF_PREPARE:
                raise UserError(f"{raw.lines[key]}: {key}: a preparation takes these from what it prepares")
        if raw.settings:
            raise UserError(f"{raw.settings[0].where}: set: a preparation takes these from what it prepares")
    elif "prepares" in raw.values:
        raise UserError(f"{raw.lines['prepares']}: prepares belongs to a stage with algo: prepare")
    after = raw.values.get("after", list(above))
    after = [after] if isinstance(after, str) else after or []
    if not isinstance(after, list) or not all(isinstance(other, str) for other in after):
        raise UserError(f"{raw.lines['after']}: after is {after!r}, expected stages, such as [sft]")
    for key, others in (("after", after), ("prepares", [text(raw, "prepares") or name])):
        for other in others:
            if other not in raws:
                raise UserError(
                    f"{raw.lines[key]}: {key}: there is no stage {other}{meant_or_known(other, raws)}"
                )
    slurm = {k: v for k, v in {**common.slurm, **raw.slurm}.items() if v is not False}
    shared = {k: v for k, v in slurm.items() if k in ("partition", "account", "qos", "reservation")}
    export_slurm = {k: v for k, v in {**shared, **raw.export_slurm}.items() if v is not False}
    step, dtype = raw.export.get("step", ""), raw.export.get("dtype")
    known_step = isinstance(step, str) and (step in ("", "best", "latest") or step.isdecimal())
    if not known_step:
        raise UserError(f"{raw.lines['export.step']}: step is {step!r}; expected best, latest or a number")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{raw.lines['export.dtype']}: dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    return Stage(
        name,
        algo,
        tuple(dict.fromkeys(after)),
        slurm,
        raw.where,
        prepares=text(raw, "prepares"),
        step=step,
        dtype=dtype,
        export_slurm=export_slurm,
    )


def _with_sources(stages: dict[str, Stage], raws: Mapping[str, Raw]) -> dict[str, Stage]:
    """Whose export is whose model, and what prepares what."""
    _in_order(stages)  # a cycle is told before anybody walks it
    found = {}
    for name, stage in stages.items():
        changes: dict[str, Any] = {}
        model = text(raws[name], "model")
        if not stage.trains:
            changes["prepares"] = stage.prepares or _only_user(stage, stages)
            if not stages[changes["prepares"]].trains:
                raise UserError(f"{stage.where}: {name} prepares {changes['prepares']}, which trains nothing")
        elif model in stages:
            changes["source"] = model
            changes["after"] = tuple(dict.fromkeys([*stage.after, str(model)]))
        elif model is None:
            candidates = _runs_before(stage, stages)
            if len(candidates) > 1:
                names = " or ".join(candidates)
                raise UserError(f"{stage.where}: {name} comes after several runs; say model: {names}")
            changes["source"] = next(iter(candidates), None)
        source = changes.get("source")
        if source is not None and not stages[source].trains:
            raise UserError(
                f"{stage.where}: model of {name} is {source}, a preparation, which gives no model"
            )
        from_scores = source is not None and trains_reward_model(stages[source].algo)
        if from_scores and not trains_reward_model(stage.algo):
            raise UserError(
                f"{stage.where}: {name} would start from the export of {source}, a reward model, which is no "
                "language model; name another stage with after: or model:"
            )
        found[name] = Stage(**{**vars(stage), **changes})
    return found


def _only_user(stage: Stage, stages: Mapping[str, Stage]) -> str:
    users = [other.name for other in stages.values() if stage.name in other.after and other.trains]
    if len(users) != 1:
        told = f"{len(users)} runs hang on it" if users else "no run hangs on it"
        raise UserError(f"{stage.where}: {stage.name}: {told}; say prepares: STAGE")
    return users[0]


def _runs_before(stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """The runs that a stage comes after, through preparations."""
    found: list[str] = []
    for name in stage.after:
        found += [name] if stages[name].trains else _runs_before(stages[name], stages)
    return list(dict.fromkeys(found))


def _in_order(stages: Mapping[str, Stage]) -> tuple[Stage, ...]:
    """Each stage behind those that it hangs on, else as in the file. UserError for a cycle."""
    done: dict[str, Stage] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise UserError(f"{stages[name].where}: stages hang on each other in a circle: {cycle}")
        for other in stages[name].after:
            if other not in done:
                visit(other, (*path, name))
        done[name] = stages[name]

    for name in stages:
        if name not in done:
            visit(name, ())
    return tuple(done.values())


def _refuse_two_models(stage: Stage, model: Optional[str], raw: Raw) -> None:
    """Of a stage's own keys; those for all stages, and those of its file, give way to an export."""
    for entry in raw.settings:
        key = config_load.rename(entry, [], stage.algo).key
        if (key == "model.path" and (stage.source or model)) or (key == "model.revision" and stage.source):
            of = f"the export of {stage.source}" if stage.source else model
            raise UserError(
                f"{entry.where}: {entry.key}: stage {stage.name} starts from {of}; to start from another "
                "model, say model: PATH in its stage"
            )


def _configured(pipeline: Pipeline, raws: Mapping[str, Raw], common: Raw) -> Pipeline:
    """Every run's configuration, loaded as its trainer will."""
    known = {*config_load.leaves(Config), *config_load.ALIASES}
    stages: list[Stage] = []
    for stage in pipeline.stages:
        if not stage.trains:
            stages.append(stage)
            continue
        raw = raws[stage.name]
        file = text(raw, "config")
        own = [
            Entry("run.name", f"{pipeline.name}-{stage.name}", None, stage.where),
            Entry("run.dir", str(pipeline.runs), None, stage.where),
        ]
        model = text(raw, "model")
        _refuse_two_models(stage, model, raw)
        if stage.source is not None:  # it is not there yet
            model = str(pipeline.export(next(s for s in stages if s.name == stage.source)))
            own.append(Entry("model.revision", None, "null", stage.where))
        if model is not None:
            own.append(Entry("model.path", model, None, raw.lines.get("model", stage.where)))
        # What is set for all stages may be for some of them; a key that is none is told by any.
        common_to = [
            entry
            for entry in common.settings
            if config_module.is_for(entry.key, stage.algo) or entry.key not in known
        ]
        config = config_module.load(stage.algo, file, [*common_to, *raw.settings, *own])
        step = stage.step or ("best" if config.checkpoint.best_metric else "latest")
        if step == "best" and not config.checkpoint.best_metric:
            where = raw.lines["export.step"]
            raise UserError(f"{where}: step is best, which needs checkpoint.best_metric, such as eval_loss")
        stages.append(Stage(**{**vars(stage), "config": config, "step": step}))
    return Pipeline(pipeline.name, pipeline.runs, pipeline.file, tuple(stages))
