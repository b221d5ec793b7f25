"""Where the job would run: the run's directory, the code, this host's tools, and Slurm's own opinion."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from strop import run as run_module
from strop.config import Config
from strop.doctor.checks import Checks
from strop.errors import UserError
from strop.slurm import attempts, code, command, env, lease, naming
from strop.slurm.stop import StopRequest

SLURM_DEADLINE_S = 8.0
UNCONFIGURED = "Could not establish a configuration source"
NO_JOB = env.Job(None, None, None, 0, (), "local", None, None, None, None)


def run_directory(algo: str, args: Sequence[str], config: Config, checks: Checks) -> Path:
    """Where the run lies; whether this would begin, resume, extend or be refused."""
    run = naming.resolve(algo, args, NO_JOB, code.REPOSITORY)
    if not run.given:
        checks.ok("run", f"a new one, {run.directory.parent}/{algo}-JOBID (run.name=X to choose the name)")
        return run.directory.parent / f"{algo}-JOBID"
    path = run.directory
    records = attempts.read_all(path) if path.is_dir() else []
    if not records:
        content = sorted(p.name for p in path.iterdir() if p.name != "attempts") if path.is_dir() else []
        if content or path.is_file():
            checks.fail("run", f"run.name: {path} exists and is no run of strop", "choose another run.name")
        else:
            checks.ok("run", f"a new one, {path}")
        return path
    committed = attempts.committed_step(path)
    position = f"{len(records)} attempts, committed up to step {committed}"
    try:
        view = run_module.Run(path, 0, env.read_env({}), StopRequest(None, None), launched=False)
        run_module.agree(view, config)
    except UserError as error:
        checks.fail("run", str(error), "go back to those settings, or give the run another run.name")
        return path
    holder = _holder(path, records)
    if holder:
        checks.fail("run", f"{path} is in use by {holder}", "wait, cancel it, or choose another run.name")
    elif (
        records[-1]["state"] == "DONE"
        and committed is not None
        and committed >= (config.train.max_steps or 0)
    ):
        text = f"{path} is finished ({position}); a job would end at once"
        checks.warn("run", text, "a larger train.max_steps extends it; another run.name begins anew")
    else:
        checks.ok("run", f"resumes {path} ({position})")
    _compare_code(records, committed, run.allow_code_change, checks)
    return path


def _holder(path: Path, records: Sequence[dict]) -> str | None:
    me = lease.Owner(None, 0, socket.gethostname(), 0, None)
    try:
        return lease.living_owner(path, records[-1], me)[0]
    except (command.SlurmError, FileNotFoundError):  # no Slurm here to ask
        return None


def _compare_code(records: Sequence[dict], committed: int | None, allow: bool, checks: Checks) -> None:
    if committed is None:
        return
    try:
        note = code.check(code.identify(), records, allow=allow)
    except UserError as error:
        text, _, advice = str(error).partition("; ")
        checks.fail("code", text, advice)
        return
    checks.warn("code", note) if note else checks.ok("code", "the same as the run's last attempt")


def git_state(checks: Checks) -> None:
    """Uncommitted code: the run's record could not be found again."""
    try:
        done = subprocess.run(
            ["git", "-C", str(code.REPOSITORY), "status", "--porcelain", "--", "src", "sbatch"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return
    changed = done.stdout.splitlines()
    if done.returncode == 0 and changed:
        text = f"{len(changed)} uncommitted changes, such as {changed[0].split()[-1]}"
        checks.warn("code", text, "commit them, so that the run's record names what ran")
    elif done.returncode == 0:
        checks.ok("code", "committed")


def host(variables: Mapping[str, str], checks: Checks) -> None:
    """The programs and files that the job body needs, as far as this host shows them."""
    python = variables.get("HOST_PYTHON") or "python3"
    try:
        done = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        version = tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        version = ()
    found = ".".join(map(str, version)) or "not found"
    if version >= (3, 9):
        checks.ok("host python", f"{python} is {found}")
    else:
        checks.fail("host python", f"{python} is {found}", "set HOST_PYTHON to a python3 of 3.9 or newer")
    trainer = variables.get("PYTHON")
    if trainer and not variables.get("CONTAINER") and shutil.which(trainer) is None:
        checks.fail("python", f"PYTHON={trainer}: no such program here", "correct the site file")
    _container(variables, checks)
    name = variables.get("STROP_IFNAME")
    if name and not Path("/sys/class/net", name).exists():
        present = ", ".join(sorted(p.name for p in Path("/sys/class/net").iterdir()))
        advice = f"here are {present}; the compute nodes may have others"
        checks.warn("network", f"STROP_IFNAME={name}: no such interface on this host", advice)
    elif name:
        checks.ok("network", f"STROP_IFNAME={name} exists on this host")


def _container(variables: Mapping[str, str], checks: Checks) -> None:
    image = variables.get("CONTAINER")
    if not image:
        return
    if image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif")):
        if Path(image).exists():
            checks.ok("container", f"{image} exists")
        else:
            checks.fail("container", f"CONTAINER={image}: no such file", "correct the site file")
    else:
        checks.ok("container", f"{image} is a registry's name; it is fetched when the job starts")
    for mount in filter(None, (variables.get("MOUNTS") or "").split(",")):
        source = mount.partition(":")[0]
        if not Path(source).exists():
            checks.fail("mounts", f"MOUNTS: {source} does not exist here", "correct the site file")


def ask_slurm(algo: str, args: Sequence[str], options: Sequence[str], checks: Checks) -> None:
    """`sbatch --test-only` with the template; the environment's SBATCH_* variables count, as they will."""
    missing = [name for name in ("sbatch", "scontrol") if shutil.which(name) is None]
    if missing:
        text = f"no {' and no '.join(missing)} here"
        checks.warn("slurm", text, f"without Slurm: python -m tools.submit --algo {algo} --executor local")
        return
    script = code.REPOSITORY / "sbatch" / f"{algo}.sh"
    words = ["sbatch", "--test-only", *options, str(script), *args]
    shown = shlex.join(["sbatch", *options, f"sbatch/{algo}.sh", *args])
    try:
        answer = command.slurm(words, deadline_s=SLURM_DEADLINE_S, with_stderr=True)
    except command.NoController as error:
        checks.warn("slurm", _last_line(str(error)), "the controller does not answer; try again later")
    except command.SlurmError as error:
        if UNCONFIGURED in str(error):
            checks.warn("slurm", "its programs are here, but no cluster (no slurm.conf)", "set SLURM_CONF")
        else:
            checks.fail("slurm", f"{shown}: {_last_line(str(error))}", "see the site file and sinfo")
    else:
        line = re.sub(r"^sbatch: ", "", _last_line(answer))
        checks.ok("slurm", f"{shown}: {line}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no answer"
