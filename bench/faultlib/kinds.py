"""The faults that a run must survive: how each is done, and what slurm.md's table says must follow.

A fault strikes at a moment (phase, number of steps, delay), all drawn from the seed. `strike` does the harm,
`mend` what an administrator would do afterwards (room on the disk, a repaired node).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.faultlib.scene import Scene, Stuck, wait_until
from strop.slurm import processes, stop

LIMIT_S = 150.0
"""Within this long a fault must have had its effect, and the run must be training again."""

EARLY = ("imports", "rendezvous", "model", "resume")
"""Phases of an attempt that starts."""
LATE = ("train", "validation", "save")
LONG_STEPS = 13
"""Enough for a commit on the way (`Task.save_every`)."""
DELAY_S = {"imports": 4.0, "rendezvous": 0.3, "model": 0.3, "reference": 0.4, "resume": 0.2, "train": 0.5,
           "validation": 0.1, "save": 0.03}  # fmt: skip
"""The longest wait between the beginning of the phase and the fault."""


@dataclass(frozen=True)
class Fault:
    number: int
    kind: str
    phase: str
    rank: int
    steps: int
    chance: float
    """In [0, 1): scales the delay, and what else is drawn."""


@dataclass(frozen=True)
class Kind:
    name: str
    strike: Callable[[Scene, Fault], None]
    causes: tuple[str, ...]
    phases: tuple[str, ...] = LATE
    actions: tuple[str, ...] = ("requeue",)
    mend: Callable[[Scene, Fault], None] | None = None
    check: Callable[[Scene, Fault], str | None] | None = None
    """After the run is training again: what is wrong, or null."""
    early_causes: tuple[str, ...] = ()
    """What it may be called besides during the imports, which no signal interrupts: KillWait may be over."""
    in_place: Callable[[Scene, int], bool] | None = None
    """Whether this attempt has survived it, so that there is nothing to decide."""
    needs_root: bool = False


def signal_rank(number: int) -> Callable[[Scene, Fault], None]:
    def strike(scene: Scene, fault: Fault) -> None:
        pid = scene.rank_pid(fault.rank)
        if pid is None:
            raise Stuck(f"rank {fault.rank} has no process to be killed")
        os.kill(pid, number)

    return strike


kill_rank = signal_rank(signal.SIGKILL)


def lose_node(scene: Scene, fault: Fault) -> None:
    """Everything of a node is gone at once, its slurmd first; it comes back a few seconds later."""
    node = f"node{fault.rank + 1}"
    processes.kill([scene.cluster.daemons()[node], *scene.cluster.job_processes(node)])
    time.sleep(1 + 3 * fault.chance)
    scene.cluster.up()


def preempt(scene: Scene, fault: Fault) -> None:
    scene.cluster.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                        "--job-name=high", "--wrap=sleep 1")  # fmt: skip


def preempt_at_once(scene: Scene, fault: Fault) -> None:
    scene.cluster.slurm("scontrol", "update", "PartitionName=low", "GraceTime=0")
    preempt(scene, fault)


def restore_grace(scene: Scene, fault: Fault) -> None:
    spec_grace = "GraceTime=30"
    scene.cluster.slurm("scontrol", "update", "PartitionName=low", spec_grace)


def shorten_time(scene: Scene, fault: Fault) -> None:
    """The job's limit is one to two minutes away: Slurm sends the signal that the header asks for."""
    start = time.mktime(time.strptime(scene.show()["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    scene.update(f"TimeLimit={math.ceil((time.time() - start) / 60) + 1}")


def lengthen_time(scene: Scene, fault: Fault) -> None:
    scene.update("TimeLimit=24:00:00")


def requeue(scene: Scene, fault: Fault) -> None:
    scene.cluster.slurm("scontrol", "requeue", scene.job)


def ask_to_stop(scene: Scene, fault: Fault) -> None:
    stop.request(scene.run_dir, scene.attempt(), "by hand")


def signal_batch_shell(scene: Scene, fault: Fault) -> None:
    scene.cluster.slurm("scancel", "--batch", "--signal=USR1", scene.job)


# ---- storage: the checkpoints lie on a small file system of their own


def mount(folder: Path, size_mib: int = 400) -> None:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", folder], check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", folder], check=True)


def _filler(scene: Scene) -> Path:
    return scene.run_dir / "checkpoints" / "filler"


def fill_disk(scene: Scene, fault: Fault) -> None:
    size = 0
    with _filler(scene).open("wb") as file:
        while (free := _free_bytes(file.name)) > 0:
            with contextlib.suppress(OSError):  # the trainer was faster, and there is less now
                os.posix_fallocate(file.fileno(), size, free)
                size += free


def _free_bytes(path: str) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def fill_for_a_moment(scene: Scene, fault: Fault) -> None:
    """Room is made as soon as the trainer has noticed, before or while it tries once more."""
    attempt = scene.attempt()
    fill_disk(scene, fault)
    wait_until(
        lambda: "trying once more" in scene.said(attempt) or "action" in scene.record(attempt),
        LIMIT_S,
        "the trainer notices the full disk",
    )
    _filler(scene).unlink()


def saved_after_all(scene: Scene, attempt: int) -> bool:
    """The second try of the save that had failed was committed."""
    before, _, after = scene.said(attempt).partition("trying once more")
    failed = re.findall(r"checkpoint of step (\d+): ", before)
    return bool(after and failed) and int(failed[-1]) in scene.commits()


def make_room(scene: Scene, fault: Fault) -> None:
    _filler(scene).unlink(missing_ok=True)
    release(scene, fault)


def release(scene: Scene, fault: Fault) -> None:
    """The held job may run again."""
    if scene.hit and scene.record(scene.hit).get("action") == "hold":
        wait_until(lambda: scene.show()["Reason"] == "JobHeldUser" or scene.show()["Priority"] == "0",
                   LIMIT_S, "the job is held")  # fmt: skip
        scene.cluster.slurm("scontrol", "release", scene.job)


def damage_newest(how: str) -> Callable[[Scene, Fault], None]:
    """Kill a rank; when the attempt is dead, damage one file of the newest commit."""

    def strike(scene: Scene, fault: Fault) -> None:
        wait_until(lambda: len(scene.commits()) >= 2, LIMIT_S, "two commits")
        kill_rank(scene, fault)
        wait_until(lambda: not scene.rank_pids(), LIMIT_S, "all ranks have ended")
        step = scene.commits()[-1]
        folder = scene.run_dir / "checkpoints" / f"step-{step:06d}"
        files = sorted(p for p in folder.iterdir() if p.name != "COMMITTED.json")
        target = random.Random(fault.number).choice(files)
        content = bytearray(target.read_bytes())
        at = int(fault.chance * len(content))
        if how == "flip":
            content[at] ^= 1 << (fault.number % 8)
        else:
            del content[at:]
        target.write_bytes(content)

    return strike


def was_set_aside(scene: Scene, fault: Fault) -> str | None:
    said = scene.said(scene.hit + 1)
    if "CHECKPOINT DAMAGED" not in said:
        return "the damaged checkpoint was not noticed"
    return None if any((scene.run_dir / "checkpoints").glob("*.damaged-*")) else "nothing was set aside"


# ---- the controller


def stop_controller(scene: Scene, fault: Fault) -> None:
    """The controller is away (half of the time dead, half of the time silent) when the attempt ends."""
    pid = scene.cluster.daemons()["slurmctld"]
    away_s = 6 + 8 * fault.chance
    if fault.number % 2:
        os.kill(pid, signal.SIGSTOP)
        kill_rank(scene, fault)
        time.sleep(away_s)
        os.kill(pid, signal.SIGCONT)
    else:
        processes.kill([pid])
        kill_rank(scene, fault)
        time.sleep(away_s)
        scene.cluster.up()


NODE_LOST = ("lost", "killed", "requeued")
"""With the batch host the record stays as it was; else srun sees dead tasks, or Slurm requeues before."""

SURVIVABLE = {
    kind.name: kind
    for kind in (
        Kind("SIGKILL", kill_rank, ("killed",), (*EARLY, "reference", *LATE)),
        Kind("SIGKILL in a save", kill_rank, ("killed",), ("save",)),
        Kind("SIGKILL in a resume", kill_rank, ("killed",), ("resume",)),
        Kind("SIGSEGV", signal_rank(signal.SIGSEGV), ("segfault",), ("model", "resume", "reference", *LATE)),
        Kind("SIGSTOP", signal_rank(signal.SIGSTOP), ("hang",), ("train", "validation", "save")),
        Kind("node lost", lose_node, NODE_LOST, (*EARLY, "reference", *LATE)),
        Kind("preempted with grace", preempt, ("preempted",), (*EARLY, "reference", *LATE)),
        Kind("preempted at once", preempt_at_once, ("requeued", "preempted", "late"), LATE,
             mend=restore_grace),
        Kind("time limit", shorten_time, ("time_limit",), ("train",), mend=lengthen_time),
        Kind("USR1", signal_batch_shell, ("time_limit",), (*EARLY, "reference", *LATE)),
        Kind("scontrol requeue", requeue, ("requeued",), ("imports", "reference", *LATE),
             early_causes=("lost",)),
        Kind("stop file", ask_to_stop, ("stopped",), (*EARLY, "reference", *LATE)),
        Kind("disk full for a moment", fill_for_a_moment, ("storage",), ("save",), ("hold",), mend=release,
             in_place=saved_after_all, needs_root=True),
        Kind("disk full", fill_disk, ("storage",), ("save",), ("hold",), mend=make_room, needs_root=True),
        Kind("flipped bit", damage_newest("flip"), ("killed",), ("train",), check=was_set_aside),
        Kind("truncated file", damage_newest("truncate"), ("killed",), ("train",), check=was_set_aside),
        Kind("controller away", stop_controller, ("killed",), LATE),
    )
}  # fmt: skip


def draw_schedule(seed: int, count: int, names: Sequence[str], faults_per_run: int) -> list[list[Fault]]:
    """`count` faults dealt to runs. Kinds come out of a bag that holds each once, so all come equally often.

    A fault in a start-up strikes the attempt that the fault before it has brought about; two in a row at
    most, and after a short attempt comes a long one, since five failures without a new commit would rightly
    end the run.
    """
    draw = random.Random(seed)
    bag: list[str] = []
    runs: list[list[Fault]] = []
    early_in_a_row = 0
    for number in range(count):
        if not bag:
            bag = list(names)
            draw.shuffle(bag)
        first = number % faults_per_run == 0
        if first:  # only a run's first attempt has a reference pass
            runs.append([])
            bag.sort(key=lambda name: "reference" in SURVIVABLE[name].phases)
        kind = SURVIVABLE[bag.pop()]
        if first:
            draw.shuffle(bag)
        phases = [p for p in kind.phases if _possible(p, first, early_in_a_row)] or [
            p for p in kind.phases if p not in ("reference",)
        ]
        early = [p for p in phases if p not in LATE]
        late = [p for p in phases if p in LATE]
        wants_early = draw.random() < (0.6 if first else 0.35)
        phase = draw.choice(early if early and (wants_early or not late) else late)
        if "reference" in phases and draw.random() < 0.5:
            phase = "reference"
        early_in_a_row = 0 if phase in LATE else early_in_a_row + 1
        short = bool(runs[-1]) and (runs[-1][-1].phase not in LATE or runs[-1][-1].steps < LONG_STEPS)
        steps = draw.randint(LONG_STEPS if short else 3, 25)
        runs[-1].append(Fault(number + 1, kind.name, phase, draw.randrange(2), steps, draw.random()))
    return runs


def _possible(phase: str, first: bool, early_in_a_row: int) -> bool:
    if phase == "reference":
        return first
    if phase == "resume":
        return not first and early_in_a_row < 2
    return phase in LATE or early_in_a_row < 2
