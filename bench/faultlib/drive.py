"""One run under its faults: wait for the moment, strike, see what is decided, mend, and go on to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.faultlib import compare, kinds
from bench.faultlib.kinds import DELAY_S, LIMIT_S, SURVIVABLE, Fault
from bench.faultlib.scene import Scene, Stuck, wait_until
from bench.faultlib.task import Task
from strop.slurm import command
from strop.slurm.local_cluster import ClusterError, LocalCluster

REPO = Path(__file__).resolve().parents[2]
MARGIN_STEPS = 30
"""So close to its end a run is not disturbed any more."""
TRAIN_LIMIT_S = 600.0


@dataclass
class Result:
    """What became of one fault."""

    number: int
    kind: str
    phase: str
    run: str
    attempt: int = 0
    time: float = 0.0
    cause: str | None = None
    action: str | None = None
    exit_code: int | None = None
    complaints: list[str] = field(default_factory=list)
    lost_steps: int | None = None
    resume_s: float | None = None
    """From the fault to the first step of a later attempt; null where another fault came before it."""
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def wrong_cause(self) -> bool:
        return any(line.startswith("cause") for line in self.complaints)


@dataclass
class RunResult:
    """What became of one run."""

    run: str
    faults: int
    attempts: int = 0
    wall_s: float = 0.0
    kept_s: float = 0.0
    """Time of the steps that are part of the result, each counted once, with their validations."""
    stall_s: float = 0.0
    """Training stood still for so long to stage its checkpoints, ..."""
    saves: int = 0
    """... of which there were so many."""
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """Where runs take place."""

    cluster: LocalCluster
    task: Task
    python: str
    extra: tuple[str, ...] = ()
    """More arguments for the trainer."""
    root: bool = True
    say: Callable[[str], None] = print

    def submit(self, name: str, *words: str, algo: str = "dpo", own_disk: bool = True) -> Scene:
        """A run through sbatch/ALGO.sh on two nodes; `words` beside (and after) the usual ones."""
        output = self.task.folder / f"{name}.out"
        variables = f"ALL,PYTHON={self.python},OMP_NUM_THREADS=1,HOME={Path.home()}"
        job = self.cluster.slurm(
            "sbatch", "--parsable", "--nodes=2", f"--output={output}", f"--export={variables}",
            f"--chdir={self.task.folder}", str(REPO / "sbatch" / f"{algo}.sh"),
            *self.task.words(name), *self.extra, *words,
        ).strip()  # fmt: skip
        t = self.task
        scene = Scene(self.cluster, t.run_dir(name), output, job, t.save_every, t.validate_every)
        if self.root and own_disk:
            wait_until(scene.attempt, LIMIT_S, "the first attempt")
            kinds.mount(scene.run_dir / "checkpoints")
        return scene

    @contextmanager
    def run(self, name: str, *words: str, **how: Any) -> Iterator[Scene]:
        """Submit; when the block is left the job is gone. The file system goes with `close`."""
        scene = self.submit(name, *words, **how)
        try:
            yield scene
        finally:
            if scene.show()["JobState"] not in command.ENDED:
                self.cluster.slurm("scancel", scene.job)
                wait_until(lambda: scene.show()["JobState"] in command.ENDED, 60, "scancel")

    def close(self, name: str) -> None:
        """Give the run's file system back, and what is on it."""
        folder = self.task.run_dir(name) / "checkpoints"
        if self.root and folder.is_mount():
            kinds.unmount(folder)


def undisturbed(stage: Stage, name: str) -> RunResult:
    with stage.run(name) as scene:
        fields = wait_for_end(scene)
        result = _sum_up(RunResult(name, 0), scene, {})
        if fields["JobState"] != "COMPLETED" or result.attempts != 1:
            raise Stuck(f"the undisturbed run ended {fields['JobState']}: {scene.output}")
        return result


