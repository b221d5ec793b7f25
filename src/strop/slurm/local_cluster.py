"""A real Slurm cluster on one machine: munged, slurmctld and one slurmd per node, all in one directory.

`LocalCluster(name).up()` writes the configuration, starts what is not running and waits until every node
is usable; `down()` ends every process of the cluster, its jobs' included, and removes the directory. Nothing
lies outside the directory except the lock file beside it, and the ports are chosen at the first `up`, so
clusters do not collide.

The daemons put themselves into the background and are found again by their command lines in /proc: no pid
file can be stale. They run as the user who calls: as root, or as a normal user for that user's jobs only.
Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from strop.slurm.local_config import (
    Spec,
    cgroup_conf,
    gpu_files,
    gres_conf,
    munge_socket,
    parse_version,
    slurm_conf,
)
from strop.slurm.processes import command_lines, kill, process_state, read_or_empty, working_folder

APT_COMMAND = "apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge"
BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_TIMEOUT_S = 60
USABLE_STATES = {"idle", "mixed", "allocated", "completing", "planned"}
LONGEST_SOCKET_PATH = 107 - len("/spool/node99/node99_99999999.4294967291")
"""A Unix socket's path has at most 107 bytes, and slurmstepd makes sockets in the spool directory."""


class ClusterError(RuntimeError):
    """The cluster could not be started or asked; the message says what to do or shows the log's end."""


def default_directory(name: str) -> Path:
    return Path.home() / ".cache" / "strop" / "slurm" / name


def missing_binaries() -> list[str]:
    return [name for name in BINARIES if _which(name) is None]


