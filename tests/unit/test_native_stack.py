"""The native stack of a crash, of processes that really crash. The truth is what their C++ code calls."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from strop.slurm import crash

CULPRIT = r"""
#include <stdlib.h>
#include <signal.h>
namespace mine {
__attribute__((noinline)) void innermost(int signal) {
    if (signal == SIGSEGV) *(volatile int*)8 = 1;  // a real fault, not a signal that somebody sent
    else if (signal == SIGABRT) abort();
    else raise(signal);
    asm volatile("");
}
__attribute__((noinline)) void between(int signal) { innermost(signal); asm volatile(""); }
}
extern "C" __attribute__((noinline)) void outermost(int signal) { mine::between(signal); asm volatile(""); }
extern "C" int endless(volatile char* above) {
    volatile char here[4096];
    here[0] = above[0];
    return endless(here) + here[0];
}
"""
FATAL = [signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT]
START = """
import ctypes, faulthandler, sys, threading
from strop.obs import native_stack
faulthandler.enable()
assert native_stack.install()
culprit = ctypes.CDLL(sys.argv[1])
"""


@pytest.fixture(scope="module")
def culprit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("culprit")
    (folder / "culprit.cpp").write_text(CULPRIT)
    library = folder / "libculprit.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, folder / "culprit.cpp"], check=True)
    return library


def python(code: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **kwargs)  # type: ignore[call-overload]


@pytest.mark.parametrize("number", FATAL)
@pytest.mark.parametrize("thread", ["main", "other"])
def test_frames_of_the_thread_that_crashed_innermost_first(culprit, tmp_path, number, thread):
    crash_it = f"culprit.outermost({int(number)})"
    if thread == "other":
        crash_it = f"t = threading.Thread(target=lambda: {crash_it}); t.start(); t.join()"
    ended = python(START + crash_it, culprit)
    assert ended.returncode == -number  # it dies of what it died of
    symbols = re.findall(r"^  native #\d+ (\S*)\+0x[0-9a-f]+ in (\S+)$", ended.stderr, re.MULTILINE)
    mine = [name for name, library in symbols if library == str(culprit)]
    assert mine == ["_ZN4mine9innermostEi", "_ZN4mine7betweenEi", "outermost"]
    if number == signal.SIGSEGV:
        assert symbols[0][0] == "_ZN4mine9innermostEi"  # nothing of the handler in front
    assert "Current thread" in ended.stderr  # and faulthandler has had its turn
    assert ended.stderr.count("strop: native stack") == 1
    (tmp_path / "rank00000.err").write_text(ended.stderr)
    found = crash.find(tmp_path)
    assert found is not None
    assert "native: mine::innermost < mine::between < outermost (" in found.message


def test_an_overflown_stack(culprit):
    ended = python(START + "culprit.endless(b'x')", culprit)
    assert ended.returncode == -signal.SIGSEGV
    assert len(re.findall(r"native #\d+ endless\+0x", ended.stderr)) > 50  # of 64 that are kept


def test_a_jump_to_nowhere_still_ends_the_process(culprit):
    """There is no frame to begin with: what matters is that the handler comes to an end."""
    ended = python(START + "ctypes.CFUNCTYPE(None)(8)()", culprit)
    assert ended.returncode == -signal.SIGSEGV
    assert "Current thread" in ended.stderr


def test_no_other_signal_is_caught():
    """SigCgt of /proc: one bit a signal, from 1."""
    caught = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('SigCgt')))\n"
    shown = python(f"{caught}from strop.obs import native_stack; native_stack.install()\n{caught}").stdout
    before, after = (int(word, 16) for word in shown.split())
    ours = sum(1 << (number - 1) for number in FATAL)
    assert after == before | ours


def test_without_the_library_there_is_no_native_stack(tmp_path, monkeypatch):
    from strop.obs import native_stack

    monkeypatch.setattr(native_stack, "PLACES", [tmp_path / "none.so"])
    assert not native_stack.install()
