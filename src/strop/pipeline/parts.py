"""A stage is one job or two: a preparation; or a run, and the export of its model behind it.

Each part says which template (or body, without Slurm) runs it, with which words and options, what must have
succeeded before, and which file or directory tells that it is done. The words name the configuration that is
kept in the pipeline's directory, so that nobody's editing changes a job that waits in the queue.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.pipeline.spec import Pipeline, Stage
from strop.slurm import code

SBATCH = code.REPOSITORY / "sbatch"
TOOLS = {"prepare": "tools.prepare", "convert": "tools.convert_dcp_to_hf"}
"""What the templates that are not an algorithm's run."""


@dataclass(frozen=True)
class Part:
    name: str
    """The stage's, with .export behind it for an export; "." is in no stage's name."""
    stage: str
    kind: str
    """prepare, run or export."""
    after: tuple[str, ...]
    """Parts."""
    template: str
    """sbatch/<template>.sh."""
    args: tuple[str, ...]
    slurm: dict[str, Any]
    result: Path
    """prepare: the record of its stores; run: the run's directory; export: the model's directory."""
    step: str = ""
    """export: which checkpoint."""
    run: Optional[Path] = None
    """run and export."""
    once: tuple[str, ...] = ()
    """Words behind `args` for a job of this call only."""


def config_file(pipeline: Pipeline, stage: str) -> Path:
    """The resolved configuration of a stage as its job gets it."""
    return pipeline.directory / f"{stage}.yaml"


def last_part(stage: Stage) -> str:
    return f"{stage.name}.export" if stage.trains else stage.name


def of(pipeline: Pipeline, run_words: Sequence[str] = ()) -> list[Part]:
    """All parts, each behind those that it waits for. `run_words`: for the runs, once, beside their file."""
    found = []
    for stage in pipeline.stages:
        before = tuple(last_part(pipeline.stage(name)) for name in stage.after)
        if not stage.trains:
            found.append(_preparation(pipeline, stage, before))
            continue
        run, out = pipeline.run(stage), pipeline.export(stage)
        assert stage.config is not None
        slurm = {"nodes": stage.config.cluster.nodes, "gpus_per_node": stage.config.cluster.gpus_per_node}
        slurm = {k: v for k, v in slurm.items() if v is not None} | stage.slurm
        words: tuple[str, ...] = ("--config", str(config_file(pipeline, stage.name)))
        found.append(
            Part(
                stage.name,
                stage.name,
                "run",
                before,
                stage.algo,
                words,
                slurm,
                run,
                run=run,
                once=tuple(run_words),
            )
        )
        words = ("--run", str(run), "--step", stage.step, "--out", str(out), "--finished", "--update")
        words += ("--dtype", stage.dtype) if stage.dtype else ()
        name, step = f"{stage.name}.export", stage.step
        found.append(
            Part(
                name,
                stage.name,
                "export",
                (stage.name,),
                "convert",
                words,
                stage.export_slurm,
                out,
                step,
                run,
            )
        )
    return found


def _preparation(pipeline: Pipeline, stage: Stage, before: tuple[str, ...]) -> Part:
    assert stage.prepares is not None
    user = pipeline.stage(stage.prepares)
    words: tuple[str, ...] = ("--algo", user.algo, "--config", str(config_file(pipeline, user.name)))
    words += _tokenizer_words(pipeline, user)
    record = pipeline.directory / f"{stage.name}.stores.json"
    words += ("--record", str(record))
    return Part(stage.name, stage.name, "prepare", before, "prepare", words, stage.slurm, record)


def _tokenizer_words(pipeline: Pipeline, user: Stage) -> tuple[str, ...]:
    """The tokenizer that the export which `user` starts from will have, though it is not there yet: of the
    last stage of the chain that sets one, else of the model that the chain begins with. Likewise the chat
    template; a tokenizer that is set brings its own, whatever the stages before had."""
    if user.source is None:
        return ()
    tokenizer = template = None
    chain = [user]
    while chain[-1].source is not None:
        chain.append(pipeline.stage(chain[-1].source))
    for stage in chain:
        assert stage.config is not None
        template = template or stage.config.model.chat_template
        tokenizer = stage.config.model.tokenizer
        if tokenizer is not None:
            break
    first = chain[-1].config
    assert first is not None
    assert stage.config is not None
    words = [f"model.path={first.model.path}"]
    words += [f"model.tokenizer={tokenizer}"] if tokenizer else []
    # One revision is for model and tokenizer; what starts from an export has none.
    words += [f"model.revision={stage.config.model.revision}"] if stage.config.model.revision else []
    words += [f"model.chat_template={json.dumps(template)}"] if template else []  # else YAML folds its lines
    return tuple(words)


def job_name(pipeline: str, part: str) -> str:
    return f"{pipeline}-{part}"


def sbatch(pipeline: str, directory: Path, part: Part, dependency: str) -> list[str]:
    """The command that submits a part. Its name and the folder of its output tell whose it is."""
    options = {
        "job-name": job_name(pipeline, part.name),
        "output": str(directory / "%x-%j.out"),
        **({"dependency": dependency, "kill-on-invalid-dep": "yes"} if dependency else {}),
        **{key.replace("_", "-"): value for key, value in part.slurm.items()},
    }
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
    return ["sbatch", "--parsable", *words, str(SBATCH / f"{part.template}.sh"), *part.args, *part.once]


def local_command(part: Part, python: str) -> list[str]:
    """What runs a part on this machine."""
    if part.kind == "run":
        return ["bash", str(SBATCH / "lib.sh"), part.template, *part.args, *part.once]
    return [python, "-m", TOOLS[part.template], *part.args]


def local_ranks(slurm: Mapping[str, Any]) -> int:
    a_node = slurm.get("ntasks_per_node") or slurm.get("gpus_per_node") or 1
    return int(slurm.get("nodes") or 1) * int(a_node)


def shown(words: Sequence[str]) -> str:
    return shlex.join(words)
