"""The fault benchmark in short: a tiny run on the real cluster under about ten kinds of fault.

The truth is the undisturbed run (weights, optimiser state and metrics.jsonl, bit for bit) and the table of
causes and actions in the benchmark's own list of kinds. bench/faults.py does the same a hundred times.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.faultlib import drive, endings, kinds, task
from bench.faultlib.drive import Stage
from bench.faultlib.kinds import Fault

pytestmark = pytest.mark.slurm

FAULTS = [
    Fault(1, "SIGKILL", "reference", 1, 3, 0.3),
    Fault(2, "USR1", "model", 0, 3, 0.1),
    Fault(3, "SIGKILL in a save", "save", 0, 8, 0.5),
    Fault(4, "preempted with grace", "train", 0, 8, 0.2),
    Fault(5, "SIGSEGV", "train", 0, 3, 0.4),
    Fault(6, "SIGKILL in a resume", "resume", 1, 3, 0.6),
    Fault(7, "flipped bit", "train", 1, 8, 0.5),
    Fault(8, "disk full", "save", 0, 3, 0.0),
    Fault(9, "scontrol requeue", "validation", 0, 4, 0.1),
]
ROOT = os.geteuid() == 0
"""Else there is no file system that could be filled, and one fault less."""


@pytest.fixture(scope="module")
def stage(slurm_cluster) -> Iterator[Stage]:
    """Outside of pytest's directories, whose names are too long to read in a log."""
    folder = Path(tempfile.mkdtemp(prefix="strop-faults-", dir="/tmp"))
    made = task.make(folder, max_steps=110, save_every=5, validate_every=10)
    stage = Stage(slurm_cluster, made, sys.executable, root=ROOT)
    yield stage
    for run in (folder / "runs").iterdir():
        stage.close(run.name)
    shutil.rmtree(folder)


def test_nothing_is_lost(stage):
    drive.undisturbed(stage, "undisturbed")
    faults = [fault for fault in FAULTS if ROOT or not kinds.SURVIVABLE[fault.kind].needs_root]
    results, run, left = drive.disturbed(stage, "disturbed", faults, "undisturbed")
    assert [line for r in results for line in r.complaints] == []
    assert run.complaints == []
    assert not left, "the run was too short for its faults"
    assert {r.exit_code for r in results if r.kind == "disk full"} <= {74}


@pytest.mark.parametrize("kind", ["scancel", "NaN", "bad row"])
def test_what_must_end_a_run_ends_it(stage, kind):
    result = endings.play(stage, 1, "end-" + kind.replace(" ", "-"), kind)
    assert result.complaints == []


def test_the_schedule_is_drawn_from_the_seed_and_holds_every_kind():
    names = list(kinds.SURVIVABLE)
    runs = kinds.draw_schedule(7, 90, names, 10)
    assert runs == kinds.draw_schedule(7, 90, names, 10) != kinds.draw_schedule(8, 90, names, 10)
    drawn = [fault for run in runs for fault in run]
    assert [fault.number for fault in drawn] == list(range(1, 91))
    assert {fault.kind for fault in drawn} == set(names)
    assert all(fault.phase in kinds.SURVIVABLE[fault.kind].phases for fault in drawn)