def disturbed(
    stage: Stage, name: str, faults: list[Fault], reference: str
) -> tuple[list[Result], RunResult, list[Fault]]:
    """The results, the run's own, and the faults for which the run was too short."""
    results: list[Result] = []
    run_result = RunResult(name, 0)
    left = list(faults)
    with stage.run(name) as scene:
        try:
            while left and _wait_for_moment(stage, scene, left[0]):
                result = Result(left[0].number, left[0].kind, left[0].phase, name)
                results.append(result)
                if not _one_fault(stage, scene, left[0], result):
                    results.pop()
                    break
                left.pop(0)
            if wait_for_end(scene)["JobState"] != "COMPLETED":
                raise Stuck(f"job {scene.job} ended {scene.show()['JobState']}")
        except (Stuck, ClusterError) as error:
            run_result.complaints.append(f"{error} (see {scene.output}, {scene.run_dir})")
            if results and not results[-1].complaints:
                results[-1].complaints.append(str(error))
        run_result.faults = len(results)
        _sum_up(run_result, scene, {r.attempt: r for r in results})
    if not run_result.complaints:
        run_result.complaints += _judge(stage, scene, results, reference)
    return results, run_result, left


def wait_for_end(scene: Scene) -> dict[str, str]:
    def look() -> dict[str, str] | None:
        time.sleep(0.3)
        fields = scene.show()
        return fields if fields["JobState"] in command.ENDED else None

    return wait_until(look, TRAIN_LIMIT_S, f"the end of job {scene.job}")


def _wait_for_moment(stage: Stage, scene: Scene, fault: Fault) -> bool:
    """Until the fault is due in an attempt that none has ended yet. False: the run is (nearly) done."""
    last_step = stage.task.max_steps - MARGIN_STEPS

    def look() -> str | None:
        attempt = scene.attempt()
        if attempt <= scene.hit:
            return None
        done = scene.steps(attempt)
        if done and done[-1] > last_step:
            return "over"
        if "action" in scene.record(attempt):
            raise Stuck(f"attempt {attempt} ended by itself: {scene.record(attempt).get('cause')}")
        phase = "model" if fault.phase == "resume" and attempt == 1 else fault.phase
        return "now" if scene.in_phase(phase, attempt, fault.steps) else None

    if wait_until(look, TRAIN_LIMIT_S, f"the moment of fault {fault.number} ({fault.phase})") == "over":
        return False
    time.sleep(fault.chance * DELAY_S[fault.phase])
    return True


def _one_fault(stage: Stage, scene: Scene, fault: Fault, result: Result) -> bool:
    """False if the run was done before the fault could tell: it is for another run then."""
    kind = SURVIVABLE[fault.kind]
    attempt = scene.attempt()
    result.attempt, result.time = attempt, time.time()
    kind.strike(scene, fault)

    def outcome() -> str | None:
        if "action" in scene.record(attempt) or scene.attempt() > attempt:
            return "ended"
        return "in place" if kind.in_place and kind.in_place(scene, attempt) else None

    try:
        ended = wait_until(outcome, LIMIT_S, f"the end of attempt {attempt}") == "ended"
        if ended:
            scene.hit = attempt
        else:
            scene.base = scene.steps(attempt)[-1]
    finally:
        if kind.mend:
            kind.mend(scene, fault)
    if ended and scene.record(attempt).get("action") == "finished":
        stage.say(f"  {fault.number:3d}  {fault.kind} ({fault.phase}): came too late, goes to another run")
        return False
    if ended:
        wait_until(lambda: scene.attempt() > attempt, LIMIT_S, f"the start of attempt {attempt + 1}")
        _compare_with_table(scene, kind, result)
    if kind.check:
        wait_until(lambda: scene.steps(scene.attempt()), LIMIT_S, f"a step of attempt {attempt + 1}")
        result.complaints += [line for line in [kind.check(scene, fault)] if line]
    verdict = "; ".join(result.complaints) or "as it should"
    told = f"{result.cause} -> {result.action}" if ended else "survived in place"
    where = f"{fault.kind} ({fault.phase}), {result.run} attempt {attempt}"
    stage.say(f"  {fault.number:3d}  {where}: {told}: {verdict}")
    return True