class LocalCluster:
    """One cluster, named by its directory; no state but what lies there and what runs."""

    def __init__(self, name: str = "default", directory: str | Path | None = None) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
            raise ClusterError(f"cluster name {name!r}: small letters, digits, - and _ (at most 31), please")
        self.name = name
        self.directory = Path(directory or default_directory(name)).expanduser().resolve()
        self.conf = self.directory / "slurm.conf"
        self._spec_file = self.directory / "cluster.json"

    def up(
        self,
        num_nodes: int | None = None,
        gpus_per_node: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Start the cluster, or only the parts that do not run; False if there was nothing to do.

        None means: as it is, and for a new cluster two nodes without GPUs.
        """
        self._check_possible()
        with self._lock():
            spec = self._settled_spec(num_nodes, gpus_per_node)
            if not self.problems():
                return False
            self._end_stopped_daemons()
            if not self.daemons():
                spec = self._write_files(spec)
            self._start_missing(spec, say)
            self._wait_until_usable(spec)
            return True

    def down(self) -> int | None:
        """End everything and remove the directory; the number of ended processes, None without a cluster."""
        if not self._spec_file.exists() and not self.daemons():
            return None
        with self._lock(remove=True):
            num_ended = self._end_everything()
            shutil.rmtree(self.directory, ignore_errors=True)
            return num_ended

    def spec(self) -> Spec | None:
        """The cluster as it was started; None if there is none."""
        try:
            return Spec.from_json(self._spec_file.read_text())
        except FileNotFoundError:
            return None

    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster, and a rank a node share the machine's CPUs: its
        nodes claim more of them than there are."""
        spec = self.spec()
        threads = max(1, (os.cpu_count() or 1) // (spec.num_nodes if spec else 1))
        return {"SLURM_CONF": str(self.conf), "OMP_NUM_THREADS": str(threads)}

    def problems(self) -> list[str]:
        """What keeps the cluster from being usable, one line each; empty if healthy."""
        spec = self.spec()
        if spec is None:
            return ["not started"]
        expected = ["munged", "slurmctld", *spec.node_names()]
        running = self.daemons()
        dead = [f"{name} does not run" for name in expected if process_state(running.get(name)) in "TX"]
        if dead:
            return dead
        try:
            states = self.node_states()
        except ClusterError as err:
            return [f"slurmctld does not answer: {err}"]
        return [
            f"{node} is {states.get(node, 'unknown')}"
            for node in spec.node_names()
            if states.get(node) not in USABLE_STATES
        ]

    def node_states(self) -> dict[str, str]:
        """{"node1": "idle", ...}, as sinfo says; "*" marks a node that does not answer."""
        lines = self.slurm("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split()[:2] for line in lines)

    def slurm(self, *args: str, timeout_s: float = 30) -> str:
        """The output of a Slurm command on this cluster; ClusterError with its message if it fails."""
        program = _which(args[0]) or args[0]
        env = {"PATH": SYSTEM_PATH, **self.environment()}
        try:
            done = subprocess.run(
                [program, *args[1:]], env=env, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"no answer in {timeout_s:.0f} s: {shlex.join(args)}") from None
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(args)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def daemons(self) -> dict[str, int]:
        """Process ids of the running daemons: {"munged": ..., "slurmctld": ..., "node1": ...}."""
        found = {}
        for pid, argv in command_lines():
            program = os.path.basename(argv[0])
            if program == "munged" and f"--socket={munge_socket(self.directory)}" in argv:
                found["munged"] = pid
            elif program in ("slurmctld", "slurmd") and str(self.conf) in argv:
                found[argv[argv.index("-N") + 1] if program == "slurmd" else program] = pid
        return found

    def job_processes(self, node: str | None = None) -> list[int]:
        """Process ids of all running jobs' tasks and batch shells (of one node), with their slurmstepd."""
        spec = self.spec()
        nodes = [node] if node else spec.node_names() if spec else []
        conf = f"SLURM_CONF={self.conf}".encode()
        on_nodes = {f"SLURMD_NODENAME={name}".encode() for name in nodes}
        folders = {str(self._log(name).parent) for name in nodes}
        pids = []
        for pid, argv in command_lines():
            variables = set(read_or_empty(f"/proc/{pid}/environ").split(b"\0"))
            is_task = conf in variables and not on_nodes.isdisjoint(variables)
            if is_task or (argv[0].startswith("slurmstepd") and working_folder(pid) in folders):
                pids.append(pid)
        return sorted(pids)

    # ---- up

    def _check_possible(self) -> None:
        missing = missing_binaries()
        if missing:
            raise ClusterError(
                f"Slurm is not installed here (no {', '.join(missing)}). "
                f"On Debian or Ubuntu, as root:\n  {APT_COMMAND}"
            )
        if not re.fullmatch(r"[\w./+-]+", str(self.directory), re.ASCII):
            raise ClusterError(
                f"{self.directory}: slurm.conf can name no folder with blanks or special characters; "
                "choose another with --dir"
            )
        if len(str(self.directory)) > LONGEST_SOCKET_PATH:
            raise ClusterError(
                f"{self.directory}: {len(str(self.directory))} characters are too long for Slurm's sockets "
                f"(at most {LONGEST_SOCKET_PATH}); choose a shorter one with --dir"
            )
        if self.directory.exists() and any(self.directory.iterdir()) and not self._spec_file.exists():
            raise ClusterError(
                f"{self.directory} is not empty and not a local cluster's: choose another with --dir"
            )

    def _settled_spec(self, num_nodes: int | None, gpus_per_node: int | None) -> Spec:
        """The recorded spec if there is one (which must agree with what is asked for), else a new one."""
        spec = self.spec()
        if spec is None:
            return self._new_spec(2 if num_nodes is None else num_nodes, gpus_per_node or 0)
        asked = (
            spec.num_nodes if num_nodes is None else num_nodes,
            spec.gpus_per_node if gpus_per_node is None else gpus_per_node,
        )
        if asked != (spec.num_nodes, spec.gpus_per_node):
            raise ClusterError(
                f"cluster {self.name!r} has {spec.num_nodes} nodes with {spec.gpus_per_node} GPUs each, "
                f"not {asked[0]} with {asked[1]}: take it down first, or start another one with --name"
            )
        return spec

    def _new_spec(self, num_nodes: int, gpus_per_node: int) -> Spec:
        version = self.slurm("slurmd", "-V")
        return Spec(
            name=self.name,
            directory=str(self.directory),
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser() if os.getuid() else "root",
            num_nodes=num_nodes,
            gpus_per_node=gpus_per_node,
            port=_free_ports(num_nodes + 1),
            slurm_version=parse_version(version),
        )

    def _write_files(self, spec: Spec) -> Spec:
        """Directories, key and configuration, for daemons that are all about to start.

        Host, ports and version are asked again: the machine may have been restarted or upgraded in between.
        What lies in state/ stays, so jobs from before a reboot are requeued by slurmctld.
        """
        new = self._new_spec(spec.num_nodes, spec.gpus_per_node)
        spec = replace(new, port=spec.port) if _ports_free(spec.port, spec.num_nodes + 1) else new
        for name in ("state", "spool", "run", "munge", *(f"log/{node}" for node in spec.node_names())):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for file in gpu_files(spec):
            file.parent.mkdir(exist_ok=True)
            file.touch()
        key = self.directory / "munge" / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        self.conf.write_text(slurm_conf(spec))
        (self.directory / "cgroup.conf").write_text(cgroup_conf(spec.slurm_version))
        (self.directory / "gres.conf").write_text(gres_conf(spec))
        self._spec_file.write_text(spec.to_json())
        return spec

    def _start_missing(self, spec: Spec, say: Callable[[str], None]) -> None:
        running = self.daemons()
        commands = {"munged": self._munged_command(), "slurmctld": ["slurmctld", "-f", str(self.conf)]}
        for node in spec.node_names():
            commands[node] = ["slurmd", "-N", node, "-f", str(self.conf)]
        for name, command in commands.items():
            if name not in running:
                say(f"starting {name}")
                self._start(name, command)

    def _munged_command(self) -> list[str]:
        # --force: munged otherwise refuses a home directory that others may not enter, or a root user.
        munge = self.directory / "munge"
        files = {
            "socket": munge_socket(self.directory),
            "key-file": munge / "key",
            "seed-file": munge / "seed",
        }
        files.update({"pid-file": self.directory / "run" / "munged.pid", "log-file": self._log("munged")})
        return ["munged", "--force", "--num-threads=4", *(f"--{key}={path}" for key, path in files.items())]

    def _start(self, name: str, command: list[str]) -> None:
        """Run a daemon, which goes into the background by itself.

        Its own session, a file instead of our stdout and a plain environment: it must outlive the shell that
        called `up`, must not keep a `$(...)` waiting, and must not hand our variables to anybody's jobs.
        """
        program = _which(command[0])
        assert program is not None
        log = self._log(name)
        with log.open("ab") as out:
            done = subprocess.run(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"PATH": SYSTEM_PATH, **self.environment()},
                cwd=self.directory,
                start_new_session=True,
                check=False,
            )
        if done.returncode != 0:
            raise ClusterError(f"{name} ended with code {done.returncode}{self._last_words(name)}")

    def _wait_until_usable(self, spec: Spec) -> None:
        start = time.monotonic()
        while problems := self.problems():
            waited_s = time.monotonic() - start
            dead = [problem.split()[0] for problem in problems if problem.endswith("does not run")]
            if (dead and waited_s > 3) or waited_s > READY_TIMEOUT_S:
                words = "".join(
                    self._last_words(name) for name in dead or ["slurmctld", *spec.node_names()[:1]]
                )
                raise ClusterError(f"the cluster does not become usable: {'; '.join(problems)}{words}")
            if waited_s > 5:
                self._resume_nodes(problems)
            time.sleep(0.3)

    def _resume_nodes(self, problems: list[str]) -> None:
        """Put nodes back into service that are drained or down although their slurmd runs."""
        for problem in problems:
            node, _, state = problem.partition(" is ")
            if state.startswith(("drain", "down")):
                with contextlib.suppress(ClusterError):  # refused while the node has not answered yet
                    self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def _log(self, name: str) -> Path:
        folder = self.directory / "log"
        return folder / f"{name}.log" if name in ("munged", "slurmctld") else folder / name / "slurmd.log"

    def _last_words(self, name: str) -> str:
        lines = read_or_empty(self._log(name)).decode(errors="replace").splitlines()[-12:]
        return "".join(f"\n  {name}: {line}" for line in lines)

    # ---- down

    def _end_stopped_daemons(self) -> None:
        """A daemon under SIGSTOP, or a controller that does not answer, is ended: it will be started anew."""
        running = self.daemons()
        ended = [pid for pid in running.values() if process_state(pid) == "T"]
        if "slurmctld" in running and any("does not answer" in problem for problem in self.problems()):
            ended.append(running["slurmctld"])
        kill(ended)

    def _end_everything(self) -> int:
        """The controller first, so that nothing is requeued or launched meanwhile; munged last."""
        jobs = self.job_processes()
        running = self.daemons()
        kill([pid for name, pid in running.items() if name == "slurmctld"])
        kill(jobs)
        kill([pid for name, pid in running.items() if name not in ("slurmctld", "munged")])
        late = self.job_processes()
        kill(late)
        kill([pid for name, pid in running.items() if name == "munged"])
        return len(set(jobs) | set(late)) + len(running)

    @contextlib.contextmanager
    def _lock(self, remove: bool = False) -> Iterator[None]:
        """One `up` or `down` at a time. A holder that was removed under us (by `down`) does not count."""
        path = self.directory.with_name(self.directory.name + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    continue
                yield
                if remove:
                    path.unlink()
                return


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=SYSTEM_PATH)


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below the range that the system gives to clients."""
    for _ in range(200):
        port = random.randrange(20000, 30000)
        if _ports_free(port, count):
            return port
    raise ClusterError(f"no {count} free ports in a row between 20000 and 30000")


def _ports_free(port: int, count: int) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            for number in range(port, port + count):
                stack.enter_context(socket.socket()).bind(("0.0.0.0", number))
        except OSError:
            return False
    return True
