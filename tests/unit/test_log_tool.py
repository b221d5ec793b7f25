"""tools.logs as a user calls it: golden output, options, pipes, and mistakes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from strop.errors import UserError
from strop.obs import log_files
from strop.obs.log_text import Selection, View
from strop.obs.merge import Merge
from tests.unit.log_helpers import BEGAN_S, LogRun, line
from tools import logs as tool

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NEWEST_US = int(1e6 * (BEGAN_S + 100))
"""2026-11-20 03:01:40"""


@pytest.fixture
def run(tmp_path: Path) -> LogRun:
    """Four ranks on two nodes whose clocks differ by 2 s; the second attempt dies."""
    run = LogRun(tmp_path / "runs" / "demo")
    offsets = {0: 0.0, 1: 0.0, 2: 2.0, 3: 2.0}
    run.attempt(1, offsets, job_id="77")
    run.attempt(2, offsets, began=60, job_id="77")
    for rank in range(4):
        skew = offsets[rank]
        text = f"loaded shard {3 + rank} of 16 in {0.8 + rank / 10:.1f} s"
        run.write(rank, line(1 + skew, "rendezvous done", rank=rank, phase="start"))
        run.write(rank, line(2 + skew + rank / 10, text, rank=rank, phase="start"))
        run.write(rank, line(70 + skew, "resumed", rank=rank, attempt=2, step=10, phase="start"), attempt=2)
    run.write(0, line(3, "loss 0.69", step=1, phase="train"), line(4, "loss 0.68", step=2, phase="train"))
    trace = 'Traceback (most recent call last):\n  File "train.py", line 3, in step\nRuntimeError: no'
    last = {"attempt": 2, "step": 12, "phase": "train"}
    failed = line(85, "RuntimeError: no", rank=2, level="ERROR", traceback=trace, raw=[0, 15], **last)
    run.write(2, failed, b'{"time":"2026-11', attempt=2)
    raw = run.write(2, b"NCCL WARN torn\n", attempt=2, raw=True)
    os.utime(raw, (BEGAN_S + 83, BEGAN_S + 83))
    for path in run.directory.glob("logs/*/*.jsonl"):
        os.utime(path, (BEGAN_S + 100, BEGAN_S + 100))
    return run


def call(
    *words: object, cwd: Path | None = None, code: int = 0, env: dict[str, str] | None = None
) -> tuple[str, str]:
    root = Path(__file__).resolve().parents[2]
    paths = f"{root}:{root / 'src'}"
    process = subprocess.run(
        [sys.executable, "-m", "tools.logs", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **(env or {})},
    )
    assert process.returncode == code, process.stderr
    return process.stdout, process.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", []),
        ("ranges", ["--ranges", "--no-raw"]),
        ("colour", ["--no-collapse", "--color", "always", "--level", "warning"]),
        ("json", ["--json", "--rank", "2", "--attempt", "last"]),
    ],
)
def test_golden(run: LogRun, name: str, options: list[str]) -> None:
    """Looked through by eye when it was written; the clocks' 2 s are gone from every line."""
    out, err = call(run.directory, *options)
    assert out == (GOLDEN / f"logs_{name}.txt").read_text()
    torn = "1 line(s) in another form than strop's, shown as RAW (attempt 2: rank 2)"
    assert err.splitlines()[0] == f"logs: {torn}"
    assert len(err.splitlines()) == 2


def test_the_newest_run_is_taken_without_a_name(run: LogRun, tmp_path: Path) -> None:
    other = LogRun(tmp_path / "runs" / "older")
    other.attempt(1)
    os.utime(other.directory / "attempts", (1, 1))
    assert call("--tail", "1", cwd=tmp_path)[0] == call("demo", "--tail", "1", cwd=tmp_path)[0] != ""


