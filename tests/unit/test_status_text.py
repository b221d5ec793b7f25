"""What tools.status prints, of runs built by hand: pages worked out by hand, exit codes, JSON."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from strop.errors import UserError
from strop.obs import status_text
from tests.unit.status_runs import RunDir, T, assess, interrupted
from tools import status as tool


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
        ("runs/rr", "runs/rr: no such run; did you mean r?"),
        ("other", "runs/other: no such run; there is r"),
        ("empty", "runs/empty: not a run of strop: no attempts/ in it (it is empty)"),
        ("runs/foreign", "runs/foreign: not a run of strop: no attempts/ in it (it holds notes.txt)"),
        ("runs/foreign/notes.txt", "notes.txt: not a run of strop: no attempts/ in it (it is a file)"),
    ]:
        with pytest.raises(UserError) as caught:
            tool.find([name], root)
        assert expected in str(caught.value)
