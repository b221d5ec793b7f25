"""Attempts and their lease, with real processes: two at once, a crash in between, a restart by Slurm."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from strop import files
from strop.errors import UserError
from strop.slurm import attempts, body, code, command, env, lease

SLEEPER = "import time; time.sleep(60)"


@pytest.fixture
def other():
    """Another process, which owns an attempt."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER])
    yield process
    process.kill()
    process.wait()


def begin(run, job=None, restart=0, pid=None, **more):
    return attempts.begin(run, job_id=job, restart_count=restart, nodes=["n1"], pid=pid, **more)


def test_record_from_begin_to_end(tmp_path):
    assert begin(tmp_path, "7", launcher="slurm") == 1
    assert attempts.read(tmp_path, 1)["state"] == "X"
    attempts.finish(tmp_path, 1, "YIELD", step=12, reason="USR1")
    record = json.loads((tmp_path / "attempts/0001.json").read_text())
    expected = {
        "attempt": 1,
        "state": "YIELD",
        "step": 12,
        "reason": "USR1",
        "job_id": "7",
        "launcher": "slurm",
    }
    assert expected.items() <= record.items()
    assert begin(tmp_path, "7", 1) == 2
    assert [r["state"] for r in attempts.read_all(tmp_path)] == ["YIELD", "X"]


def test_living_process_holds_the_run(tmp_path, other):
    begin(tmp_path, pid=other.pid)
    with pytest.raises(lease.Held, match=f"process {other.pid} on"):
        begin(tmp_path)
    other.kill()
    other.wait()
    assert begin(tmp_path) == 2


def test_reused_process_id_is_another_process(tmp_path):
    begin(tmp_path, pid=os.getpid())
    attempts.update(tmp_path, 1, pid_start="1")  # that one started with the machine
    assert begin(tmp_path) == 2


def test_process_of_another_host_is_judged_by_its_sign_of_life(tmp_path):
    begin(tmp_path)
    attempts.update(tmp_path, 1, host="elsewhere")
    with pytest.raises(lease.Held, match="on elsewhere"):
        begin(tmp_path)
    old = time.time() - lease.HEARTBEAT_LIMIT_S - 1
    os.utime(tmp_path / "attempts/0001.json", (old, old))
    assert begin(tmp_path) == 2


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "CONFIGURING"])
def test_living_job_holds_the_run(tmp_path, monkeypatch, state):
    begin(tmp_path, "7")
    monkeypatch.setattr(command, "show_job", lambda target: {"JobId": target, "JobState": state})
    with pytest.raises(lease.Held, match=f"job 7 \\({state}\\)"):
        begin(tmp_path, "8")


@pytest.mark.parametrize("job", [None, {"JobState": "PENDING"}, {"JobState": "CANCELLED"}])
def test_job_that_runs_no_more_does_not(tmp_path, monkeypatch, job):
    begin(tmp_path, "7")
    monkeypatch.setattr(command, "show_job", lambda target: job)
    assert begin(tmp_path, "8") == 2


def test_dying_job_is_waited_for(tmp_path, monkeypatch):
    begin(tmp_path, "7")
    states = iter(["COMPLETING", "COMPLETING", "CANCELLED"])
    monkeypatch.setattr(command, "show_job", lambda target: {"JobState": next(states)})
    assert begin(tmp_path, "8") == 2
    assert next(states, None) is None


def test_restart_supersedes_its_earlier_self(tmp_path, monkeypatch):
    """Slurm restarts a job only when it has ended it: no question to the controller is needed."""
    monkeypatch.setattr(command, "show_job", lambda target: pytest.fail("asked"))
    begin(tmp_path, "7", 0)
    assert begin(tmp_path, "7", 1) == 2


def test_two_at_once(tmp_path):
    """Sixteen start together; one gets the run, the others learn who has it.

    Some find the winner's record half-written, and must look again instead of waiting until it is stale.
    """
    results, barrier = [], threading.Barrier(16)

    def one():
        barrier.wait()
        try:
            results.append(begin(tmp_path))
        except lease.Held as error:
            results.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(1) == 1
    assert sum(isinstance(r, str) and f"process {os.getpid()}" in r for r in results) == 15
    assert [r["attempt"] for r in attempts.read_all(tmp_path)] == [1]


@pytest.mark.parametrize("rest", ["", '{"attempt": 1, "sta'])
def test_creator_died_while_it_wrote(tmp_path, monkeypatch, rest):
    (tmp_path / "attempts").mkdir()
    path = tmp_path / "attempts/0001.json"
    path.write_text(rest)
    with pytest.raises(lease.Held):  # just now: it may still be writing
        begin(tmp_path, wait_s=0)
    old = time.time() - lease.CREATION_LIMIT_S - 1
    os.utime(path, (old, old))
    assert begin(tmp_path) == 2