def test_each_selection_reaches_the_merge(run: LogRun) -> None:
    """How many lines each leaves of the 17, counted by hand."""
    counts = {
        ("--rank", "0,2-3"): 14, ("--node", "n[0]"): 8, ("--attempt", "1"): 10, ("--level", "ERROR"): 1,
        ("--since", "20s"): 3, ("--until", "03:00:01"): 4, ("--step", "1"): 1, ("--step", "2:12"): 8,
        ("--phase", "train"): 4, ("--grep", "RuntimeError|NCCL"): 2, ("--tail", "3"): 3, ("--no-raw",): 16,
        ("--step", "11:"): 2,
    }  # fmt: skip
    for options, number in counts.items():
        out, _ = call(run.directory, "--json", *options)
        assert (options, len(out.splitlines())) == (options, number)


def test_time_of() -> None:
    """By the calendar: the newest line is of 2026-11-20 03:01:40 UTC."""
    start = int(1e6 * BEGAN_S)
    wanted = {
        "10s": start + 90_000_000, "1.5m": start + 10_000_000, "1d": start + 100_000_000 - 86_400_000_000,
        "03:00": start, "03:01:02": start + 62_000_000, "04:00": start + (3600 - 86400) * 1_000_000,
        "2026-11-20": start - 3 * 3600 * 1_000_000, "2026-11-20T03:00:00.25Z": start + 250_000,
        "2026-11-20T05:00+02:00": start,
    }  # fmt: skip
    for text, microseconds in wanted.items():
        assert (text, tool.time_of("--since", text, NEWEST_US)) == (text, microseconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "7-"], "--rank 7-: expected numbers and ranges"),
        (["--rank", "9"], "no logs of rank 9; there are 0-3"),
        (["--node", "n[1"], "--node n[1: brackets do not match"),
        (["--attempt", "3"], "no logs of attempt 3; there are 1-2"),
        (["--attempt", "newest"], "--attempt newest: expected a number, last or all"),
        (["--level", "loud"], "--level loud: expected one of debug, info"),
        (["--since", "yesterday"], "--since yesterday: expected a duration"),
        (["--since", "1m", "--until", "2m"], "--until 2m: that is before --since 1m"),
        (["--step", "5:4"], "--step 5:4: 4 comes before 5"),
        (["--grep", "("], "--grep (: missing )"),
        (["--tail", "-1"], "--tail -1: expected a number of lines"),
    ],
)
def test_mistakes_are_one_line_and_exit_78(run: LogRun, options: list[str], message: str) -> None:
    out, err = call(run.directory, *options, code=78)
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err


def test_runs_without_logs(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "runs" / "empty")
    assert "has no logs" in call(run.directory, code=78)[1]
    run.attempt(1, {0: 0.0, 1: 0.0})
    out, err = call(run.directory)
    assert (out, err) == ("", "logs: attempt 1: rank 0-1 of 2 wrote nothing\n")
    assert "did you mean empty" in call("emty", cwd=tmp_path, code=78)[1]
    assert "no runs there" in call("--dir", tmp_path / "none", code=78)[1]


