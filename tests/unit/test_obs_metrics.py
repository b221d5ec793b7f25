"""metrics.jsonl: what is written reads back equal, and a resume leaves no step twice."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.errors import StorageError
from strop.obs.metrics import MetricsFile, cut_back, encode, read


def test_a_line_is_step_first_then_by_name_in_shortest_exact_floats():
    record = {"loss": 0.1 + 0.2, "learning_rate": 1e-06, "step": 3, "epoch": 1, "eval_x/y": 2.0}
    expected = (
        b'{"step": 3, "epoch": 1, "eval_x/y": 2.0, "learning_rate": 1e-06, "loss": 0.30000000000000004}\n'
    )
    assert encode(record) == expected
    assert encode(dict(reversed(record.items()))) == expected


@given(st.floats())
def test_floats_read_back_bit_for_bit_and_what_json_lacks_becomes_null(x):
    back = json.loads(encode({"step": 0, "x": x}), parse_constant=pytest.fail)["x"]
    assert (
        back is None
        if not math.isfinite(x)
        else (back == x and math.copysign(1, back) == math.copysign(1, x))
    )


def test_each_record_is_one_write_of_one_line(tmp_path, monkeypatch):
    writes = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or real(fd, data))
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    for step in (1, 2):
        file.write({"step": step, "loss": 0.5})
    assert len(writes) == 2
    assert path.read_bytes() == b"".join(writes)  # whole without a flush or close
    file.close()
    again = MetricsFile(path)
    again.write({"step": 3})
    again.close()
    assert [r["step"] for r in read(path)] == [1, 2, 3]


def test_a_full_disk_is_a_storage_error():
    file = MetricsFile(Path("/dev/full"))
    with pytest.raises(StorageError, match="/dev/full: No space left on device"):
        file.write({"step": 1})
    file.close()


LINES = [b'{"step": %d, "loss": 0.5}\n' % s for s in range(1, 6)]


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b'{"step": 6}', b"{", b"\xff"])
@pytest.mark.parametrize("committed", [0, 2, 5])
def test_cut_back_keeps_what_was_committed(tmp_path, torn, committed):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"".join(LINES) + torn)
    kept = b"".join(LINES[:committed])
    assert cut_back(path, len(kept)) == len(b"".join(LINES[committed:]) + torn)
    assert path.read_bytes() == kept
    assert cut_back(path, len(kept)) == 0


def test_a_length_recorded_by_sync_is_what_a_resume_goes_back_to(tmp_path):
    """An evaluation of the committed step that comes after the commit is dropped too: it will be redone."""
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 0.5})
    length = file.sync()
    file.write({"step": 1, "eval_loss": 0.25})
    file.write({"step": 2, "loss": 0.5})
    file.close()
    cut_back(path, length)
    assert list(read(path)) == [{"step": 1, "loss": 0.5}]


def test_cut_back_of_a_file_that_is_not_there_or_too_short(tmp_path):
    path = tmp_path / "m.jsonl"
    assert cut_back(path, 0) == 0
    assert not path.exists()
    path.write_bytes(LINES[0])
    with pytest.raises(
        StorageError, match=f"{path} has 25 bytes, but 100 were committed: records are missing"
    ):
        cut_back(path, 100)
    assert path.read_bytes() == LINES[0]


@pytest.mark.parametrize("torn", [1, 65535, 65536, 65537, 200000])
@pytest.mark.parametrize("whole", [b"", b"{}\n"])
def test_a_writer_cuts_off_a_torn_line_of_any_length(tmp_path, whole, torn):
    """Lengths around the block that is looked back by."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(whole + b"x" * torn)
    file = MetricsFile(path)
    file.write({"step": 1})
    file.close()
    assert path.read_bytes() == whole + b'{"step": 1}\n'


@pytest.mark.parametrize("bad", [b"garbage\n", b"\xff\xfe\n", b"[1]\n", b"\n", b'{"loss": 1}\n'])
def test_read_reports_damage_in_the_middle(tmp_path, caplog, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(LINES[0] + bad + LINES[1])
    assert [r["step"] for r in read(path)] == [1, 2]
    assert caplog.messages == [f"{path}:2 is not a record"]


def test_read_leaves_out_a_line_that_is_being_written(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(LINES[0] + LINES[1][:-1])
    assert [r["step"] for r in read(path)] == [1]
