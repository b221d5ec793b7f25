"""Which run a job belongs to, known before any third-party module is.

`run.name` and `run.dir` come from the command line, else from the configuration file, else the job
gives the name. Only the file's top-level `run:` block is scanned, line by line; the trainer checks that
its parsed configuration agrees. On the command line the aliases of NeMo RL's users count too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from strop.aliases import ALIASES
from strop.errors import UserError
from strop.slurm.env import Job

PLAIN = "must be a plain name, without / and not starting with a dot"
PIPELINE_SUFFIX = ".pipeline"
"""Of the directory with a pipeline's state, the configurations of its stages among it."""
KEYS = ("name", "dir", "allow_code_change")


@dataclass(frozen=True)
class RunName:
    name: str
    directory: Path
    """Absolute: <run.dir>/<name>, run.dir being relative to the directory that the job runs in."""
    given: bool
    """By the user; otherwise it is made of the job's number."""
    allow_code_change: bool
    stage: str = ""
    """Of a stage of a pipeline "NAME.": what its keys have before them on the pipeline's command line."""


def resolve(algo: str, args: Sequence[str], job: Job, root: Path) -> RunName:
    """`root` is the repository, for the default configs/<algo>.yaml."""
    file = config_file(algo, args, root)
    settings = scan_config(file)
    settings.update(_overrides(args))
    name = settings.get("name")
    given = name is not None
    name = checked(_default(algo, job) if name is None else of_task(name, job.target))
    allow = (settings.get("allow_code_change") or "").lower() == "true"
    stage = f"{file.stem}." if file.parent.name.endswith(PIPELINE_SUFFIX) else ""
    return RunName(name, parent_directory(settings.get("dir") or "runs") / name, given, allow, stage)


def of_task(name: str, target: Optional[str]) -> str:
    """The tasks of an array are runs of their own: "x" in task 4 of job 12 ("12_4") is "x-4"."""
    task = (target or "").partition("_")[2]
    return f"{name}-{task}" if task else name


def checked(name: str) -> str:
    """The name of a run, which is that of its directory; UserError if it is not a plain one."""
    if not is_plain(name):
        raise UserError(f"run.name={name!r}: {PLAIN}")
    return name


def is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def parent_directory(text: str) -> Path:
    """`run.dir`, relative to the directory that the job runs in."""
    return (Path.cwd() / Path(text).expanduser()).resolve()


def config_file(algo: str, args: Sequence[str], root: Path) -> Path:
    """The file that --config names, else configs/<algo>.yaml here or in the repository."""
    given = None
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise UserError("--config: the name of a file is missing")
            given = args[i + 1]
        elif arg.startswith("--config="):
            given = arg[len("--config=") :]
    if given is not None and not Path(given).is_file():
        raise UserError(f"--config {given}: no such file (looked in {Path.cwd()})")
    default = Path("configs") / f"{algo}.yaml"
    return Path(given) if given is not None else default if default.is_file() else root / default


def scan_config(path: Path) -> dict[str, str]:
    """KEYS of the top-level `run:` block, written as a block, as {name: X, dir: Y} or as run.name."""
    found: dict[str, str] = {}
    inside = False
    for line in path.read_text().splitlines() if path.is_file() else []:
        if re.match(r"\S", line) and not line.startswith("#"):
            block = re.match(r"run:\s*(?:\{(.*)\})?\s*(?:#.*)?$", line)
            inside = bool(block)
            pairs = (block[1] or "").split(",") if block else []
            pairs += [line[len("run.") :]] if line.startswith("run.") else []
        else:
            pairs = [line] if inside else []
        for pair in pairs:
            match = re.match(r"\s*(\w+):\s*(.*?)\s*(?:\s#.*)?$", pair)
            value = _scalar(match[2]) if match and match[1] in KEYS else None
            if match and value is not None:
                found[match[1]] = value
    return found


def _overrides(args: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for arg in args:
        key, equals, text = arg.lstrip("+").partition("=")
        section, _, name = (ALIASES[key].key if key in ALIASES else key).partition(".")
        value = _scalar(text)
        if equals and section == "run" and name in KEYS and value is not None:
            found[name] = value
    return found


def _scalar(text: str) -> Optional[str]:
    """A YAML scalar; None for null."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text in ("", "null", "~") else text


def _default(algo: str, job: Job) -> str:
    if job.job_id is None:
        return f"{algo}-{time.strftime('%Y%m%d-%H%M%S')}"
    if job.array_job_id and job.array_task_id:
        return f"{algo}-{job.array_job_id}_{job.array_task_id}"
    return f"{algo}-{job.job_id}"