COMMANDS = {
    "logs": ["tools.logs", "RUN"],
    "follow": ["tools.logs", "RUN", "--follow"],
    "why": ["tools.logs", "RUN", "--why"],
    "html": ["tools.logs", "RUN", "--html", "OUT"],
    "status": ["tools.status", "RUN"],
}
PROBE = "if touch {0}/x 2>/dev/null; then echo it can be written; exit 9; fi\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_run_is_only_read(run: LogRun, tmp_path: Path, name: str) -> None:
    """As root on a read-only mount in a namespace of its own, else (and in containers that forbid mounting)
    without the right to write, as another user where root itself would have it."""
    out = tmp_path / "out"
    out.mkdir()
    words = [
        word.replace("RUN", str(run.directory)).replace("OUT", str(out / "r.html")) for word in COMMANDS[name]
    ]
    command = [sys.executable, "-B", "-m", *words]
    quoted = " ".join(map(shlex.quote, ["timeout", "60", *command]))
    probe = PROBE.format(run.directory)
    before = content(run.directory)
    mount = f"mount --bind {run.directory} {run.directory} && mount -o remount,ro,bind {run.directory}"
    namespace = ["unshare", "--mount", "bash", "-ec"]
    if subprocess.run([*namespace, mount], capture_output=True).returncode == 0:
        shell = [*namespace, f"{mount}\n{probe}{quoted}"]
    else:
        for path in [run.directory, *run.directory.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        out.chmod(0o777)
        other = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        shell = [*other, "bash", "-ec", f"{probe}{quoted}"]
    root = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(shell, cwd=root, env=variables, capture_output=True, text=True)
    for path in [run.directory, *run.directory.rglob("*")]:
        path.chmod(0o755)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    assert done.stdout
    assert content(run.directory) == before
    assert (out / "r.html").exists() == (name == "html")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_closed_pipe_ends_it_quietly(run: LogRun) -> None:
    """Far more than a pipe holds, into a reader that goes after one line."""
    run.write(1, *(line(5, f"line {i} " + 200 * "x", rank=1) for i in range(20000)))
    root = Path(__file__).resolve().parents[2]
    script = f"{sys.executable} -m tools.logs {run.directory} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "0"


def test_json_lines_are_those_on_disk(run: LogRun) -> None:
    """But for the time, and the raw line, which has none there."""
    out, _ = call(run.directory, "--json", "--rank", "0-1")
    content = [p.read_text() for p in sorted(run.directory.glob("logs/*/rank0000[01].jsonl"))]
    assert sorted(out.splitlines()) == sorted("".join(content).splitlines())
    assert json.loads(out.splitlines()[0])["message"] == "rendezvous done"


def test_nothing_in_a_run_takes_over_the_terminal_or_the_page(tmp_path, capsys, monkeypatch):
    """Escapes and halves of surrogate pairs in every text that --why and --html show."""
    evil = "\x1b]0;owned\x07\x9b2J\x00\ud800"
    run = LogRun(tmp_path / "runs" / "demo\x1b[2J")
    logs = run.attempt(1, {0: 0.0}, state="FAIL")
    run.write(0, line(1, evil, level="ERROR", phase=evil, logger=evil), b"\x1b[2J raw\n")
    said = {"rank": 0, "kind": "exception", "exit_code": 1, "time": BEGAN_S + 2, "step": 3}
    said |= dict.fromkeys(("node", "message", "exception", "traceback", "phase", "fingerprint"), evil)
    (logs / "verdict-00000.json").write_text(json.dumps(said))
    page = tmp_path / "page.html"
    for options in (["--why"], ["--html", str(page)]):
        monkeypatch.setattr("sys.argv", ["logs", str(run.directory), *options])
        tool.main()
    shown = capsys.readouterr().out
    for text in (shown, page.read_text("utf-8")):
        assert not [c for c in text if (c < " " and c not in "\t\n") or "\x7f" <= c <= "\x9f"]
        assert "owned" in text.encode().decode()


def test_names_and_links_that_make_no_sense_are_counted_or_left_alone(tmp_path):
    run = LogRun(tmp_path / "runs" / "demo")
    logs = run.attempt(1, {0: 0.0, 1: 0.0})
    (logs / "clock.json").write_text('{"ranks": [{"rank": 0, "node": "n\\ud800", "offset_s": 0}]}')
    run.write(0, line(1, "hello"))
    (logs / "rank00001.jsonl").symlink_to("rank00001.jsonl")
    (logs / f"rank{'9' * 40}.jsonl").write_bytes(line(1, "no rank"))
    (logs / "verdict-99999999999.json").write_text("{}")
    for native in (None, False):
        merge = Merge(log_files.find(run.directory), Selection(), View(), native=native)
        assert b"".join(merge).endswith(b"[0] INFO     hello\n")
        assert any("could not be read" in note and "rank 1" in note for note in merge.notes())


def test_logs_of_somebody_else_are_named(tmp_path, monkeypatch):
    run = LogRun(tmp_path / "runs" / "demo")
    run.attempt(1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("sys.argv", ["logs", str(run.directory)])
    monkeypatch.setattr(log_files, "attempt_numbers", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        tool.main()


@pytest.mark.parametrize(
    "options",
    [["--attempt", "\u00b2"], ["--tail", "\u00b2"], ["--since", "0001-01-01T00:00:00+23:00"]],
)
def test_an_option_that_is_no_number_or_date_is_named(run, monkeypatch, options):
    monkeypatch.setattr("sys.argv", ["logs", str(run.directory), *options])
    with pytest.raises(UserError, match=options[0]):
        tool.main()
