"""The file of one rank: every line whole, in order, bounded, and what is missing counted.

What a test compares with is what it wrote itself, read back with json or as bytes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from strop.obs import log_line, rank_log
from strop.obs.rank_log import RankLog
from strop.run import Position
from tests.log_lines import launched, read

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["time", "rank", "node", "attempt", "step", "phase", "level", "logger", "message"]


def make(directory, *, max_bytes=1 << 30, position=None, redact=lambda text: text, **more):
    return RankLog(
        directory, 7, "n1", 2, position=position or Position(), max_bytes=max_bytes, redact=redact, **more
    )


def child(code, **more):
    """`code` in a process of its own, which may spoil its descriptors and limits."""
    head = f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nfrom tests.unit.test_rank_log import *\n"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", head + code], env=variables, check=True, **more)


def test_a_line_as_it_lies_on_disk(tmp_path):
    position = Position()
    log = make(tmp_path / "logs" / "0002", position=position)
    before = time.time()
    log.write("INFO", "strop", "two\nlines \u2028 \x00 é 中 \ud800")
    position.phase, position.step = "train", 12
    log.write("ERROR", "a.b", "bad", "Traceback ...\n  File")
    raw = (tmp_path / "logs/0002/rank00007.jsonl").read_bytes()
    assert raw.count(b"\n") == 2
    first, second = [json.loads(line) for line in raw.split(b"\n")[:2]]
    assert list(first) == KEYS
    assert list(second) == [*KEYS, "traceback"]
    assert first["message"] == "two\nlines \u2028 \x00 é 中 \ud800"
    assert (first["step"], first["phase"], second["step"], second["phase"]) == (None, "start", 12, "train")
    assert (second["rank"], second["node"], second["attempt"]) == (7, "n1", 2)
    assert (second["level"], second["logger"], second["traceback"]) == (
        "ERROR",
        "a.b",
        "Traceback ...\n  File",
    )
    stamp = raw[log_line.TIME_START : log_line.TIME_END].decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    assert stamp == first["time"]
    seconds = time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
    assert before - 1e-5 <= seconds + float(stamp[19:26]) <= time.time()


def test_lines_of_many_threads_are_whole_and_in_the_order_of_their_times(tmp_path):
    """More lines than one segment holds, and longer than a pipe's or a page's atomic size."""
    log = make(tmp_path)
    texts = [[f"{thread}-{i} " + "x" * (i % 7 * 1000) for i in range(400)] for thread in range(8)]

    def work(mine):
        for text in mine:
            log.write("INFO", "t", text)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in texts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    got = read(tmp_path, 7)
    assert sorted(line["message"] for line in got) == sorted(text for mine in texts for text in mine)
    times = [line["time"] for line in got]
    assert times == sorted(times)
    for thread in range(8):
        own = [line["message"] for line in got if line["message"].startswith(f"{thread}-")]
        assert own == texts[thread]


@pytest.mark.parametrize("lines", [1, 20, 200, 1000])
def test_the_first_and_the_newest_stay_and_the_rest_is_counted(tmp_path, lines):
    """20 fit into the first segment; 200 begin to lose some; of 1,000 most are gone."""
    bound = 24_000
    log = make(tmp_path, max_bytes=bound)
    for i in range(lines):
        log.write("INFO", "t", f"{i:05d} {'x' * 40}")
    got = read(tmp_path, 7)
    numbers = [int(line["message"][:5]) for line in got]
    gaps = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    assert (numbers[0], numbers[-1]) == (0, lines - 1)
    assert len(gaps) == (1 if lines > 150 else 0)
    told = [line["dropped"] for line in got if "dropped" in line]
    assert max(told, default=0) == lines - len(numbers)
    assert told == sorted(told)  # a running total
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= bound + 4 * 250
    assert len(list(tmp_path.iterdir())) <= 4


def test_a_full_disk_costs_lines_but_not_the_run(tmp_path, monkeypatch, capfd):
    """/dev/full answers every write with ENOSPC."""
    monkeypatch.setattr(rank_log, "RETRY_S", 0.2)
    path = tmp_path / "rank00007.jsonl"
    path.symlink_to("/dev/full")
    log = make(tmp_path)
    for i in range(5):
        log.write("INFO", "t", f"lost {i}")
    path.unlink()  # there is room again
    log.write("INFO", "t", "too early to try again")
    time.sleep(0.25)
    log.write("INFO", "t", "written")
    log.write("INFO", "t", "and this")
    assert [(line["message"], line.get("dropped")) for line in read(tmp_path, 7)] == [
        ("written", 6),
        ("and this", None),
    ]
    complaint = capfd.readouterr().err
    assert complaint.count("\n") == 1
    assert "the log of rank 7" in complaint
    assert "No space left on device" in complaint


def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rank_log, "RETRY_S", 0.0)
    (tmp_path / "logs").write_text("in the way")
    log = make(tmp_path / "logs")
    log.write("INFO", "t", "lost")
    log.close()  # tries once more
    assert "rank 7" in capfd.readouterr().err
    (tmp_path / "logs").unlink()
    log.write("INFO", "t", "late")
    assert [(line["message"], line["dropped"]) for line in read(tmp_path / "logs", 7)] == [("late", 2)]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    """The size limit of a file stores the beginning of a line, as a full disk may."""
    child(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "rank_log.RETRY_S = 0.0\n"
        f"log = make(Path({str(tmp_path)!r}))\n"
        "log.write('INFO', 't', 'whole')\n"
        "size = os.stat(f'{log._directory}/rank00007.jsonl').st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))\n"
        "log.write('INFO', 't', 'cut off')\n"
        "log.write('INFO', 't', 'nowhere')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "log.write('INFO', 't', 'after')\n",
        stderr=subprocess.PIPE,
    )
    whole, torn, after, end = (tmp_path / "rank00007.jsonl").read_bytes().split(b"\n")
    assert json.loads(whole)["message"] == "whole"
    assert len(torn) == 50
    assert (json.loads(after)["message"], json.loads(after)["dropped"], end) == ("after", 2, b"")


def test_secrets_and_very_long_texts(tmp_path):
    log = make(tmp_path, redact=lambda text: text.replace("hunter2", "***"))
    log.write("INFO", "t", "a hunter2 b", "File x\nhunter2")
    log.write("INFO", "t", "a" * 100_000 + "hunter2" + "b" * 100_000)
    first, second = read(tmp_path, 7)
    assert (first["message"], first["traceback"]) == ("a *** b", "File x\n***")
    half = rank_log.LONGEST // 2
    left_out = 200_003 - 2 * half
    assert second["message"] == f"{'a' * half}\n... {left_out} characters left out ...\n{'b' * half}"


RAW = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.unit.test_rank_log import *
from strop.obs import raw, raw_writer
raw.WRITER_S = 0.2  # here the writer may have to wait for a CPU
raw_writer.tell(int(os.environ["STROP_RAW_FD"]), [], {segment})
rank_log.TICK_S = {tick}
folder = Path({folder!r})
log = make(folder, raw=raw.RawFiles(folder, 7, {segment}))
"""


