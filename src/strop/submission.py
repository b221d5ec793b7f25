"""Submitting a job from Python: through submitit's SlurmExecutor, with the same job body as sbatch/*.sh.

submitit writes the sbatch file and calls sbatch. What the job runs is `sbatch/lib.sh`, so there is one stop
logic: submitit's own srun, signal and requeue are not used. `executor="local"` starts the same body on this
machine without Slurm. Needs the repository, whose sbatch/ holds the body.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import submitit
from submitit.core.utils import FailedJobError

from strop import config
from strop.errors import UserError
from strop.slurm import attempts, code, command, env, naming

LIB = code.REPOSITORY / "sbatch" / "lib.sh"
FOLDER = Path("runs/.submitted")
"""For the sbatch files; submitit makes it."""
DEFAULTS: dict[str, Any] = {
    "exclusive": True,
    "time": "24:00:00",
    "signal": "B:USR1@300",
    "requeue": True,
    "open-mode": "append",
    "output": "%x-%j.out",
}
"""As in the templates, which say why."""


class _Executor(submitit.SlurmExecutor):
    """Repeats what was asked for on sbatch's command line, where it beats a site's SBATCH_* variables."""

    explicit: Sequence[str] = ()

    @classmethod
    def affinity(cls) -> int:
        return 1  # a dry run needs no Slurm

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self.explicit, str(submission_file_path)]


@dataclass
class Job:
    """A submitted job. `str(job.job_id)` is what squeue shows; for a local one it is "local-PID"."""

    job_id: str
    run_dir: Path
    output: Path
    process: Optional[subprocess.Popen[bytes]] = field(default=None, repr=False)

    def state(self) -> str:
        """Slurm's word for it; for a local job RUNNING, COMPLETED or FAILED."""
        if self.process is not None:
            code = self.process.poll()
            return "RUNNING" if code is None else "FAILED" if code else "COMPLETED"
        record = command.show_job(self.job_id)
        return record["JobState"] if record else "UNKNOWN"

    def exit_code(self) -> Optional[int]:
        """None until the job has ended for good; 128 + N if signal N ended it."""
        if self.process is not None:
            return self.process.poll()
        record = command.show_job(self.job_id)
        if record is None:  # Slurm has forgotten it (MinJobAge): the run's record has not
            last = attempts.read_all(self.run_dir)[-1:]
            return int(last[0].get("exit_code", 1)) if last else 1
        if record["JobState"] not in command.ENDED:
            return None
        last = attempts.read_all(self.run_dir)[-1:]
        if last and last[0].get("target") == self.job_id and last[0].get("action") == "successor":
            self.job_id = last[0]["successor"]  # the same run goes on there
            return None
        code, _, number = record["ExitCode"].partition(":")
        return 128 + int(number) if int(number) else int(code) or int(record["JobState"] != "COMPLETED")

    def progress(self) -> Optional[str]:
        """The run's newest line of metrics, shortened."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            return None
        values = json.loads(lines[-1])
        return "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in list(values.items())[:5]
        )

    def wait(self, say: Callable[[str], None] = lambda line: None, poll_s: float = 1.0) -> int:
        """The exit code, once the job has ended for good. `say` gets every change of state and progress."""
        shown: Optional[str] = None
        while True:
            exit_code = self.exit_code()
            line = "  ".join(filter(None, [f"job {self.job_id} {self.state()}", self.progress()]))
            if line != shown:
                say(line)
                shown = line
            if exit_code is not None:
                return exit_code
            time.sleep(poll_s)

    def stop(self) -> None:
        """Commit and end: scancel, or TERM for a local job."""
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGTERM)
        else:
            command.slurm(["scancel", self.job_id])


def submit(
    algo: str,
    args: Sequence[str],
    *,
    nodes: Optional[int] = None,
    executor: str = "slurm",
    wait: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Union[Job, str]:
    """Check the configuration, then submit. With `dry_run` the text for sbatch instead of a job.

    `options` are sbatch's long ones with underscores: partition="gpu", gpus_per_node=8, time="04:00:00".
    The number of nodes and of GPUs a node come from the configuration's `cluster` where they are not given.
    Raises UserError (exit 78) before anything is submitted.
    """
    parsed = config.load(algo, *config.parse_args(args, algo))
    if executor not in ("slurm", "local"):
        raise UserError(f"executor {executor!r}: expected slurm or local")
    nodes = parsed.cluster.nodes or 1 if nodes is None else nodes
    if nodes < 1:
        raise UserError(f"nodes: {nodes}, expected 1 or more")
    gpus = options.pop("gpus_per_node", None)
    gpus = parsed.cluster.gpus_per_node if gpus is None else gpus
    asked = {key: value for key, value in {**options, "gpus_per_node": gpus}.items() if value is not None}
    if executor == "local":
        if dry_run:
            raise UserError("dry run: there is no sbatch text with executor local")
        job = _submit_local(algo, args, nodes * int(asked.get("ntasks_per_node") or gpus or 1))
    else:
        slurm = _executor(algo, nodes, asked)
        if dry_run:
            return slurm._make_submission_file_text(body_command(algo, args), "")
        job = _submit_slurm(slurm, algo, args)
    if wait:
        job.wait()
    return job


def body_command(algo: str, args: Sequence[str]) -> str:
    """exec: Slurm signals the batch shell alone, so the body must be it."""
    return "exec " + shlex.join(["bash", str(LIB), algo, *args])


def _executor(algo: str, nodes: int, asked: dict[str, Any]) -> _Executor:
    """`asked` over DEFAULTS; False takes a default out (exclusive=False)."""
    options = {**DEFAULTS, **{key.replace("_", "-"): value for key, value in asked.items()}}
    options = {key: value for key, value in options.items() if value is not False}
    executor = _Executor(FOLDER)
    executor.update_parameters(
        job_name=options.pop("job-name", algo),
        nodes=nodes,
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters=options,
    )
    executor.explicit = [f"--{k.replace('_', '-')}={v}" for k, v in asked.items() if not isinstance(v, bool)]
    return executor


def _submit_slurm(executor: _Executor, algo: str, args: Sequence[str]) -> Job:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: no such program here; executor=local runs the job on this machine")
    executor.folder.mkdir(parents=True, exist_ok=True)
    try:
        job_id = executor._submit_command(body_command(algo, args)).job_id
    except FailedJobError as error:
        raise UserError(f"sbatch refused the job: {error}") from error
    job = env.Job(job_id, None, None, 0, (), "slurm", None, None, None, None)
    name = executor.parameters["job_name"]
    return Job(
        job_id, naming.resolve(algo, args, job, code.REPOSITORY).directory, Path(f"{name}-{job_id}.out")
    )


def _submit_local(algo: str, args: Sequence[str], num_ranks: int) -> Job:
    """The name is settled here, since the job's own would be made of the time at which it starts."""
    job = env.Job(None, None, None, 0, (), "local", None, None, None, None)
    run = naming.resolve(algo, args, job, code.REPOSITORY)
    variables = {
        **env.all_variables(),
        "STROP_LAUNCHER": "local",
        "STROP_LOCAL_RANKS": str(num_ranks),
        "PYTHON": env.all_variables().get("PYTHON") or sys.executable,
    }
    output = Path(f"{run.name}.out")
    with open(output, "ab") as file:
        process = subprocess.Popen(
            ["bash", str(LIB), algo, *args, *([] if run.given else [f"run.name={run.name}"])],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C here ends the watching, not the job
        )
    return Job(f"local-{process.pid}", run.directory, output, process)
