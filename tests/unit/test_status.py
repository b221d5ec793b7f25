"""Runs built by hand as files, at fixed times; states, costs and text are worked out by hand beside them."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import pytest
from rich.console import Console

from strop.errors import UserError
from strop.obs import run_files, status, status_text
from strop.slurm import command, lease
from tools import status as tool

T = 1_800_000_000.0
"""When the first attempt began."""
CONFIG = """\
algo: dpo
train: {max_steps: 10, max_epochs: 1.0, global_batch_size: 4, limit_train_batches: null}
validation: {every: 4, at_start: false, at_end: true}
log: {every: 1}
"""


class RunDir:
    """A run directory that is written piece by piece."""

    def __init__(self, path: Path, config: str = CONFIG) -> None:
        self.path = path
        (path / "attempts").mkdir(parents=True)
        (path / "config.yaml").write_text(config)

    def attempt(self, number: int, began: float, heartbeat: float | None = None, **fields) -> dict:
        record = {
            "attempt": number,
            "state": "X",
            "job_id": "17",
            "target": "17",
            "restart_count": number - 1,
            "host": "n1",
            "pid": 1,
            "pid_start": "1",
            "nodes": ["n1", "n2"],
            "began": T + began,
            "committed_step": None,
            "launcher": "slurm",
            "algo": "dpo",
            "args": ["run.name=r"],
            **fields,
        }
        file = self.path / "attempts" / f"{number:04d}.json"
        file.write_text(json.dumps(record))
        os.utime(file, (T + (heartbeat or began), T + (heartbeat or began)))
        return record

    def steps(self, attempt: int, steps: range, first_end: float, step_s: float = 2.0) -> None:
        """One step after another, the first of them done at `first_end`."""
        with open(self.path / "timing.jsonl", "a") as timing, open(self.path / "metrics.jsonl", "a") as lines:
            for i, step in enumerate(steps):
                time = T + first_end + i * step_s
                line = {
                    "step": step,
                    "time": time,
                    "attempt": attempt,
                    "step_s": step_s,
                    "tokens_per_s": 50.0,
                }
                timing.write(json.dumps(line) + "\n")
                lines.write(json.dumps({"step": step, "loss": 0.5, "learning_rate": 1e-6}) + "\n")

    def evaluation(self, step: int) -> None:
        with open(self.path / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps({"step": step, "eval_loss": 0.4, "eval_rewards/accuracies": 0.75}) + "\n")

    def commit(self, step: int) -> None:
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        manifest = {"files": {"a": {"size": 2**30}, "b": {"size": 2**29}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "COMMITTED.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "runs" / "r")


@pytest.fixture
def slurm(monkeypatch):
    """slurm(JobState="PENDING", ...): what scontrol would answer; None: it has forgotten the job."""
    monkeypatch.setattr(run_files.shutil, "which", lambda name: f"/bin/{name}")

    def answer(**job):
        record = {"JobId": "17", **job} if job else None
        monkeypatch.setattr(command, "show_job", lambda target, deadline_s: record)

    answer()
    return answer


def assess(run: RunDir, now: float) -> status.Status:
    return status.assess(run_files.read(run.path, now=T + now))


def interrupted(run: RunDir) -> None:
    """Attempt 1: 10 s to start, steps 1-6 of 2 s, step 4 committed, killed at 24 s. 6 s in the queue.
    Attempt 2: from 30 s on, 5 s to start, steps 5-8 of 2 s; step 8 committed."""
    run.attempt(1, 0, cause="killed", action="requeue", state="FAIL", closed=T + 24, summary="a rank died")
    run.attempt(2, 30, heartbeat=40, committed_step=4)
    run.steps(1, range(1, 7), first_end=12)
    run.steps(2, range(5, 9), first_end=37)
    run.commit(4)
    run.commit(8)


def test_cost_of_an_interruption(run, slurm):
    interrupted(run)
    slurm(JobState="RUNNING", Restarts="1", EndTime="2027-01-15T10:00:00")
    s = assess(run, now=45)
    first, second = s.attempts
    # Step 4 was done at 12 + 3 * 2 = 18 s, the death came at 24 s; step 5 of attempt 2 began at 35 s.
    assert (first.lost_s, first.resume_s, first.repeated_steps, first.steps) == (6.0, 5.0, 2, 6)
    assert (second.lost_s, second.ended, second.cause, second.committed_step) == (None, None, None, 8)
    # Steps 1-8 once: 16 s; attempts ran 24 s and 15 s.
    assert (s.kept_s, s.wall_s, s.queue_s) == (16.0, 45.0, 6.0)
    assert s.effective_ratio == pytest.approx(16 / 39)
    assert (s.state, s.step, s.total_steps, s.eta_s, s.tokens_per_s) == ("validating", 8, 10, 4.0, 50.0)
    run.evaluation(8)
    assert assess(run, now=45).state == "training"


def test_between_two_attempts_nothing_runs(run, slurm):
    """Slurm has started the job again, and its batch shell has not come to `begin` yet."""
    interrupted(run)
    (run.path / "attempts" / "0002.json").unlink()
    slurm(JobState="RUNNING", Restarts="1")
    s = assess(run, now=30)
    assert (s.state, s.attempts[-1].ended, s.wall_s, s.queue_s) == ("starting", T + 24, 30.0, 6.0)


def test_a_dead_run_keeps_only_what_is_committed(run, slurm):
    """Slurm has forgotten the job: nobody goes on. Steps 5 and 6 lie beyond the commit of step 4."""
    run.attempt(1, 0, heartbeat=23)
    run.steps(1, range(1, 7), first_end=12)
    run.commit(4)
    s = assess(run, now=5000)
    assert (s.state, s.kept_s, s.wall_s, s.attempts[0].cause) == ("dead", 8.0, 23.0, "lost")
    assert s.attempts[0].lost_s == 23 - 18
    assert s.next_action.endswith("sbatch --nodes=2 sbatch/dpo.sh run.name=r")
    assert "step 4" in s.next_action


def test_death_before_the_first_commit_loses_all_steps(run, slurm):
    run.attempt(1, 0, cause="killed", action="requeue", state="FAIL", closed=T + 24)
    run.attempt(2, 30, heartbeat=31)
    run.steps(1, range(1, 7), first_end=12)
    slurm(JobState="RUNNING", Restarts="1")
    s = assess(run, now=33)
    assert (s.attempts[0].lost_s, s.attempts[0].resume_s, s.state) == (14.0, None, "starting")


END = {"state": "FAIL", "closed": T + 9, "cause": "exception"}
CASES = [
    # fields of the last record, Slurm's answer, state, a piece of the next action
    ({}, {"JobState": "RUNNING", "Restarts": "0"}, "starting", "it runs in job 17 on n1, n2"),
    ({}, {"JobState": "RUNNING", "Restarts": "1"}, "starting", "it runs"),
    ({}, {"JobState": "COMPLETING"}, "stopping", "the job ends"),
    ({}, {"JobState": "PENDING", "Reason": "BeginTime"}, "queued", "(BeginTime), Slurm does not know yet"),
    ({}, {"JobState": "PENDING", "Reason": "JobHeldUser"}, "held", "scontrol release 17"),
    ({}, {"JobState": "CANCELLED"}, "cancelled", "submit it again"),
    ({}, {"JobState": "FAILED"}, "dead", "submit it again"),
    ({**END, "action": "requeue"}, {}, "dead", "submit it again"),
    (
        {**END, "action": "requeue"},
        {"JobState": "PENDING", "Reason": "None", "StartTime": "2027-01-15T10:00:00"},
        "queued",
        "pending in the queue, Slurm expects it to start at 2027-01-15T10:00:00",
    ),
    ({**END, "action": "requeue"}, {"JobState": "RUNNING", "Restarts": "0"}, "stopping", "decides"),
    ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "JobHeldAdmin"}, "held", "release 17"),
    ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "Resources"}, "queued", "Resources"),
    ({**END, "action": "stop", "cause": "user"}, {}, "failed", "see to the cause"),
    ({**END, "action": "stop", "cause": "diverged"}, {}, "failed", "start a new run"),
    ({**END, "action": "stop", "cause": "cancelled"}, {}, "cancelled", "to go on"),
    ({**END, "action": "stop", "cause": "time_limit", "state": "YIELD"}, {}, "stopped", "to go on"),
    ({**END, "action": "finished", "cause": "done", "state": "DONE"}, {}, "finished", "convert_dcp_to_hf"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "job", "state", "action"), CASES)
def test_states(run, slurm, fields, job, state, action):
    run.attempt(1, 0, heartbeat=5, **fields)
    slurm(**job)
    s = assess(run, now=10)
    assert s.state == state
    assert action in s.next_action


@pytest.mark.parametrize(
    # what was recorded, the state of the successor (job 18) beside Slurm's other words for it
    ("fields", "behind", "state", "action"),
    [
        ({**END, "action": "successor"}, {"JobState": "PENDING", "Reason": "Dependency"}, "queued", "job 18"),
        ({**END, "action": "successor"}, {"JobState": "RUNNING"}, "starting", "nothing"),
        ({**END, "action": "hold"}, {"JobState": "PENDING", "Reason": "JobHeldUser"}, "held", "release 18"),
        ({}, {"JobState": "PENDING", "Reason": "Priority"}, "queued", "job 18"),  # killed: nothing recorded
        ({**END, "action": "successor"}, {"JobState": "CANCELLED"}, "dead", "submit it again"),
        ({**END, "action": "successor"}, None, "dead", "submit it again"),  # forgotten
    ],
)
def test_a_successor_goes_on_when_the_job_has_ended(run, slurm, monkeypatch, fields, behind, state, action):
    run.attempt(1, 0, **{**fields, "successor": "18"})
    jobs = {"17": {"JobId": "17", "JobState": "COMPLETED"}, "18": behind and {"JobId": "18", **behind}}
    monkeypatch.setattr(command, "show_job", lambda target, deadline_s: jobs[target])
    s = assess(run, 60)
    assert s.state == state
    assert action in s.next_action
    assert s.job_id == ("17" if state == "dead" else "18")


def test_while_the_job_runs_its_successor_is_not_asked_about(run, slurm, monkeypatch):
    run.attempt(1, 0, successor="18")
    monkeypatch.setattr(
        command, "show_job", lambda target, deadline_s: {"17": {"JobId": "17", "JobState": "RUNNING"}}[target]
    )
    assert (assess(run, 60).state, assess(run, 60).job_id) == ("starting", "17")


def test_without_slurm_the_heartbeat_decides(run, monkeypatch):
    monkeypatch.setattr(run_files.shutil, "which", lambda name: None)
    run.attempt(1, 0, heartbeat=100)
    assert assess(run, now=100 + lease.HEARTBEAT_LIMIT_S - 1).state == "starting"
    assert assess(run, now=100 + lease.HEARTBEAT_LIMIT_S + 1).state == "dead"


def test_a_local_run_is_looked_up_by_its_process(run):
    me = os.getpid()
    mine = {"job_id": None, "target": None, "launcher": "local", "host": socket.gethostname(), "pid": me}
    run.attempt(1, 0, **mine, pid_start=lease.process_start(me))
    assert assess(run, now=10).state == "starting"
    run.attempt(1, 0, **mine, pid_start="1")  # a process of that number, but another one
    s = assess(run, now=10)
    assert s.state == "dead"
    assert s.next_action.endswith(
        "STROP_LAUNCHER=local STROP_LOCAL_RANKS=1 bash sbatch/lib.sh dpo run.name=r"
    )


def test_phases(run, slurm):
    run.attempt(1, 0)
    slurm(JobState="RUNNING", Restarts="0")
    run.steps(1, range(1, 4), first_end=5)
    assert assess(run, now=10).state == "training"
    (run.path / "checkpoints" / "step-000003.a1.tmp").mkdir(parents=True)
    assert assess(run, now=10).state == "saving"
    (run.path / "checkpoints" / "step-000003.a1.tmp").rename(run.path / "checkpoints" / "step-000002.a0.tmp")
    assert assess(run, now=10).state == "training"
    run.path.joinpath("attempts", "0001.stop").write_text("USR1\n")
    assert assess(run, now=10).detail == "asked to stop: USR1"


def test_total_steps_of_an_extended_run_and_of_epochs(run, slurm):
    run.attempt(1, 0, args=["run.name=r", "max_steps=25"])
    assert assess(run, now=1).total_steps == 25
    (run.path / "config.yaml").write_text(CONFIG.replace("max_steps: 10", "max_steps: null"))
    run.attempt(1, 0, args=["train.max_epochs=2.5"])
    assert assess(run, now=1).total_steps is None  # the rows are not known yet
    (run.path / "data").mkdir()
    (run.path / "data" / "ledger.json").write_text('{"train": {"used": 9}}')
    assert assess(run, now=1).total_steps == 8  # 9 rows / 4 = 3 steps an epoch, 2.5 of them: 7.5


def test_only_the_last_steps_make_the_eta(run, slurm):
    """40 slow steps, then 32 fast ones: 31 gaps count."""
    (run.path / "config.yaml").write_text(CONFIG.replace("max_steps: 10", "max_steps: 100"))
    run.attempt(1, 0)
    run.steps(1, range(1, 41), first_end=10, step_s=10)
    run.steps(1, range(41, 73), first_end=401, step_s=1)
    slurm(JobState="RUNNING", Restarts="0")
    assert assess(run, now=440).eta_s == 28.0


def test_damaged_files_are_left_out(run, slurm):
    interrupted(run)
    for name in ("timing.jsonl", "metrics.jsonl"):
        with open(run.path / name, "ab") as file:
            file.write(b"[1]\nnot json\n\xff\xfe\n" + b'{"step": 9, "lo')  # the last one torn
    (run.path / "attempts" / "0003.json").write_text('{"attempt": 3, "sta')
    (run.path / "config.yaml").write_text("a: [")
    (run.path / "checkpoints" / "BEST.json").write_text("")
    (run.path / "checkpoints" / "step-000006").mkdir()  # no marker
    (run.path / "checkpoints" / "step-000002.damaged-1").mkdir()
    os.utime(run.path / "attempts" / "0003.json", (T + 50, T + 50))
    s = assess(run, now=60)
    assert (s.step, s.total_steps, len(s.attempts), s.state) == (8, None, 3, "starting")
    assert s.checkpoints.committed == (4, 8)
    assert (s.checkpoints.damaged, s.checkpoints.best) == (("step-000002.damaged-1",), None)
    assert assess(run, now=200).state == "dead"


def test_a_record_of_nothing_but_braces(run, slurm):
    run.attempt(1, 0)
    (run.path / "attempts" / "0001.json").write_text("{}")
    assert assess(run, now=10_000_000).state == "dead"


def text(what) -> str:
    out = io.StringIO()
    Console(file=out, width=tool.PIPE_WIDTH, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


GOLDEN = """\
r  training
[###################.....] 8/10  50 tok/s  eta 4.0 s
training:    step 8  loss 0.5000  lr 1.0e-06
validation:  step 8  loss 0.4000  acc 0.75
checkpoints: committed 4, 8 (1.50 GiB each); best 8 (eval_loss 0.4)

#  nodes  began             took  cause              action   steps  committed  repeated   lost  resume
1  n1,n2  01-15 08:00:00  24.0 s  a rank was killed  requeue      6  4                 2  6.0 s   5.0 s
2  n1,n2  01-15 08:00:30          training                        4  8                 0

effective:   41.0% (16.0 s in steps that count, of 39.0 s since the first start; interruptions cost 11.0 s); \
6.0 s in the queue beside it
next:        nothing: it runs in job 17 on n1, n2 until 2027-01-15T10:00:00 at most"""


def test_page(run, slurm, monkeypatch):
    monkeypatch.setattr(status_text.time, "localtime", status_text.time.gmtime)
    interrupted(run)
    run.evaluation(8)
    (run.path / "checkpoints" / "BEST.json").write_text('{"step": 8, "metric": "eval_loss", "value": 0.4}')
    slurm(JobState="RUNNING", Restarts="1", EndTime="2027-01-15T10:00:00")
    assert text(status_text.page(assess(run, now=45))) == GOLDEN


def test_listing(run, slurm):
    interrupted(run)
    run.evaluation(8)
    slurm(JobState="RUNNING", Restarts="1")
    assert text(status_text.listing([assess(run, now=45)])).splitlines() == [
        "run  state     progress             eta  tok/s    loss  attempts  job",
        "r    training  [########..] 8/10  4.0 s     50  0.5000  2         17",
    ]


def main(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(tool.sys, "argv", ["status", *argv])
    try:
        tool.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_tool(run, slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    failed = RunDir(tmp_path / "runs" / "bad")
    failed.attempt(1, 0, state="FAIL", cause="user", action="stop", closed=T + 3)
    run.attempt(1, 0, state="DONE", cause="done", action="finished", closed=T + 9)
    (tmp_path / "runs" / ".cache").mkdir()
    os.utime(run.path / "attempts", (1, 1))  # the older one
    assert main(monkeypatch) == 0  # a failed run is named only in the list
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["bad", "failed"],
        ["r", "finished"],
    ]
    assert main(monkeypatch, "r") == 0
    assert main(monkeypatch, "runs/bad") == 1
    capsys.readouterr()
    assert main(monkeypatch, "--json", "r", "runs/bad") == 1
    seen = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["state"]) for r in seen["runs"]] == [("r", "finished"), ("bad", "failed")]
    documented = tool.__doc__ or ""
    for known in (seen["runs"][0], seen["runs"][0]["attempts"][0], seen["runs"][0]["checkpoints"]):
        assert [key for key in known if key not in documented] == []


def test_watching_ends_when_nothing_moves_any_more(run, slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    interrupted(run)
    slurm(JobState="RUNNING", Restarts="1")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        run.attempt(2, 30, committed_step=4, state="DONE", cause="done", action="finished", closed=T + 50)

    monkeypatch.setattr(tool.time, "sleep", sleep)
    assert main(monkeypatch, "--watch", "runs/r") == 0
    assert looks == [tool.WATCH_S]
    assert "finished" in capsys.readouterr().out


def test_no_such_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "foreign").mkdir()
    (tmp_path / "runs" / "foreign" / "notes.txt").touch()
    root = Path("runs")
    for name, expected in [
        ("runs/rr", "runs/rr: no such run; there is r"),
        ("empty", "runs/empty: not a run of strop: no attempts/ in it (it is empty)"),
        ("runs/foreign", "runs/foreign: not a run of strop: no attempts/ in it (it holds notes.txt)"),
        ("runs/foreign/notes.txt", "notes.txt: not a run of strop: no attempts/ in it (it is a file)"),
    ]:
        with pytest.raises(UserError) as caught:
            tool.find([name], root)
        assert expected in str(caught.value)
