"""A run's directory as the trainer sees it: agreement with what stands there, records, verdicts.

The directory outlives attempts. Its config.yaml is written once, with every `auto` resolved and a marker for
each secret; whoever comes later must agree with it.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from strop import config as config_module
from strop import files
from strop.config import Config
from strop.errors import STORAGE_ERRNOS, Diverged, StorageError, UserError
from strop.obs import secrets
from strop.slurm import attempts, code, lease, naming, peers
from strop.slurm.env import Env
from strop.slurm.stop import StopRequest

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where this rank is, for its verdict and its watchdog."""

    phase: str = "start"
    step: Optional[int] = None
    beats: int = 0
    """Counts micro batches, rows and the like: progress inside a phase."""
    warm: set[str] = field(default_factory=set)
    """The phases that have had a beat: what takes long only once is behind them."""
    on_phase: Optional[Callable[[str], None]] = None
    """Told of every phase that begins: each rank's log has a line of it, by which its life can be drawn."""

    def enter(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            if self.on_phase is not None:
                self.on_phase(phase)

    def beat(self) -> None:
        self.beats += 1
        self.warm.add(self.phase)


@dataclass(frozen=True)
class Run:
    dir: Path
    attempt: int
    env: Env
    stop: StopRequest
    launched: bool
    """False where this process was started by hand and keeps its own record."""

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def logs(self) -> Path:
        return attempts.log_dir(self.dir, self.attempt)

    @property
    def rank_logs(self) -> Path:
        """Where this rank writes its own files: on the node's disk if the site wants that, else `logs`."""
        return attempts.rank_log_dir(self.dir, self.attempt, self.env.log_dir if self.launched else None)


def open_run(config: Config, env: Env) -> Run:
    """The run that the launcher has begun, or a new attempt of this process's own."""
    if env.run_dir is not None and env.attempt is not None:
        name = config.run.name
        if name is not None and naming.of_task(name, env.job_id) != env.run_dir.name:
            raise UserError(f"run.name: {config.run.name!r}, but the job's run is {env.run_dir}")
        parent = naming.parent_directory(config.run.dir)
        # A container may resolve links in another way.
        if not (parent.exists() and parent.samefile(env.run_dir.parent)):
            raise UserError(f"run.dir: {parent}, but the job's run is {env.run_dir}")
        return Run(env.run_dir, env.attempt, env, StopRequest(env.run_dir, env.attempt), launched=True)
    default = f"{config.algo}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = naming.checked(default if config.run.name is None else config.run.name)
    run_dir = naming.parent_directory(config.run.dir) / name
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / "attempts").is_dir():
        raise UserError(f"run.name: {run_dir} exists and is no run of strop: choose another name")
    code_now = code.identify()
    if attempts.committed_step(run_dir) is not None:
        note = code.check(code_now, attempts.read_all(run_dir), allow=config.run.allow_code_change)
        if note:
            log.warning("CODE CHANGED: %s", note)
    try:
        attempt = attempts.begin(
            run_dir, job_id=None, restart_count=0, nodes=[env.node], launcher="direct", code=code_now
        )
    except lease.Held as error:
        raise UserError(f"run.name: {error}") from error
    return Run(run_dir, attempt, env, StopRequest(run_dir, attempt), launched=False)


def agree(run: Run, config: Config) -> Config:
    """Rank 0: `config` with the choices that the run made before in place of `auto`.

    Raises UserError with the list of differences unless `run.allow_config_change`.
    """
    path = run.dir / "config.yaml"
    if not path.exists():
        return config
    old = yaml.safe_load(path.read_text())
    if old.get("algo") != config.algo:
        raise UserError(f"run.name: {run.dir} is a run of {old.get('algo')}, not of {config.algo}")
    config = dataclasses.replace(
        config,
        model=_resolved(config.model, old["model"], "attention"),
        train=_resolved(config.train, old["train"], "precision"),
    )
    lines = config_module.differences(_kept(old), _kept(config_module.to_dict(config)))
    if lines and not config.run.allow_config_change:
        raise UserError(
            f"the configuration differs from the one that {run.dir} was started with "
            "(run.allow_config_change=true to go on all the same):\n  " + "\n  ".join(lines)
        )
    for line in lines:
        log.warning("CONFIGURATION CHANGED: %s", line)
    return config


