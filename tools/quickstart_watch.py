"""Watch a run from outside, a line per step, until it has ended; interrupt it once on the way.

    python3 -m tools.quickstart_watch --run runs/NAME --steps N (--job ID | --pid PID) [--interrupt STEP]

It reads what any user can read: metrics.jsonl, timing.jsonl and the attempts' records. Exit code 0: the run
is done; 1: the job has ended otherwise (its own summary is printed). Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Optional

from strop.slurm import attempts, command
from tools.command_line import run

POLL_S = 1.0


class Lines:
    """Complete new lines of a file that is written to, and cut back when a run resumes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def describe(row: dict[str, Any], steps: int, seconds: list[float]) -> str:
    """One line for a step or a validation."""
    prefix = "eval_" if "eval_loss" in row else ""
    text = f"  validation after step {row['step']}" if prefix else f"  step {row['step']:>3}/{steps}"
    text += f"  loss {row[prefix + 'loss']:.4f}"
    for key, label, form in (
        ("rewards/accuracies", "accuracy", ".0%"),
        ("rewards/margins", "margin", "+.3f"),
    ):
        if prefix + key in row:
            text += f"  {label} {row[prefix + key]:{form}}"
    if not prefix and seconds:
        middle = sorted(seconds)[len(seconds) // 2]
        text += f"  {seconds[-1]:.1f} s  about {(steps - row['step']) * middle / 60:.1f} min of training left"
    return text


def has_ended(job: Optional[str], pid: Optional[int]) -> bool:
    """Whether the job is gone for good; a requeued one is not."""
    if pid is not None:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False
    record = command.show_job(job) if job else None
    return record is None or record["JobState"] in command.ENDED


def interrupt(job: Optional[str], pid: Optional[int]) -> None:
    """What a job gets near its time limit; a preemption does the same to it."""
    print(
        "Now the job is interrupted on purpose, as by a preemption or the end of its time limit:\n"
        "it gets USR1, commits a checkpoint, goes back into the queue and is started again."
    )
    if job:
        words = ["scancel", "--signal=USR1", "--batch", job]
        print(" ".join(words), flush=True)
        command.slurm(words)
    elif pid is not None:
        print(f"kill -USR1 {pid}", flush=True)
        os.kill(pid, signal.SIGUSR1)


def watch(args: argparse.Namespace) -> bool:
    metrics, timing = Lines(args.run / "metrics.jsonl"), Lines(args.run / "timing.jsonl")
    seconds: list[float] = []
    seen_attempts, last_look, to_interrupt = 0, 0.0, args.interrupt
    while True:
        ended = False
        if time.monotonic() - last_look > 5:  # asked before the files are read: what it wrote last is seen
            last_look = time.monotonic()
            ended = has_ended(args.job, args.pid)
        records = attempts.read_all(args.run)
        if len(records) > seen_attempts:
            seen_attempts = len(records)
            nodes = ", ".join(records[-1].get("nodes") or [])
            print(f"  attempt {seen_attempts} has begun" + (f" on {nodes}" if nodes else ""), flush=True)
        seconds += [row["step_s"] for row in timing.read()]
        for row in metrics.read():
            print(describe(row, args.steps, seconds), flush=True)
            if to_interrupt is not None and row["step"] >= to_interrupt:
                to_interrupt = None
                interrupt(args.job, args.pid)
        if records and records[-1]["state"] == "DONE" and records[-1].get("closed"):
            return True
        if ended:
            summary = records[-1].get("summary") if records else None
            print(f"the job has ended: {summary or 'without a record of its own'}", file=sys.stderr)
            return False
        time.sleep(POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps that the run will make")
    parser.add_argument("--interrupt", type=int, metavar="STEP", help="interrupt the job after this step")
    parser.add_argument("--job", help="Slurm job id")
    parser.add_argument("--pid", type=int, help="process id of a job without Slurm")
    sys.exit(0 if watch(parser.parse_args()) else 1)


if __name__ == "__main__":
    run(main)