def captured(folder, code, segment=1 << 20, tick=0.0):
    """`code` in a process whose raw output is captured."""
    head = RAW.format(root=str(ROOT), folder=str(folder), segment=segment, tick=tick)
    assert launched(folder, head + code, 7).returncode == 0, (folder / "rank00007.err").read_text()


def test_marks_say_where_the_raw_file_stood(tmp_path):
    code = """
log.write("INFO", "t", "first")
os.write(2, b"native 1\\n")
log.write("INFO", "t", "second")
log.write("INFO", "t", "third")
log.tick()
os.system("echo from a child; echo and its stderr >&2")
log.tick()
log.tick()
log.close()
"""
    captured(tmp_path, code)
    raw = (tmp_path / "rank00007.err").read_bytes()
    got = [(line["message"], line.get("raw")) for line in read(tmp_path, 7)]
    assert got == [("first", None), ("second", [0, 9]), ("third", None), ("raw output", [0, len(raw)])]
    assert raw == b"native 1\nfrom a child\nand its stderr\n"
    assert read(tmp_path, 7)[-1]["level"] == "DEBUG"


def test_raw_output_is_bounded_and_what_went_is_counted(tmp_path):
    """Ten segments' worth, by native writes to both descriptors: 4 stay, and the marks name the right one."""
    code = """
for i in range(100):
    os.write(1 + i % 2, b"%04d" % i + b"." * 95 + b"\\n")
    if i % 10 == 9:
        log.write("INFO", "t", str(i))
        log.tick()
log.close()
"""
    captured(tmp_path, code, segment=1000)
    files = {int((re.findall(r"\.(\d+)\.", path.name) or [0])[0]): path for path in tmp_path.glob("*.err")}
    assert sorted(files) == [0, 7, 8, 9]
    lines = [line for i in sorted(files) for line in files[i].read_bytes().splitlines()]
    assert [int(line[:4]) for line in lines] == [*range(10), *range(70, 100)]
    got = read(tmp_path, 7)
    assert [line["raw"] for line in got if line["message"].isdigit()] == [[i, 1000] for i in range(10)]
    assert max(line.get("dropped", 0) for line in got) == 60


def test_the_thread_notices_raw_output_by_itself(tmp_path):
    code = """
log.start()
os.write(2, b"abort\\n")
time.sleep(1.0)
os._exit(0)
"""
    captured(tmp_path, code, segment=1000, tick=0.1)
    assert [(line["message"], line["raw"]) for line in read(tmp_path, 7)] == [("raw output", [0, 6])]


def test_a_forked_worker_writes_though_another_thread_held_the_lock(tmp_path):
    log = make(tmp_path)
    held, done = threading.Event(), threading.Event()

    def hold():
        with log._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    worker = os.fork()
    if worker == 0:
        signal.alarm(5)
        log.write("INFO", "w", "from a worker")
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    done.set()
    thread.join()
    assert [line["message"] for line in read(tmp_path, 7)] == ["from a worker"]


def test_a_segment_deleted_by_hand_costs_no_line(tmp_path):
    log = make(tmp_path, max_bytes=8000)
    for i in range(30):
        log.write("INFO", "t", f"{i} " + "x" * 200)
        (tmp_path / "rank00007.1.jsonl").unlink(missing_ok=True)
    assert read(tmp_path, 7)[-1]["message"].startswith("29 ")
    assert log._failed_at is None


def test_a_log_that_somebody_deletes_begins_anew_and_counts_what_is_gone(tmp_path):
    log = make(tmp_path / "logs", raw=None)
    for _ in range(3):
        log.write("INFO", "t", "gone")
    shutil.rmtree(tmp_path / "logs")
    log.tick()
    log.write("INFO", "t", "anew")
    [line] = read(tmp_path / "logs", 7)
    assert (line["message"], line["dropped"]) == ("anew", 3)
