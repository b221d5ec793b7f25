"""The faults that must end a run, each on a run of its own: what is decided, and that nothing runs again."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.faultlib.drive import Result, Stage, wait_for_end
from bench.faultlib.kinds import LIMIT_S
from bench.faultlib.scene import Scene, Stuck, wait_until
from strop.slurm import processes
from strop.slurm.local_cluster import ClusterError


@dataclass(frozen=True)
class Ending:
    name: str
    words: Callable[[Stage], tuple[str, ...]]
    cause: str
    exit_code: int
    attempts: int = 1
    strike: Callable[[Scene], None] | None = None
    job_state: str = "FAILED"
    algo: str = "dpo"
    commits: bool = False
    """Whether the last step must be committed."""


def cancel(scene: Scene) -> None:
    wait_until(lambda: len(scene.steps(1)) > 7, LIMIT_S, "eight steps")
    scene.cluster.slurm("scancel", scene.job)


def crash_at_one_place(scene: Scene) -> None:
    """Twice rank 1 gets SIGSEGV where it waits for rank 0's data, which rank 0, stopped, does not make."""
    for attempt in (1, 2):
        wait_until(lambda: scene.attempt() == attempt and len(scene.rank_pids()) == 2,  # noqa: B023
                   LIMIT_S, f"the ranks of attempt {attempt}")  # fmt: skip
        stopped = scene.rank_pid(0)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        waiting = wait_until(lambda: scene.rank_pid(1), LIMIT_S, "rank 1")
        wait_until(lambda: _idle(waiting), LIMIT_S, "rank 1 waits")  # noqa: B023
        os.kill(waiting, signal.SIGSEGV)
        wait_until(lambda: "action" in scene.record(attempt), LIMIT_S, "the decision")  # noqa: B023


def _idle(pid: int) -> bool:
    """Whether the process has worked, and now sleeps (imports are over). Its state says so, not the time that
    it uses: on a busy machine one that waits for a CPU uses none."""
    asleep = 0
    for _ in range(30):
        asleep += processes.process_state(pid) == "S"
        time.sleep(0.1)
    return asleep >= 29 and _cpu_ticks(pid) > 100


def _cpu_ticks(pid: int) -> int:
    fields = processes.read_or_empty(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12]) if fields else 0


ENDINGS = {
    ending.name: ending
    for ending in (
        Ending("scancel", lambda stage: (), "cancelled", 75, strike=cancel, job_state="CANCELLED",
               commits=True),
        Ending("NaN", lambda stage: ("optim.lr=1e30", "optim.warmup_steps=0", "train.max_grad_norm=null"),
               "diverged", 79),
        Ending("bad row", lambda stage: (f"data.train={stage.task.bad_data}",), "user", 78),
        Ending("unknown key", lambda stage: ("optim.lrr=1",), "user", 78),
        Ending("the same failure three times",
               lambda stage: (f"model.path={stage.task.narrow_model}",
                              f"data.train={stage.task.sft_data}", "validation.at_start=false",
                              "checkpoint.every=1"),
               "exception", 1, attempts=3, algo="sft"),
        Ending("SIGSEGV twice at one place", lambda stage: (), "segfault", 1, attempts=2,
               strike=crash_at_one_place),
    )
}  # fmt: skip


def play(stage: Stage, number: int, name: str, kind: str) -> Result:
    """One run that must end, and stay ended."""
    ending = ENDINGS[kind]
    result = Result(number, kind, "", name)
    short = dataclasses.replace(stage.task, max_steps=60)
    stage = dataclasses.replace(stage, task=short)
    try:
        with stage.run(name, *ending.words(stage), algo=ending.algo, own_disk=False) as scene:
            result.time = time.time()
            if ending.strike:
                ending.strike(scene)
            fields = wait_for_end(scene)
            wait_until(lambda: "action" in scene.record(scene.attempt()), 30, "the decision")
            _judge(scene, ending, fields, result)
    except (Stuck, ClusterError) as error:
        result.complaints.append(str(error))
    verdict = "; ".join(result.complaints) or "as it should"
    stage.say(f"  {number:3d}  {kind}, {name}: {result.cause} -> {result.action}: {verdict}")
    return result


def _judge(scene: Scene, ending: Ending, fields: dict[str, str], result: Result) -> None:
    attempt = scene.attempt()
    record = scene.record(attempt)
    result.attempt, result.cause, result.action = attempt, record.get("cause"), record.get("action")
    result.exit_code = record.get("exit_code")
    expected = {
        "cause": (result.cause, ending.cause),
        "action": (result.action, "stop"),
        "exit code": (result.exit_code, ending.exit_code),
        "attempts": (attempt, ending.attempts),
        "job state": (fields["JobState"], ending.job_state),
        "restarts": (fields["Restarts"], str(ending.attempts - 1)),
    }
    if ending.job_state == "FAILED":
        expected["job's exit code"] = (fields["ExitCode"], f"{ending.exit_code}:0")
    if ending.commits:
        expected["committed step"] = (max(scene.commits(), default=0), scene.steps(1)[-1])
    result.complaints += [f"{name} {a}, not {b}" for name, (a, b) in expected.items() if a != b]
    if result.complaints:
        result.complaints.append(f"see {scene.output}")