def _compare_with_table(scene: Scene, kind: kinds.Kind, result: Result) -> None:
    record = scene.record(result.attempt)
    # A batch shell that died with its node leaves a record without a cause; that is what "lost" means.
    result.cause = record.get("cause") or "lost"
    result.action = record.get("action") or "requeue"
    result.exit_code = record.get("exit_code")
    causes = kind.causes + (kind.early_causes if result.phase == "imports" else ())
    if result.cause not in causes:
        result.complaints.append(f"cause {result.cause}, not {' or '.join(causes)}")
    if result.action not in kind.actions:
        result.complaints.append(f"action {result.action}, not {' or '.join(kind.actions)}")


def _judge(stage: Stage, scene: Scene, results: list[Result], reference: str) -> list[str]:
    """Complaints about a finished run: against the undisturbed one, and attempts that nobody ended."""
    complaints = compare.differences(scene.run_dir, stage.task.run_dir(reference), stage.task.max_steps)
    struck = {r.attempt for r in results if r.cause}
    for attempt in range(1, scene.attempt()):
        if attempt not in struck:
            complaints.append(f"attempt {attempt} ended by itself: {scene.record(attempt).get('cause')}")
    return complaints


def _sum_up(result: RunResult, scene: Scene, by_attempt: dict[int, Result]) -> RunResult:
    """Times and repeated steps out of timing.jsonl and the attempts' records."""
    timing = scene.timing()
    stalls = [line["save_stall_s"] for line in timing if line["save_stall_s"]]
    result.stall_s, result.saves = sum(stalls), len(stalls)
    result.attempts = scene.attempt()
    records = [scene.record(n) for n in range(1, result.attempts + 1)]
    ends = [r.get("closed") or r.get("ended") or r["began"] for r in records]
    result.wall_s = max(ends, default=0.0) - records[0]["began"] if records else 0.0
    result.kept_s = sum(_durations(timing).values())
    for attempt, fault in by_attempt.items():
        later = [line for line in timing if line["attempt"] > attempt]
        before = [line["step"] for line in timing if line["attempt"] <= attempt]
        if not later or not fault.cause:
            continue
        fault.lost_steps = max(0, max(before, default=0) - later[0]["step"] + 1)
        if later[0]["attempt"] == attempt + 1:
            fault.resume_s = later[0]["time"] - fault.time
            fault.parts_s = _parts(scene, fault, records, later[0])
    return result


def _durations(timing: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds of each step when it was done last; what came between it and the step before is part of it
    (a validation), stalls for a save are not."""
    durations = {}
    for before, line in zip([None, *timing], timing):
        same = before is not None and before["attempt"] == line["attempt"]
        seconds = line["time"] - before["time"] if before is not None and same else line["step_s"]
        durations[line["step"]] = seconds - line["save_stall_s"] * same
    return durations


def _parts(
    scene: Scene, fault: Result, records: list[dict[str, Any]], first: dict[str, Any]
) -> dict[str, float]:
    """Where the time from the fault to the first new step went."""
    ended, began = records[fault.attempt - 1].get("closed"), records[fault.attempt]["began"]
    logs = scene.run_dir / "logs" / f"{fault.attempt + 1:04d}"
    data, met = (_written(logs / name) for name in ("data.json", "rendezvous.json"))
    marks = [fault.time, ended, began, data, met, first["time"] - first["step_s"], first["time"]]
    names = ["end noticed, decided", "requeue to begin (Slurm)", "srun, imports, data", "rendezvous",
             "model, checkpoint", "first step"]  # fmt: skip
    if any(mark is None for mark in marks):
        return {}
    return {name: b - a for name, a, b in zip(names, marks, marks[1:])}


def _written(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def as_dict(result: Result | RunResult) -> dict[str, Any]:
    return asdict(result)
