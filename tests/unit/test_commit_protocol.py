"""The commit protocol under crashes after every file operation, torn files and lost renames included.

`Disk` stands between the code and the file system. It counts operations, and at the n-th the machine loses
power: from then on every operation fails, files that were not fsynced are torn anywhere, and changes to
directories that were not fsynced are undone, newest first, as many as the test draws (journals keep order).
The truth is independent of checkpoint.py: which saves had returned, and the number that each step's tensors
are filled with.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop import checkpoint
from strop.errors import StorageError
from strop.slurm import attempts

KEEP_LAST = 2

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class PowerLoss(BaseException):
    """No handler of ours may catch it."""


class Alone:
    """The part of Dist that checkpoint.py uses, for one rank."""

    rank, world_size, is_main, group = 0, 1, True, None

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class Disk:
    """The file system below `root`, with a memory of what has not reached it yet."""

    def __init__(self, root: Path, crash_at: int | None) -> None:
        self.root, self.crash_at = str(root), crash_at
        self.count = 0
        self.dead = False
        self._graves = Path(tempfile.mkdtemp(prefix="graves-", dir=root.parent))
        self._torn: set[int] = set()
        """Inodes of files with content that was not fsynced."""
        self._changes: list[tuple[set[int], Callable[[], None]]] = []
        """Changes of directories that were not fsynced: the directories' inodes, and how to undo it."""
        self._real: dict[str, Any] = {
            name: getattr(os, name) for name in ("fsync", "rename", "unlink", "mkdir", "rmdir")
        }
        self._real["open"] = io.open

    @contextmanager
    def mounted(self) -> Iterator[None]:
        ours: dict[str, Any] = {name: getattr(self, f"_{name}") for name in self._real if name != "open"}
        ours |= {"replace": self._rename, "remove": self._unlink}
        opens = mock.patch.object(builtins, "open", self._open), mock.patch.object(io, "open", self._open)
        with mock.patch.multiple(os, **ours), opens[0], opens[1]:
            yield

    def lose_power(self, undone: int, kept_share: float) -> None:
        """The state in which the next start finds the disk."""
        for _, undo in list(reversed(self._changes))[:undone]:
            undo()
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if os.stat(path).st_ino in self._torn:
                    os.truncate(path, int(os.path.getsize(path) * kept_share))

    def _tick(self) -> None:
        self.count += 1
        self.dead = self.dead or self.count == self.crash_at
        if self.dead:
            raise PowerLoss

    def _path(self, path: Any, dir_fd: int | None = None) -> str:
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        return os.path.join(folder, os.fspath(path))

    def _changed(self, paths: list[str], undo: Callable[[], None]) -> None:
        self._changes.append(({os.stat(os.path.dirname(p)).st_ino for p in paths}, undo))

    def _bury(self, path: str) -> Path | None:
        """A second name for a file that is about to go."""
        if not os.path.isfile(path):
            return None
        grave = self._graves / str(self.count)
        os.link(path, grave)
        return grave

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        is_ours = not isinstance(file, int) and os.fspath(file).startswith(self.root)
        if not is_ours or not set(mode) & set("wax+"):
            return self._real["open"](file, mode, *args, **kwargs)
        self._tick()
        path, is_new = os.fspath(file), not os.path.exists(file)
        stream = self._real["open"](file, mode, *args, **kwargs)
        self._torn.add(os.fstat(stream.fileno()).st_ino)
        if is_new:
            self._changed([path], lambda: self._real["unlink"](path))
        return stream

    def _fsync(self, descriptor: int) -> None:
        self._tick()
        inode = os.fstat(descriptor).st_ino
        self._torn.discard(inode)
        self._changes = [(dirs - {inode}, undo) for dirs, undo in self._changes if dirs - {inode}]

    def _rename(self, source: Any, target: Any) -> None:
        self._tick()
        a, b = self._path(source), self._path(target)
        grave = self._bury(b)
        self._real["rename"](a, b)

        def undo() -> None:
            self._real["rename"](b, a)
            if grave is not None:
                os.link(grave, b)

        self._changed([a, b], undo)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._tick()
        name = self._path(path, dir_fd)
        grave = self._bury(name)
        self._real["unlink"](path, dir_fd=dir_fd)
        assert grave is not None

        def undo() -> None:
            if os.path.isdir(os.path.dirname(name)):  # else the directory's own end has reached the disk
                os.link(grave, name)

        self._changed([name], undo)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._tick()
        name = self._path(path, dir_fd)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._changed([name], lambda: shutil.rmtree(name))  # and whatever is in it, synced or not

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._tick()
        name = self._path(path, dir_fd)
        self._real["rmdir"](path, dir_fd=dir_fd)
        self._changed([name], lambda: self._real["mkdir"](name))


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 5), value), "optim.a.exp_avg": torch.full((7,), -value)}


