"""Rank files on a node's own disk and their copies in the run directory."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from strop.obs import log_files
from strop.obs.rank_log import RankLog
from strop.run import Position
from strop.slurm import attempts, collect
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
    (mark,) = shared.glob("collected-*")
    mark.unlink()
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


def test_a_second_collection_leaves_what_the_first_has_saved(tmp_path):
    """The first was ended while it removed the files here."""
    local, shared = tmp_path / "local", tmp_path / "shared"
    local.mkdir()
    for name in ("rank00003.jsonl", "rank00003.1.jsonl", "rank00003.err"):
        (local / name).write_bytes(name.encode())
    collect.sync(local, shared)
    before = files(shared)
    (local / "rank00003.jsonl").unlink()
    assert collect.collect(local, shared) == 2
    assert files(shared) == before


@pytest.mark.parametrize("late", [b"late\n", b"twice\n" * 3])
def test_lines_that_come_after_a_collection_are_kept(tmp_path, late):
    local, shared = tmp_path / "local", tmp_path / "shared"
    for content in (b"early, and much longer than the rest\n", late):
        local.mkdir()
        (local / "rank00003.jsonl").write_bytes(content)
        collect.sync(local, shared, 3)
        if content == late:  # ended between the copy and the removal
            collect.collect(local, shared)
            local.mkdir()
            (local / "rank00003.jsonl").write_bytes(content)
        collect.collect(local, shared)
    assert files(shared) == {"rank00003.jsonl": b"early, and much longer than the rest\n" + late}
    assert not local.exists()


def test_the_next_sync_of_a_collected_rank_deletes_no_copy(tmp_path):
    local, shared = tmp_path / "local", tmp_path / "shared"
    local.mkdir()
    for index in ("", ".4", ".5", ".6"):
        (local / f"rank00003{index}.jsonl").write_bytes(b"before%s\n" % index.encode())
    collect.collect(local, shared)
    before = files(shared)
    local.mkdir()
    (local / "rank00003.7.jsonl").write_bytes(b"after\n")
    collect.sync(local, shared, 3)
    assert files(shared) == before | {"rank00003.7.jsonl": b"after\n"}


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


def left_behind(tmp_path, node):
    """A run of three attempts on this node's disk: of the first nothing was collected, the third runs."""
    run, disk = tmp_path / "runs/r", tmp_path / "disk"
    for number, state in ((1, "FAIL"), (2, "DONE"), (3, "X")):
        attempts.begin(run, job_id=None, restart_count=0, nodes=[node, "far"], log_dir=str(disk), wait_s=0)
        attempts.update(run, number, state=state, pid=0, **({} if state == "X" else {"closed": 1.0}))
        (disk / f"r/{number:04d}").mkdir(parents=True)
        (disk / f"r/{number:04d}/rank00000.jsonl").write_bytes(b"%d\n" % number)
    for name in (node, "far"):
        (run / f"logs/0002/collected-{name}").touch()
    return run, disk


def test_the_next_attempt_fetches_what_was_left_on_its_nodes(tmp_path):
    """Not yet its own files, which the ranks are about to write; those at its end. Never another run's."""
    run, disk = left_behind(tmp_path, "here")
    assert collect.uncollected(run, attempts.read(run, 1)) == ["here", "far"]
    assert collect.from_this_node(run, disk, "elsewhere", 3, earlier=True) == []
    assert files(run / "logs/0001") == {}
    assert collect.from_this_node(run, disk, "here", 3, earlier=True) == []
    assert files(run / "logs/0001") == {"rank00000.jsonl": b"1\n", "collected-here": b""}
    assert files(run / "logs/0003") == {}
    assert sorted(path.name for path in (disk / "r").iterdir()) == ["0002", "0003"]
    assert collect.uncollected(run, attempts.read(run, 1)) == ["far"]
    assert collect.from_this_node(run, disk, "here", 3, earlier=False) == []
    assert files(run / "logs/0003") == {"rank00000.jsonl": b"3\n", "collected-here": b""}


def test_where_logs_are_that_are_not_here(tmp_path):
    """The tool says so, and fetches them; on the only node that is this machine, without Slurm."""
    run, disk = left_behind(tmp_path, socket.gethostname())
    (run / "logs/0001/collected-far").touch()
    for name in (socket.gethostname(), "far"):
        (run / f"logs/0003/collected-{name}").touch()
    rows = [{"rank": rank, "node": socket.gethostname(), "offset_s": 0.0} for rank in (0, 1)]
    (run / "logs/0001/clock.json").write_text(json.dumps({"ranks": rows}))
    note = f"attempt 1: newer lines may lie on {socket.gethostname()} (rank 0-1), in {disk}/r/0001"
    assert any(line.startswith(note) for line in log_files.find(run).notes)
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HOST_PYTHON": sys.executable}
    command = [sys.executable, "-m", "tools.logs", str(run)]
    for words in (["--attempt", "1"], ["--collect"]):
        done = subprocess.run([*command, *words], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert (note in done.stderr) == (words != ["--collect"]), done.stderr
    assert (run / "logs/0001/rank00000.jsonl").read_bytes() == b"1\n"
    assert not any("attempt 1: newer" in line for line in log_files.find(run).notes)