def test_crash_between_aside_and_rename_leaves_the_old_record(tmp_path, monkeypatch):
    begin(tmp_path)
    monkeypatch.setattr(files.os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        attempts.finish(tmp_path, 1, "DONE", step=1)
    assert [r["state"] for r in attempts.read_all(tmp_path)] == ["X"]


def test_committed_step_needs_the_marker(tmp_path):
    assert attempts.committed_step(tmp_path) is None
    for name, marked in [
        ("step-000009", True),
        ("step-000010", True),
        ("step-000011", False),
        ("step-12.a1.tmp", True),
    ]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if marked:
            (tmp_path / "checkpoints" / name / "COMMITTED.json").write_text("{}")
    assert attempts.committed_step(tmp_path) == 10


def test_first_verdict_stays(tmp_path):
    for message in ("first", "second"):
        attempts.write_verdict(
            tmp_path, 1, 37, kind="exception", exit_code=1, message=message, step=4, phase="SAVE"
        )
    verdict = json.loads((tmp_path / "logs/0001/verdict-00037.json").read_text())
    assert (verdict["message"], verdict["rank"], verdict["phase"]) == ("first", 37, "SAVE")


def test_fingerprint_is_the_place_and_not_the_values():
    trace = 'Traceback:\n  File "/a/x.py", line 3, in f\n  File "/a/y.py", line {}, in g\nValueError: {}\n'
    same = {attempts.fingerprint("ValueError", trace.format(9, value)) for value in ("loss 1.5", "loss 2.5")}
    assert len(same) == 1
    assert attempts.fingerprint("ValueError", trace.format(10, "loss 1.5")) not in same
    assert attempts.fingerprint("KeyError", trace.format(9, "loss 1.5")) not in same
    assert attempts.fingerprint("X", "port 1234 in use") == attempts.fingerprint("X", "port 99 in use")


# --- the body's `begin`: what it refuses


def job(job_id="7", restart=0):
    return env.Job(job_id, None, None, restart, ("n1",), "slurm", None, None, os.getpid(), None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "show_job", lambda target: {"JobId": target, "JobState": "COMPLETED"})
    return tmp_path


def test_directory_of_something_else(here):
    (here / "runs/x").mkdir(parents=True)
    (here / "runs/x/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"is not a run.*thesis\.tex"):
        body.begin("dpo", ["run.name=x"], job())
    assert [p.name for p in (here / "runs/x").iterdir()] == ["thesis.tex"]


def test_number_that_another_job_had(here):
    """Job numbers start anew with a new cluster; dpo-7 of last year must not be resumed by accident."""
    body.begin("dpo", [], job())
    with pytest.raises(UserError, match="earlier job of the same number"):
        body.begin("dpo", [], job())
    assert body.begin("dpo", [], job(restart=1)).attempt == 2


def test_code_is_pinned_once_there_is_a_checkpoint(here, monkeypatch):
    codes = iter(["a", "b", "c", "c", "c"])
    monkeypatch.setattr(code, "identify", lambda: {"digest": next(codes), "commit": None})
    body.begin("dpo", ["run.name=x"], job())
    run = body.begin("dpo", ["run.name=x"], job(restart=1)).run_dir  # nothing of a's is in the model yet
    (run / "checkpoints/step-000001").mkdir(parents=True)
    (run / "checkpoints/step-000001/COMMITTED.json").write_text("{}")
    with pytest.raises(UserError, match="digest b then, digest c now"):
        body.begin("dpo", ["run.name=x"], job(restart=2))
    stage = here / "runs/p.pipeline/sft.yaml"  # a pipeline's command line needs the stage's name
    stage.parent.mkdir()
    stage.write_text("run:\n  name: x\n")
    monkeypatch.setattr(code, "identify", lambda: {"digest": "c", "commit": None})
    for words, said in ((["--config", str(stage)], "sft.run.allow"), (["run.name=x"], "run.allow")):
        with pytest.raises(UserError, match=rf" say {said}_code_change=true to go on"):
            body.begin("dpo", words, job(restart=2))
    begun = body.begin("dpo", ["run.name=x", "run.allow_code_change=true"], job(restart=2))
    assert "going on" in begun.notes[0]
    assert body.begin("dpo", ["run.name=x"], job(restart=3)).notes == ()  # it is c's run now


def test_digest_sees_every_source_file(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    digests = [code.identify()["digest"]]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").write_text("no source")
    assert code.identify()["digest"] == digests[0]
    for name, text in [("a.py", "x = 2\n"), ("b.cu", ""), ("c.py", ""), ("c.py", "y")]:
        (tmp_path / name).write_text(text)
        digests.append(code.identify()["digest"])
    assert len(set(digests)) == 5


def test_deaths_without_a_word_are_counted_at_the_start(here):
    """The batch shell died too, ten times: there was no `end` that could have counted."""
    for restart in range(10):
        body.begin("dpo", ["run.name=x"], job(restart=restart))
    with pytest.raises(body.Exhausted, match="10 times"):
        body.begin("dpo", ["run.name=x"], job(restart=10))
    assert body.begin("dpo", ["run.name=x"], job("8")).attempt == 11  # somebody submitted it anew


# --- the body's `end`: the controller is away when the job wants to be put back


def ended_with(here, monkeypatch, answers, clock=None):
    """An attempt that yielded; `answers` of scontrol, in order; the text of its clock.json. Its directory and
    the decision."""
    body.begin("dpo", ["run.name=x"], job())
    if clock is not None:
        logs = attempts.log_dir(here / "runs/x", 1)
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "clock.json").write_text(clock)
    attempts.finish(here / "runs/x", 1, "YIELD", step=12, reason="USR1")

    def slurm(args, *, deadline_s=60.0):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(command, "slurm", slurm)
    monkeypatch.setattr(
        command, "show_job", lambda target, **_: command.parse_jobs(command.slurm(["show"]))[0]
    )
    mine = dataclasses.replace(job(), run_dir=here / "runs/x", attempt=1)
    return here / "runs/x", body.end(mine, 0, ["USR1"])


RUNNING = "JobId=7 JobName=dpo\n   JobState=RUNNING\n   Requeue=1 Restarts=0 BatchFlag=1\n"


def test_the_controller_stays_away(here, monkeypatch):
    gone = command.NoController("Unable to contact slurm controller")
    run, decision = ended_with(here, monkeypatch, [gone, gone, gone])
    assert (decision.action, decision.exit_code, decision.cause) == ("pending", 75, "time_limit")
    record = attempts.read(run, 1)
    assert (record["action"], record["exit_code"]) == ("pending", 75)
    assert (run / "requeue_pending").read_text() == "scontrol requeue 7\n"
    assert "still to be done" in decision.summary


def test_cancelled_while_the_controller_was_away(here, monkeypatch):
    cancelled = RUNNING.replace("RUNNING", "COMPLETING")
    run, decision = ended_with(here, monkeypatch, [command.NoController("timed out"), cancelled])
    assert (decision.action, decision.cause) == ("stop", "cancelled")
    assert not (run / "requeue_pending").exists()


def test_a_full_disk_holds_the_job_although_nothing_can_be_recorded(here, monkeypatch):
    def full(*_args, **_fields):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    update = attempts.update
    monkeypatch.setattr(attempts, "update", lambda *a, **f: full() if "cause" in f else update(*a, **f))
    asked = [RUNNING, ""]
    _, decision = ended_with(here, monkeypatch, asked)
    assert (decision.action, decision.exit_code, decision.cause) == ("hold", 74, "storage")
    assert "GiB free" in decision.summary
    assert decision.summary.endswith("scontrol release 7")
    assert asked == []


def test_a_refused_requeue_ends_with_75(here, monkeypatch):
    run, decision = ended_with(here, monkeypatch, [RUNNING, command.SlurmError("Access/permission denied")])
    assert (decision.action, decision.exit_code) == ("stop", 75)
    assert not (run / "requeue_pending").exists()


def test_pending_means_that_it_is_requeued_already(here, monkeypatch):
    run, decision = ended_with(here, monkeypatch, [RUNNING, command.SlurmError("Job is pending execution")])
    assert (decision.action, decision.exit_code) == ("requeue", 75)
    assert not (run / "requeue_pending").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"time": float("nan")},
        {"time": 1e300},
        {"message": 5},
        {"node": ["n"]},
        {"step": "s"},
        {"traceback": {}},
    ],
)
def test_a_verdict_with_absurd_values_is_no_verdict(tmp_path, wrong):
    attempts.write_verdict(tmp_path, 1, 0, kind="exception", exit_code=1, message="m")
    path = attempts.log_dir(tmp_path, 1) / "verdict-00000.json"
    whole = json.loads(path.read_text())
    assert attempts.read_verdict(path) == whole
    path.write_text(json.dumps({**whole, **wrong}))
    assert attempts.read_verdict(path) is None


