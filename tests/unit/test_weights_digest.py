"""The address of a model's weights: read once, and read again when a file has changed in whatever way."""

from __future__ import annotations

import errno
import os
import shutil
import time

import pytest

from strop import files
from strop.models import hf


@pytest.fixture
def model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(name.encode() * 9)
    monkeypatch.setattr(hf, "SETTLED_NS", 0)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read."""
    names, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def test_weights_are_read_once(model, read, tmp_path):
    without = hf.weights_digest(str(model), None)
    assert len(read) == 3
    for _ in range(3):
        assert hf.weights_digest(str(model), None, tmp_path / "cache") == without
    assert len(read) == 6


def in_place(path):
    """Of the same size, and with the old time of writing set again."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path):
    aside = path.with_name("aside")
    shutil.copy2(path, aside)
    in_place(aside)
    aside.rename(path)


@pytest.mark.parametrize("change", [in_place, replaced, lambda path: path.unlink()])
def test_a_change_is_noticed(model, read, tmp_path, change):
    before = hf.weights_digest(str(model), None, tmp_path / "cache")
    time.sleep(0.05)  # a file system's clock may tick every few milliseconds only
    change(model / "model-00002-of-00002.safetensors")
    after = hf.weights_digest(str(model), None, tmp_path / "cache")
    assert after == hf.weights_digest(str(model), None) != before
    assert set(read[3:4]) <= {"model-00002-of-00002.safetensors", "config.json"}


def test_what_was_written_just_now_is_not_taken_for_settled(model, read, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SETTLED_NS", 3600 * 10**9)
    for _ in range(2):
        hf.weights_digest(str(model), None, tmp_path / "cache")
    assert len(read) == 6


def test_a_cache_that_cannot_be_written_costs_time_only(model, tmp_path, monkeypatch):
    def refuse(path, value):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "write_json", refuse)
    assert hf.weights_digest(str(model), None, tmp_path / "cache") == hf.weights_digest(str(model), None)
