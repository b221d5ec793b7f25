"""No secret reaches a disk, however it is written and however the process ends; all else does.

The truth is the text that was written, with the secrets replaced by hand, or line by line by `redact`; and
what grep would find in the files.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.obs import raw_filter, raw_writer, secrets
from strop.obs.raw_filter import Filter
from tests.log_lines import ROOT, launched

SECRET = "correct-horse/battery"
WORDS = "correct horse battery"
TOKEN = "hf_" + "aBcD1234" * 4
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow1\nMIIEow2\n-----END RSA PRIVATE KEY-----"


def make():
    values = [SECRET, WORDS]
    return Filter(secrets.redactor(values, {}), secrets.known_values(values, {}))


PIECES = st.sampled_from(
    [SECRET, WORDS, TOKEN, "password=hunter22 ", "\n", "\n", "\r", " ", "loss 0.69", "num_tokens: 12", "é",
     "\udc80", "Bearer abcdefgh.i", "https://me:pw12345@host/x", KEY + "\n"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_however_it_is_cut_into_writes(pieces, sizes, waits):
    """Also with pauses between the writes, in which unfinished lines are shown."""
    text = " ".join(pieces)  # glued to a token, `password=` would be part of it
    data = text.encode("utf-8", "surrogateescape")
    screen, out = make(), b""
    for size in [*sizes, len(data)]:
        out += screen.feed(data[:size])
        data = data[size:]
        if waits:
            out += screen.idle()
    shown = (out + screen.end()).decode("utf-8", "surrogateescape")
    redact = secrets.redactor([SECRET, WORDS], {})
    keyless = re.sub(r"-----BEGIN RSA[\s\S]*?END RSA PRIVATE KEY-----", "[secret]\n", text)
    wanted = "".join(redact(line) for line in re.split("([\n\r])", keyless))
    assert re.sub(r"\s+", " ", shown) == re.sub(r"\s+", " ", wanted)
    for secret in (SECRET, WORDS, TOKEN, "hunter22", "MIIE"):
        assert secret not in shown


def test_what_is_unfinished_is_shown_up_to_where_a_secret_may_begin():
    screen = make()
    assert screen.feed(b"loading shard 3 of 7 corr") + screen.idle() == b"loading shard 3 of 7 "
    assert screen.feed(b"ect horse batt") + screen.idle() == b""
    assert screen.feed(b"ery and\n") == b"[secret] and\n"
    assert screen.feed(b"password: ") + screen.idle() == b""
    assert screen.feed(b"hunter22 x") + screen.end() == b"password: [secret] x"


@pytest.mark.parametrize("at", [0, 1, raw_filter.LONGEST - raw_filter.KEPT - 10, raw_filter.LONGEST - 5])
def test_a_line_of_megabytes_is_cut_beside_its_secrets(at):
    """The secret lies where the cut would fall, at the limit of what is held, and at the front."""
    line = b"x" * at + b" " + SECRET.encode() + b" " + b"y" * (3 << 20) + b"\n"
    screen, out = make(), b""
    for start in range(0, len(line), 65536):
        out += screen.feed(line[start : start + 65536])
        assert len(screen._line) <= raw_filter.LONGEST
    assert out == line.replace(SECRET.encode(), b"[secret]")


def test_a_line_that_is_one_secret_from_end_to_end():
    screen = make()
    out = screen.feed(b"password=" + b"z" * (1 << 20)) + screen.end()
    assert b"zz" not in out[: -raw_filter.KEPT]
    assert out.startswith(b"[secret]") or out.startswith(b"password=[secret]")


SAY = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None)
secret, token, learnt = os.environ["DB_PASSWORD"].encode(), {token!r}, b"only-in-the-configuration"
os.write(2, b"begin\\n")
libc.write(2, b"by C: " + secret + b" there\\n", len(secret) + 13)
for part in (b"half ", token[:9], token[9:], b" done\\n"):
    libc.write(1, part, len(part))
    time.sleep(0.05)
os.system("echo a child says $DB_PASSWORD")
os.write(2, bytes(range(128, 256)) + b"\\n")
from strop.obs import raw_writer
raw_writer.tell(int(os.environ["STROP_RAW_FD"]), [learnt.decode()], 1 << 30)
os.write(2, b"learnt " + learnt + b"\\n")
if os.environ["STROP_RANK"] == "0":
    os.write(int(os.environ["STROP_STDOUT_FD"]), b"out " + secret + b" too\\n")
libc.write(2, b"last words: " + secret, 12 + len(secret))
"""
ENDS = {
    "exit": ("os._exit(7)", 7),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "segv": ("import faulthandler; faulthandler.enable(); ctypes.string_at(0)", -signal.SIGSEGV),
    "abort": ("libc.abort()", -signal.SIGABRT),
    "terminate": ("ctypes.CDLL('libstdc++.so.6')._ZSt9terminatev()", -signal.SIGABRT),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_secret_on_disk_whatever_the_end(tmp_path, end, rank):
    code, exit_code = ENDS[end]
    say = SAY.format(token=TOKEN.encode()) + code
    with open(tmp_path / "job.out", "wb") as out:
        done = launched(tmp_path, say, rank, stdout=out, DB_PASSWORD=SECRET)
    assert done.returncode == exit_code
    raw = (tmp_path / f"rank{rank:05d}.err").read_bytes()
    assert raw.startswith(
        b"begin\nby C: [secret] there\nhalf [secret] done\na child says [secret]\n"
        + bytes(range(128, 256)) + b"\nlearnt [secret]\nlast words: [secret]"
    )  # fmt: skip
    assert (b"Fatal Python error: Segmentation fault" in raw) == (end == "segv")
    assert (tmp_path / "job.out").read_bytes() == (b"out [secret] too\n" if rank == 0 else b"")
    for path in tmp_path.iterdir():
        for secret in (SECRET, TOKEN[4:20], "configuration"):
            assert secret.encode() not in path.read_bytes()


def start(folder, code, **variables):
    """The launcher's process and, once it runs, the pid of the rank."""
    code = f"open({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))\n" + code
    launch = (ROOT / "tests/log_lines.py").read_text().partition('LAUNCH = """')[2].partition('"""')[0]
    process = subprocess.Popen(
        [sys.executable, "-c", launch, str(folder), "1", "import os, time, signal\n" + code],
        env={"PYTHONPATH": str(ROOT / "src"), **variables},
    )
    wait_until(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
    return process, int((folder / "pid").read_text())


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid):
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_a_rank_dies_with_its_writer(tmp_path):
    """As the local launcher kills it."""
    process, rank = start(tmp_path, "time.sleep(60)")
    process.kill()
    process.wait()
    wait_until(lambda: gone(rank))


def test_a_signal_that_reaches_only_the_writer_is_handed_on(tmp_path):
    """As with proctrack/cgroup, where only slurmstepd's direct child gets it. It is blocked in the rank."""
    code = "os.write(2, str(signal.sigwait({signal.SIGUSR1})).encode())"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        process, _ = start(tmp_path, code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    wait_until(lambda: not int(re.search("SigBlk:\t(.*)", status(process.pid))[1], 16) & 1 << 9)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(20) == 0
    assert (tmp_path / "rank00001.err").read_text() in (str(signal.SIGUSR1), str(int(signal.SIGUSR1)))


def status(pid):
    return Path(f"/proc/{pid}/status").read_text()


def test_an_orphan_that_holds_the_pipe_keeps_nobody(tmp_path):
    process, _ = start(tmp_path, "os.write(2, b'mine\\n')\nos.fork() or time.sleep(30)\nos._exit(5)")
    assert process.wait(10) == 5
    assert (tmp_path / "rank00001.err").read_text() == "mine\n"


def test_an_unfinished_line_is_there_before_the_end(tmp_path):
    """Somebody follows a rank that hangs; and Slurm may kill the writer too."""
    process, _ = start(tmp_path, "os.write(2, b'waiting for node7 tok')\ntime.sleep(60)")
    wait_until(lambda: (tmp_path / "rank00001.err").read_text() == "waiting for node7 ")
    process.kill()
    process.wait()


def test_a_full_disk_ends_nothing_and_is_told(tmp_path, monkeypatch):
    """/dev/full answers every write with ENOSPC."""
    monkeypatch.setattr(raw_writer, "RETRY_S", 0.0)
    path = tmp_path / "rank00007.err"
    path.symlink_to("/dev/full")
    files = raw_writer.Segments(tmp_path, 7)
    files.write(b"lost\n")
    files.write(b"lost too\n")
    path.unlink()
    files.write(b"kept\n")
    assert path.read_bytes() == b"\nstrop: 14 bytes of raw output could not be written here\nkept\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything():
    """The pipe holds 64 KiB, and the reader begins late."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    data = os.urandom(1 << 20)
    code = (
        "import hashlib, sys, time; time.sleep(0.2);"
        "print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=read, stdout=subprocess.PIPE, text=True)
    os.close(read)
    raw_writer.Descriptor(write).write(data)
    os.close(write)
    assert reader.communicate(timeout=20)[0].strip() == hashlib.sha256(data).hexdigest()


def test_a_flood_does_not_stop_the_rank_for_long(tmp_path):
    """20 MB of lines that look like nothing secret, through one pipe: measured at some 50 MB/s."""
    code = "import os\nline = b'x' * 99 + b'\\n'\n[os.write(2, line * 100) for _ in range(2000)]\n"
    began = time.monotonic()
    assert launched(tmp_path, code, 1).returncode == 0
    assert time.monotonic() - began < 20
    assert (tmp_path / "rank00001.err").stat().st_size == 20_000_000