@pytest.mark.parametrize(
    "text", ['{"began": NaN}', '{"closed": 1e308}', '{"nodes": 7}', '{"args": "x"}', "[" * 100_000]
)
def test_a_record_with_absurd_values_is_broken(tmp_path, text):
    begin(tmp_path)
    attempts.record_file(tmp_path, 1).write_text(text)
    assert attempts.read(tmp_path, 1)["broken"]


@pytest.mark.parametrize("offset", ["NaN", "1e12", "null"])
def test_an_absurd_clock_is_refused(tmp_path, offset):
    folder = attempts.log_dir(tmp_path, 1)
    folder.mkdir(parents=True)
    (folder / "clock.json").write_text(f'{{"ranks": [{{"rank": 0, "node": "n", "offset_s": {offset}}}]}}')
    with pytest.raises((TypeError, ValueError)):
        attempts.read_clocks(tmp_path, 1)


@pytest.mark.parametrize("text", ['{"ranks": [{"rank": 0}]}', '{"ranks": [{"rank"', '{"ranks": 3}', "[]"])
def test_a_damaged_clock_keeps_no_job_from_its_requeue(here, monkeypatch, text):
    _, decision = ended_with(here, monkeypatch, [RUNNING, ""], text)
    assert (decision.action, decision.cause) == ("requeue", "time_limit")
