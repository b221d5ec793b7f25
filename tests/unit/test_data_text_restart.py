"""Preparing text when it is interrupted, killed, done twice at once, or out of disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from strop.config import Config, DataConfig
from strop.data import documents, parts, sets
from strop.errors import StorageError
from tests.unit.data_helpers import write_jsonl
from tests.unit.text_helpers import TOKENIZER, rows, text


def test_an_interrupted_preparation_goes_on(make_text, tmp_path, monkeypatch):
    """Stopped after two parts: those are not built again, and the result is that of one go."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 900)
    files = {"a.jsonl": rows([text(i) for i in range(60)])}
    whole = make_text(files, cache="whole")

    class Stop(Exception):
        pass

    def stop(done, total):
        assert total > 5
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        make_text(files, progress=stop)
    [work] = (tmp_path / "cache").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("part-*.npz")}
    assert len(before) == 2
    (work / "part-000003.npz.dead").write_bytes(b"half")
    seen = []
    build = parts._build
    monkeypatch.setattr(parts, "_build", lambda number: (seen.append(number), build(number)))
    again = make_text(files)
    assert (again[0], seen[0], again[2].digest) == (whole[0], 2, whole[2].digest)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [again[2].path.name]
    make_text(files, progress=stop)  # found: nothing is built
    changed = make_text(files, min_chars=3)
    assert changed[2].digest != again[2].digest


def _prepare_in_a_process(names, cache, delay, out):
    config = Config(data=DataConfig(train=names))
    maker = sets.Maker(config, "text", TOKENIZER, "t", cache, progress=lambda done, total: time.sleep(delay))
    place, _ = maker.prepare("train")
    out.put(place)


def test_two_at_once_end_with_one_result(make_text, tmp_path, monkeypatch):
    """Three processes of different speed over the same parts."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 900)
    path = str(write_jsonl(tmp_path / "a.jsonl", rows([text(i) for i in range(60)])))
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    args = [([path], tmp_path / "cache", delay, out) for delay in (0, 0.01, 0.02)]
    processes = [context.Process(target=_prepare_in_a_process, args=a) for a in args]
    for process in processes:
        process.start()
    places = [out.get() for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert places[0] == places[1] == places[2]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert make_text({}, ["a.jsonl"], cache="alone")[0] == make_text({}, ["a.jsonl"])[0]


def test_a_killed_parent_leaves_no_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 900)
    path = write_jsonl(tmp_path / "a.jsonl", rows([text(i) for i in range(60)]))
    config = Config(data=DataConfig(train=[str(path)]))

    def parent():
        monkeypatch.setattr(parts, "_build", time.sleep)
        sets.Maker(config, "text", TOKENIZER, "t", tmp_path / "cache", workers=2).prepare("train")

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    deadline = time.monotonic() + 20
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children := file.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while any(Path(f"/proc/{c}/stat").exists() for c in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [c for c in children if Path(f"/proc/{c}/stat").exists()]


def test_a_full_disk_names_the_key_and_keeps_what_is_done(make_text, tmp_path, monkeypatch):
    """A file system of 100 kB; with room made, the preparation goes on."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 9000)
    small = tmp_path / "small"
    small.mkdir()
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size=100k,uid={os.geteuid()}"
    subprocess.run([*as_root, "mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
    try:
        files = {"a.jsonl": rows([text(i) for i in range(600)])}
        with pytest.raises(StorageError) as raised:
            make_text(files, cache="small")
        assert raised.value.errno == errno.ENOSPC
        assert "data.cache_dir" in str(raised.value)
        [work] = small.iterdir()
        assert len(list(work.glob("part-*.npz"))) >= 1
        assert not list(work.glob("part-*.npz.*"))
        subprocess.run([*as_root, "mount", "-o", "remount,size=10m", small], check=True)
        assert make_text(files, cache="small")[0] == make_text(files, cache="roomy")[0]
    finally:
        subprocess.run([*as_root, "umount", small], check=True)
