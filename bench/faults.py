"""Train under injected faults on a real (local) Slurm cluster; compare with an undisturbed run bit for bit.

    python bench/faults.py --faults 100 --seed 1 [--json FILE] [--kinds 'SIGKILL,node lost'] [--keep DIR]

It starts a cluster of two nodes, makes a small model and data, trains once undisturbed, and then again and
again under faults of all kinds at moments drawn from the seed. Every fault must lead to its cause and action
(those in bench/faultlib/kinds.py), and every run to the same weights, optimiser state and metrics.jsonl.
Faults that must end a run (scancel, NaN, the user's errors, spent budgets) get runs of their own. The exit
code is 0 only if all went as it should. Full disks need root, for a file system of their own; without it
those kinds are left out. --keep DIR: work there, and leave it in place.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "src")]  # run uninstalled

from bench.faultlib import drive, endings, kinds, table, task  # noqa: E402
from bench.faultlib.drive import Result, RunResult, Stage  # noqa: E402
from bench.results import write  # noqa: E402
from strop.slurm.local_cluster import LocalCluster  # noqa: E402


def main() -> int:
    args = parse_args()
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="strop-faults-", dir="/tmp"))).resolve()
    cluster = LocalCluster("faults", folder / "cluster")
    names = chosen_kinds(args)
    good = False
    try:
        say(f"cluster, model and data in {folder}")
        cluster.up(num_nodes=2)
        stage = Stage(
            cluster, task.make(folder / "task", args.steps), sys.executable, WATCHDOG, is_root(), say
        )
        try:
            good = run(stage, args, names)
        finally:
            for path in (folder / "task" / "runs").glob("*"):
                stage.close(path.name)
    finally:
        cluster.down()
        if good and not args.keep:
            shutil.rmtree(folder)
        elif not good:
            print(f"kept: {folder}", flush=True)
    return 0 if good else 1


WATCHDOG = ("watchdog.step_s=12", "watchdog.start_s=45", "watchdog.save_s=30")
"""Limits that fit steps of a tenth of a second."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every fault and run there")
    parser.add_argument(
        "--kinds", help="only these, by comma: " + ", ".join([*kinds.SURVIVABLE, *endings.ENDINGS])
    )
    parser.add_argument("--steps", type=int, default=320, help="optimiser steps of a run (default 320)")
    parser.add_argument("--per-run", type=int, default=10, help="faults in one run (default 10)")
    parser.add_argument("--keep", type=Path, help="work in this new directory and keep it")
    return parser.parse_args()


def is_root() -> bool:
    return kinds.os.geteuid() == 0


def chosen_kinds(args: argparse.Namespace) -> list[str]:
    names = [*kinds.SURVIVABLE, *endings.ENDINGS]
    if args.kinds:
        asked = [word.strip() for word in args.kinds.split(",")]
        unknown = [word for word in asked if word not in names]
        if unknown:
            sys.exit(f"--kinds: no {', '.join(unknown)}; there are {', '.join(names)}")
        names = asked
    if not is_root():
        left_out = [name for name in names if name in kinds.SURVIVABLE and kinds.SURVIVABLE[name].needs_root]
        names = [name for name in names if name not in left_out]
        if left_out:
            print(f"not root, so without: {', '.join(left_out)}")
    return names


def run(stage: Stage, args: argparse.Namespace, names: list[str]) -> bool:
    begin = time.time()
    survivable = [name for name in names if name in kinds.SURVIVABLE]
    fatal = [name for name in names if name in endings.ENDINGS]
    num_fatal = args.faults * len(fatal) // (len(fatal) + 2 * len(survivable))  # half as often as others
    schedule = kinds.draw_schedule(args.seed, args.faults - num_fatal, survivable, args.per_run)
    draw = random.Random(args.seed)
    ends = [fatal[i % len(fatal)] for i in range(num_fatal)]
    draw.shuffle(ends)

    say("the undisturbed run")
    runs = [drive.undisturbed(stage, "undisturbed")]
    say(f"  {stage.task.max_steps} steps, {runs[0].wall_s:.0f} s, of them {runs[0].kept_s:.0f} s in steps")
    results: list[Result] = []
    disturbed: list[RunResult] = []
    try:
        play(stage, args.faults - num_fatal, schedule, ends, results, disturbed)
    except KeyboardInterrupt:
        say("interrupted: what there is so far")
    return report(stage, args, results, disturbed, runs[0], time.time() - begin)


def play(
    stage: Stage, number: int, schedule: list[list[kinds.Fault]], ends: list[str],
    results: list[Result], disturbed: list[RunResult],
) -> None:  # fmt: skip
    """All runs, disturbed ones and those that must end in turn; fills `results` and `disturbed`.
    `number`: how many faults the schedule has."""
    while schedule or ends:
        for kind in [ends.pop() for _ in range(min(len(ends), 2 if schedule else len(ends)))]:
            number += 1
            results.append(endings.play(stage, number, f"end{number}", kind))
        if not schedule:
            break
        faults = schedule.pop(0)
        name = f"run{len(disturbed) + 1}"
        say(f"{name}: {len(faults)} faults")
        new, end, left = drive.disturbed(stage, name, faults, "undisturbed")
        results += new
        disturbed.append(end)
        verdict = "; ".join(end.complaints) or "equal to the undisturbed run, bit for bit"
        say(f"  {verdict} ({end.wall_s:.0f} s)")
        stage.close(name)
        if left and not (end.complaints and not new):
            schedule.append(left)


def report(
    stage: Stage, args: argparse.Namespace, results: list[Result], disturbed: list[RunResult],
    undisturbed: RunResult, seconds: float,
) -> bool:  # fmt: skip
    survived = sum(not r.complaints for r in results)
    wrong = sum(r.wrong_cause for r in results)
    unequal = sum(bool(r.complaints) for r in disturbed)
    good = survived == len(results) == args.faults and not unequal
    lines = [
        *table.kinds_table(results),
        "",
        *table.restart_table(results),
        "",
        *(table.ratios(results, disturbed, args.steps, stage.task.save_every) if disturbed else []),
    ]
    print("\n".join(lines))
    for r in [r for r in results if r.complaints]:
        print(f"fault {r.number}, {r.kind} ({r.phase}) in {r.run}: {'; '.join(r.complaints)}")
    last = (
        f"{survived} of {args.faults} survived, {wrong} wrong causes, "
        f"{len(disturbed) - unequal} of {len(disturbed)} runs equal to the undisturbed one bit for bit, "
        f"{seconds / 60:.0f} min"
    )
    if args.json:
        write(args.json, to_json(args, results, disturbed, undisturbed, last))
    print(last, flush=True)
    return good


def to_json(
    args: argparse.Namespace,
    results: list[Result],
    disturbed: list[RunResult],
    undisturbed: RunResult,
    last: str,
) -> dict[str, Any]:
    return {
        "summary": last,
        "seed": args.seed,
        "steps": args.steps,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "undisturbed": drive.as_dict(undisturbed),
        "runs": [drive.as_dict(r) for r in disturbed],
        "faults": [drive.as_dict(r) for r in results],
    }


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
