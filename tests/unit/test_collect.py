"""Rank files on a node's own disk and their copies in the run directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from strop.obs.rank_log import RankLog
from strop.run import Position
from strop.slurm import collect
from tests.log_lines import read

ROOT = Path(__file__).resolve().parents[2]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_what_is_new_is_copied(tmp_path):
    local, shared = tmp_path / "local", tmp_path / "shared"
    local.mkdir()
    for name in ("rank00001.jsonl", "rank00002.err", "something.else"):
        (local / name).write_bytes(b"one\n")
    collect.sync(local, shared, 1)
    assert files(shared) == {"rank00001.jsonl": b"one\n"}
    (shared / "rank00001.jsonl").write_bytes(b"ONE\n")  # what is there is not written again
    (shared / "verdict-00001.json").write_bytes(b"{}")
    with open(local / "rank00001.jsonl", "ab") as file:
        file.write(b"two\n")
    collect.sync(local, shared)
    assert files(shared) == {
        "rank00001.jsonl": b"ONE\ntwo\n",
        "rank00002.err": b"one\n",
        "verdict-00001.json": b"{}",
    }


def test_the_copy_of_a_log_with_deleted_segments(tmp_path):
    """The copy is the same as the original, whenever it is made: segments that went here go there."""
    local, shared = tmp_path / "local", tmp_path / "shared"
    log = RankLog(local, 5, "n", 1, position=Position(), max_bytes=8000, shared=shared, redact=str)
    for i in range(300):
        log.write("INFO", "t", f"{i:05d}")
        if i % 37 == 0:
            log.sync()
    log.close()
    assert files(shared) == files(local)
    assert max(line.get("dropped", 0) for line in read(shared, 5)) == 300 - len(read(shared, 5))


def test_collecting_after_the_ranks_leaves_nothing_behind(tmp_path):
    """As the batch shell does it, by the host's python3 without any package."""
    run, disk = tmp_path / "runs/r", tmp_path / "disk"
    local, shared = disk / "r/0002", run / "logs/0002"
    local.mkdir(parents=True)
    shared.mkdir(parents=True)
    (local / "rank00003.jsonl").write_bytes(b"early late")
    (shared / "rank00003.jsonl").write_bytes(b"early")
    (local / "rank00003.err").write_bytes(b"")
    variables = {
        **{"STROP_RUN_DIR": str(run), "STROP_ATTEMPT": "2", "STROP_LOG_DIR": str(disk)},
        **{"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]},
    }
    command = [sys.executable, "-S", "-m", "strop.slurm", "collect"]
    subprocess.run(command, env=variables, check=True)
    assert files(shared) == {"rank00003.jsonl": b"early late", "rank00003.err": b""}
    assert list(disk.iterdir()) == []
    subprocess.run(command, env=variables, check=True)  # a node on which no rank was
    (shared / "rank00003.jsonl").unlink()
    (shared / "rank00003.jsonl").mkdir()  # cannot be written
    local.mkdir(parents=True)
    (local / "rank00003.jsonl").write_bytes(b"kept")
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "rank00003.jsonl" in done.stderr
    assert files(local) == {"rank00003.jsonl": b"kept"}


def test_a_copy_that_cannot_be_made_does_not_stop_the_rank(tmp_path, capfd):
    (tmp_path / "shared").write_text("in the way")
    log = RankLog(
        tmp_path / "local", 5, "n", 1, position=Position(), max_bytes=8000, shared=tmp_path / "shared"
    )
    log.write("INFO", "t", "here")
    log.sync()
    log.sync()
    assert capfd.readouterr().err.count("cannot be copied") == 1
    with pytest.raises(FileExistsError):
        collect.collect(tmp_path / "local", tmp_path / "shared")
    assert [line["message"] for line in read(tmp_path / "local", 5)] == ["here"]
