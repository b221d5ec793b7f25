"""A stage is one job or two: a preparation; or a run, and the export of its model behind it.

Each part says which template (or body, without Slurm) runs it, with which words and options, what must have
succeeded before, and which file or directory tells that it is done. The words name the configuration that is
kept in the pipeline's directory, so that nobody's editing changes a job that waits in the queue.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.errors import UserError
from strop.pipeline.spec import Pipeline, Stage
from strop.slurm import code

SBATCH = code.REPOSITORY / "sbatch"
TOOLS = {"prepare": "tools.prepare", "convert": "tools.convert_dcp_to_hf"}
"""What the templates that are not an algorithm's run."""
NOT_TOLD = (
    "ntasks",
    "tasks_per_node",
    "ntasks_per_gpu",
    "ntasks_per_socket",
    "gpus_per_task",
    "gpus_per_socket",
)
"""Options by which the ranks of a job are not counted here."""


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
    source: Optional[str] = None
    """run: the part whose export it starts from."""


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
                source=None if stage.source is None else f"{stage.source}.export",
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
    """As many ranks as the job would have: one a GPU, without GPUs one a node (of `nodes: 2-4` two), but for
    `ntasks_per_node`. UserError names the option that does not tell."""
    nodes = _whole(slurm, "nodes", r"(\d+)(-\d+)?") or 1
    if "ntasks_per_node" in slurm:
        return nodes * (_whole(slurm, "ntasks_per_node", r"(\d+)") or 1)
    if "gpus" in slurm:
        return _gpus(slurm, "gpus", str(slurm["gpus"]).split(",")) or nodes
    gres = [word[4:] or "1" for word in str(slurm.get("gres", "")).split(",") if re.match("gpu(:|$)", word)]
    if "gpus_per_node" in slurm or gres:
        key = "gpus_per_node" if "gpus_per_node" in slurm else "gres"
        return nodes * (_gpus(slurm, key, gres if key == "gres" else str(slurm[key]).split(",")) or 1)
    for key in slurm:
        if key in NOT_TOLD and not (key == "ntasks" and str(slurm[key]) == str(nodes)):
            raise UserError(
                f"slurm.{key} is {slurm[key]!r}: it does not tell the ranks of a run; say ntasks_per_node"
            )
    return nodes


def _whole(slurm: Mapping[str, Any], key: str, pattern: str) -> int:
    found = re.fullmatch(pattern, str(slurm.get(key, "0")))
    if found is None:
        raise UserError(
            f"slurm.{key} is {slurm[key]!r}; how many ranks that makes without Slurm is not known"
        )
    return int(found[1])


def _gpus(slurm: Mapping[str, Any], key: str, kinds: Sequence[str]) -> int:
    """Of "4", "a100:4", "a100" (one) and several of these."""
    found = [re.fullmatch(r"(?:[A-Za-z][\w.-]*(?::(\d+))?|(\d+))(?:\(.*\))?", kind) for kind in kinds]
    if None in found:
        raise UserError(f"slurm.{key} is {slurm[key]!r}, expected a number of GPUs, such as 4 or a100:4")
    return sum(int(match[1] or match[2] or 1) for match in found if match is not None)


def shown(words: Sequence[str]) -> str:
    return shlex.join(words)