class Life:
    """A run from crash to crash. `returned`: the steps whose save had returned, and are not damaged."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "checkpoints"
        self.root.mkdir(parents=True)
        self.attempt = 1
        self.step = 0
        self.returned: list[int] = []
        self.writing: int | None = None

    def save_next(self) -> None:
        self.writing = self.step + 1
        state = {"step": self.writing}
        assert checkpoint.save(
            self.root,
            self.writing,
            self.attempt,
            tensors(self.writing),
            state,
            Alone(),  # type: ignore[arg-type]
        )
        self.step = self.writing
        self.returned.append(self.step)
        self.writing = None
        checkpoint.clean_up(self.root, KEEP_LAST, None)

    def save_four(self) -> None:
        for _ in range(4):
            self.save_next()

    def resume(self) -> int | None:
        """As the trainer does at its start."""
        checkpoint.remove_rubble(self.root)
        return checkpoint.newest_verified(self.root, Alone())  # type: ignore[arg-type]

    def check(self, found: int | None) -> None:
        """The newest state whose save had returned, or the one that was being written; whole, in any case."""
        allowed = {max(self.returned, default=None), self.writing} - ({None} if self.returned else set())
        assert found in allowed, f"found {found}; had returned: {self.returned}, in flight: {self.writing}"
        self.step = found or 0
        self.writing = None
        if found is None:
            return
        self.returned = sorted({*self.returned, found})
        into = tensors(0)
        checkpoint.load(self.root, found, into)
        assert checkpoint.read_state(self.root, found) == {"step": found}
        for name, tensor in tensors(found).items():
            assert torch.equal(into[name], tensor), name


crashes = st.tuples(st.integers(1, 130), st.integers(0, 12), st.floats(0, 1))
"""(operation that does not happen any more, changes of directories that are lost, what is left of a file)"""


@pytest.fixture(scope="module", autouse=True)
def no_pause():
    """Before a save's second try."""
    with mock.patch.object(checkpoint, "RETRY_S", 0.0):
        yield


@contextmanager
def new_life() -> Iterator[Life]:
    folder = Path(tempfile.mkdtemp(prefix="strop-commit-"))
    try:
        yield Life(folder / "run")
    finally:
        shutil.rmtree(folder)


def until_crash(life: Life, crash: tuple[int, int, float], what: Callable[[], Any]) -> None:
    crash_at, undone, kept_share = crash
    disk = Disk(life.root, crash_at)
    with disk.mounted():
        try:
            what()
        except (PowerLoss, StorageError):  # DCP wraps whatever happens inside of it
            assert disk.dead
    if disk.dead:
        disk.lose_power(undone, kept_share)


@settings(max_examples=60, deadline=None)
@given(st.lists(crashes, min_size=1, max_size=4))
def test_crash_while_saving_and_deleting(lives):
    with new_life() as life:
        for crash in lives:
            until_crash(life, crash, life.save_four)
            life.attempt += 1
            life.check(life.resume())


@settings(max_examples=30, deadline=None)
@given(st.lists(crashes, min_size=1, max_size=3), st.integers(0, 10**6), st.booleans())
def test_crash_while_a_damaged_checkpoint_is_set_aside(resumes, place, truncate):
    """The newest of three commits is damaged; the resumes crash, one after the other, at any operation."""
    with new_life() as life:
        for _ in range(3):
            life.save_next()
        folder = checkpoint.step_dir(life.root, 3)
        files = sorted(p for p in folder.iterdir() if p.name != checkpoint.MARKER)
        damage(files[place % len(files)], place, truncate)
        life.returned = [2]
        for crash_at, undone, share in resumes:
            crash = (crash_at % 6 + 1, undone, share)  # a resume makes fewer operations than saves do
            until_crash(life, crash, life.resume)
        life.check(life.resume())
        assert life.step == 2


def damage(path: Path, place: int, truncate: bool) -> None:
    content = bytearray(path.read_bytes())
    at = place % len(content)
    if truncate:
        del content[at:]
    else:
        content[at] ^= 1
    path.write_bytes(content)


def test_every_single_operation():
    """No draws: a crash at each operation of a third save and its clean-up, with nothing and all lost."""
    with new_life() as life:
        life.save_next()
        life.save_next()
        disk = Disk(life.root, None)
        with disk.mounted():
            life.save_next()
        operations = disk.count
    assert operations > 20
    for crash_at in range(1, operations + 1):
        for undone, share in ((0, 1.0), (0, 0.0), (100, 0.5)):
            with new_life() as life:
                life.save_next()
                life.save_next()
                until_crash(life, (crash_at, undone, share), life.save_next)
                life.attempt += 1
                life.check(life.resume())
                assert life.step in (2, 3)
                life.save_next()  # and it goes on from there
                assert attempts.committed_step(life.root.parent) == life.step
