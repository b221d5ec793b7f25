"""Runs of the real trainer as processes that cost no import: forked from one that has torch loaded.

`python -m tests.ranks` is that process. It reads one JSON request a line, forks a child per rank, and says
how they ended. A child sets its environment as `strop.slurm.launch` would, and calls `strop.train.main`.
On request a rank is asked to stop, or killed, at its n-th look for a stop request: so a test reaches every
safe point, those inside validation and the reference pass too. `Ranks` is the test's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from strop.slurm import attempts, env

REPO = Path(__file__).resolve().parents[1]


@dataclass
class Job:
    """Running ranks of one attempt."""

    run_dir: Path
    attempt: Optional[int]
    pids: list[int]
    outputs: list[Path]

    def text(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text()


class Ranks:
    def __init__(self, work: Path) -> None:
        self.work = work
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"],
            cwd=REPO,
            env={**env.all_variables(), "PYTHONPATH": f"{REPO / 'src'}:{REPO}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        algo: str,
        config: Path,
        run: str,
        *words: str,
        world_size: int = 1,
        stop_at: Optional[int] = None,
        kill_at: Optional[int] = None,
        file_limit: Optional[int] = None,
        kept_bytes: Optional[int] = None,
        launched: bool = True,
    ) -> Job:
        """One attempt of the run `run` under `work`/runs.

        stop_at, kill_at: at this look for a stop request (from 1) the last rank gets one, or dies.
        file_limit: bytes that a file of the last rank may have. kept_bytes: what the head may keep for its
        backward, on all ranks; a larger micro batch is taken in parts, however small.
        Not `launched`: the trainer keeps its record.
        """
        self._count += 1
        runs = self.work / "runs"
        run_dir = runs / run
        attempt = None
        argv = [algo, "--config", str(config), f"run.name={run}", f"run.dir={runs}", *words]
        variables = {}
        if launched:
            attempt = attempts.begin(run_dir, job_id=None, restart_count=0, nodes=["test"], wait_s=0)
            variables = {
                "STROP_WORLD_SIZE": str(world_size),
                "STROP_LOCAL_SIZE": str(world_size),
                "STROP_NODE": "test",
                "STROP_RUN_DIR": str(run_dir),
                "STROP_ATTEMPT": str(attempt),
                "STROP_IFNAME": "lo",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        outputs = [self.work / f"output-{self._count:03d}-{rank}" for rank in range(world_size)]
        ranks = []
        for rank in range(world_size):
            own = {"STROP_RANK": str(rank), "STROP_LOCAL_RANK": str(rank)} if launched else {}
            ranks.append({"env": variables | own, "argv": argv, "output": str(outputs[rank])})
            ranks[-1] |= {"kept_bytes": kept_bytes}
        ranks[-1] |= {"stop_at": stop_at, "kill_at": kill_at, "file_limit": file_limit}
        return Job(run_dir, attempt, self._ask(start=ranks), outputs)

    def wait(self, job: Job, timeout_s: float = 60.0) -> list[int]:
        """Exit codes. Like the launcher, all ranks are killed when one fails; and like lib.sh's end, the
        record of an attempt that said nothing is closed."""
        codes = self._ask(wait=job.pids, timeout_s=timeout_s)
        if job.attempt is not None and attempts.read(job.run_dir, job.attempt)["state"] == "X":
            attempts.update(job.run_dir, job.attempt, state="FAIL")
        assert None not in codes, f"still running after {timeout_s} s:\n{job.text()}"
        return codes

    def run(self, *args: Any, **kwargs: Any) -> Job:
        """A run that must end well."""
        job = self.start(*args, **kwargs)
        codes = self.wait(job)
        assert set(codes) == {0}, f"exit codes {codes}:\n" + "\n".join(map(job.text, range(len(codes))))
        return job

    def fail(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        """(first exit code that is not 0 or a kill, output of rank 0) of a run that must not end well."""
        job = self.start(*args, **kwargs)
        codes = [code for code in self.wait(job) if code > 0]
        assert codes, job.text()
        return codes[0], job.text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    import strop.loop  # noqa: F401  torch and transformers, once

    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "start" in request:
            answer = [_fork(rank) for rank in request["start"]]
        else:
            answer = _wait(request["wait"], request["timeout_s"])
        print(json.dumps(answer), flush=True)


def _fork(rank: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    try:
        _become(rank)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _become(rank: dict[str, Any]) -> None:
    from strop import train
    from strop.slurm import stop

    output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(rank["env"])
    if rank.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (rank["file_limit"], rank["file_limit"]))
    if rank.get("kept_bytes") is not None:
        _keep_no_more_than(rank["kept_bytes"])
    look = stop.StopRequest.poll
    looks = 0

    def poll(self: stop.StopRequest) -> Optional[str]:
        nonlocal looks
        looks += 1
        if looks == rank.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if looks == rank.get("stop_at"):
            self.reason = "test"
        return look(self)

    stop.StopRequest.poll = poll  # type: ignore[method-assign]
    code = train.main(rank["argv"])
    print(f"looks: {looks}")
    sys.stdout.flush()
    os._exit(code)


def _keep_no_more_than(num_bytes: int) -> None:
    """The head's limit, and that no part is too small; each batch's number of parts is printed."""
    from strop import ops
    from strop.ops import functional, head

    head.KEPT_BYTES = num_bytes
    functional.ROWS_PER_PART = {"cpu": 0}
    plain = functional.linear_loss

    def counted(hidden: Any, weight: Any, target: Any, loss_fn: Any, *rest: Any) -> Any:
        parts = []

        def noted(logprob: Any, rows: slice) -> Any:
            parts.append(rows.stop - rows.start)
            return loss_fn(logprob, rows)

        found = plain(hidden, weight, target, noted, *rest)
        print(f"parts: {len(parts)}")
        return found

    ops.linear_loss = counted


def _wait(pids: list[int], timeout_s: float) -> list[Optional[int]]:
    codes: dict[int, Optional[int]] = dict.fromkeys(pids)
    deadline = time.monotonic() + timeout_s
    kill_at = None
    while None in codes.values():
        for pid in [p for p, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if kill_at is None and any(code for code in codes.values()):
            kill_at = now + 0.5
        if now > deadline or (kill_at is not None and now > kill_at):
            for pid in [p for p, code in codes.items() if code is None]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if now > deadline:
                break
        time.sleep(0.01)
    return list(codes.values())


if __name__ == "__main__":
    serve()