def agree_on_data(run: Run, config: Config, contents: dict[str, str]) -> None:
    """Rank 0: what each set holds is what it held when the run began. contents: by set, as `sets.content`.

    The plan of steps is a function of the rows, so with others a resumed run is neither the old one nor a new
    one. Raises UserError unless `run.allow_config_change`; a run that has committed nothing begins anew.
    """
    path = run.dir / "data" / "contents.json"
    begun = attempts.committed_step(run.dir) is not None
    before = (files.read_json(path) or {}) if begun else {}
    changed = [name for name, now in contents.items() if before.get(name, now) != now]
    if changed:
        text = (
            f"the rows of the {' and '.join(changed)} set are not those that {run.dir} was started with: a "
            "file of it was changed, or what makes rows of it (adapter, tokenizer)"
        )
        if not config.run.allow_config_change:
            raise UserError(
                f"{text}\n  (put it back, give the run another name, or run.allow_config_change=true to go "
                "on all the same)"
            )
        log.warning("DATA CHANGED: %s", text)
    files.write_json(path, {**before, **contents})


def _resolved(section: Any, old: dict[str, Any], key: str) -> Any:
    return dataclasses.replace(section, **{key: old[key]}) if getattr(section, key) == "auto" else section


def write_config(run: Run, config: Config) -> None:
    """Rank 0, once all choices are made; a later attempt leaves the first one's."""
    path = run.dir / "config.yaml"
    if not path.exists() or config.run.allow_config_change:
        files.write_atomic(path, config_module.dump_tree(_kept(config_module.to_dict(config))))


def _kept(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as config.yaml has it: without what is secret by its key's name or its shape, and in
    the user's own keys without the environment's secrets. Our own keys are read again (of an export, of a
    resume), and a path may hold such a value by accident."""
    kept = secrets.mask(tree, of_text=secrets.redactor(environ={}))
    kept["metadata"] = secrets.mask(tree.get("metadata", {}))
    kept["data"]["adapter_args"] = secrets.mask(tree["data"].get("adapter_args", {}))
    return kept


def record_machine(run: Run, facts: dict[str, Any]) -> None:
    """Rank 0: what the bits depend on beside code and configuration; a change is a loud line."""
    facts = {"machine": platform.machine(), **facts}
    before = [r["machine"] for r in attempts.read_all(run.dir) if isinstance(r.get("machine"), dict)]
    if before and before[-1] != facts:
        changed = [f"{k}: {before[-1].get(k)} -> {v}" for k, v in facts.items() if before[-1].get(k) != v]
        log.warning("MACHINE CHANGED (results are no longer bit for bit): %s", ", ".join(changed))
    attempts.update(run.dir, run.attempt, machine=facts)


def classify(error: BaseException) -> tuple[str, int]:
    """(kind of verdict, exit code) of what ended this rank."""
    if isinstance(error, (UserError, Diverged, StorageError)):
        return error.kind, error.exit_code
    name, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return "oom", 1
    if isinstance(error, (RuntimeError, OSError)) and peers.is_out_of_memory(text):
        return "oom", 1
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        return StorageError.kind, StorageError.exit_code
    trace = "".join(traceback.format_exception(error))
    return ("peer" if peers.reason(name, text, trace) else "exception"), 1


def fail(run: Run, error: BaseException, *, step: Optional[int], phase: str) -> int:
    """Leave this rank's verdict, and the record if nobody else keeps it. The exit code."""
    kind, exit_code = classify(error)
    attempts.write_verdict(
        run.dir,
        run.attempt,
        run.env.rank,
        kind=kind,
        exit_code=exit_code,
        message=str(error) or type(error).__name__,
        exception=type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        step=step,
        phase=phase,
        node=run.env.node,
    )
    if not run.launched:
        attempts.finish(run.dir, run.attempt, "FAIL", step=step, reason=kind)
    return exit_code
