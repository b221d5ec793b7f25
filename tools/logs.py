"""The log of a run: all ranks and attempts as one text, in the order of time, equal lines as one.

    python -m tools.logs [runs/NAME]          all of it; without a name, of the run that began last
    python -m tools.logs runs/NAME --follow   what comes from now on, over requeues, until the run ends
    python -m tools.logs runs/NAME --why      why it failed last (or attempt N of --attempt N): which rank
                                              failed first, who only followed, and what was decided
    python -m tools.logs runs/NAME --html report.html    the whole run as one page, to hand around (or the
                                              ranks and the end of attempt N)
    python -m tools.logs runs/NAME --collect  fetch what killed jobs have left on their nodes' own disks
                                              (STROP_LOG_DIR), by srun on those nodes

Which lines:
    --rank 37   --rank 0-7,12   --node gpu[01-04]   --attempt 2|last|all   --level warning
    --since 10m --until 5m      the last minutes of the log (s, m, h, d), or times such
                                as 2026-11-22T03:00 or 03:00 (the log's last day), in UTC
    --step 120  --step 120:130  both ends included         --phase save
    --grep 'nan|inf'            a regular expression, in the message or its traceback
    --tail 50                   only the last lines        --no-raw    without raw stderr

    2026-11-22 03:00:01.123 [0-511] INFO     start: loaded shard
    2026-11-22 03:10:09.481 #2 [37] ERROR    train 120: CUDA error: an illegal memory access

are: time in UTC, corrected by the pre-flight check's clock offsets; #attempt, if there are several; ranks;
level; phase and step; message. A line of many ranks stands where the first of them wrote it, if the others
followed within 2 s. --no-collapse shows each, --ranges also collapses lines that differ only in numbers:
`loaded shard [3..17] in [0.8..1.4] s`. --json gives one object a line, with the keys time rank node attempt
step phase level logger message and perhaps traceback, uncollapsed.

Level RAW, which counts as a warning, is what a process or its libraries wrote to stdout and stderr past
Python's logging, and anything that is no line of a log. It has no time of its own and gets that of the rank's
next line. Secrets are masked. What cannot be shown is counted on stderr at the end.

    python -m tools.logs runs/NAME --level error | less      python -m tools.logs runs/NAME --rank 0 -f
    python -m tools.logs runs/NAME --json --grep loss | jq -r '[.time, .rank, .message] | @tsv'

Exit code: 0, also if no line is selected; 78 for a mistake in the command; 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import calendar
import collections
import datetime
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional, Union

from strop import files
from strop.errors import UserError
from strop.obs import html, log_files, log_follow, log_line, log_text, run_files, why
from strop.obs.log_files import Logs
from strop.obs.log_text import FOREVER_US, Selection, View
from strop.obs.merge import Merge
from strop.slurm import attempts as records
from strop.slurm import code, collect, command, env, hostlist
from tools import status
from tools.command_line import command_parser, run

LEVELS = {name.lower(): 10 * number for number, name in enumerate(log_line.LEVELS, start=1)}
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
FOLLOW_TAIL = 20
"""Lines from before, where --tail does not say."""
FETCH_S = 60.0
WAIT = "--immediate=20"
"""Nodes that are taken are said to be, rather than waited for."""
SLOW_BYTES = 256 << 20
"""From here on it is said that the merge runs in Python."""


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="runs/NAME")
    add("--dir", type=Path, default=Path("runs"), help="where all runs are")
    add("--why", action="store_true", help="why it failed")
    add("--html", type=Path, metavar="FILE", help="the run as one page")
    add("--collect", action="store_true", help="fetch what was left on the nodes' disks")
    add("-f", "--follow", action="store_true", help="go on until the run ends")
    add("--rank", metavar="RANKS", help="such as 37 or 0-7,12")
    add("--node", metavar="NODES", help="as Slurm writes them: gpu[01-04]")
    add("--attempt", default="all", metavar="N|last|all")
    add("--level", default="debug", help="this level and above: " + ", ".join(LEVELS))
    add("--since", metavar="WHEN", help="such as 10m or 03:00")
    add("--until", metavar="WHEN")
    add("--step", metavar="FROM:TO", help="one step, or both ends included")
    add("--phase", help="such as save")
    add("--grep", metavar="REGEX", help="in message or traceback")
    add("--tail", metavar="LINES", help="only the last ones")
    add("--raw", action=argparse.BooleanOptionalAction, default=True, help="raw stderr, too")
    add("--json", action="store_true", help="one object a line")
    add("--no-collapse", dest="collapse", action="store_false", help="a line for each rank")
    add("--ranges", action="store_true", help="lines that differ only in numbers as one")
    add("--color", choices=("auto", "always", "never"), default="auto")
    add("-v", "--verbose", action="store_true", help="say how the merge was done")
    return parser.parse_args(argv)


def find_run(name: Optional[str], root: Path) -> Path:
    """The named run, or the one whose newest attempt began last."""
    if name is not None:
        return status.find([name], root)[0]
    runs = status.newest_first(root)
    if not runs:
        raise UserError(f"{root}: no runs there (name one: python -m tools.logs runs/NAME)")
    return runs[0]


def ranges_of(option: str, text: str) -> list[tuple[int, int]]:
    """ "0-7,12" -> [(0, 7), (12, 12)]"""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{option} {text}: expected numbers and ranges such as 37 or 0-7,12")
        found.append((int(match[1]), int(match[2] or match[1])))
    return found


def steps_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:(:)(\d*))?", text)
    if match is None:
        raise UserError(f"--step {text}: expected a step such as 120, or both ends such as 120:130")
    low = int(match[1])
    high = low if match[2] is None else int(match[3] or 10**18)
    if high < low:
        raise UserError(f"--step {text}: {high} comes before {low}")
    return low, high


def time_of(option: str, text: str, newest_us: int) -> int:
    """Microseconds. Durations count back from the newest line, a time of day is the last such before it."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return newest_us - int(1e6 * float(match[1]) * UNITS_S[match[2]])
    day = datetime.datetime.fromtimestamp(newest_us / 1e6, datetime.timezone.utc)
    of_day = re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", text)
    whole = f"{day:%Y-%m-%d}T{text.zfill(5 if not of_day[1] else 8)}" if of_day else text
    try:
        when = datetime.datetime.fromisoformat(re.sub("[Zz]$", "+00:00", whole))
        when.astimezone(datetime.timezone.utc)
    except (ValueError, OverflowError):
        raise UserError(f"{option} {text}: expected a duration such as 10m or a time in UTC") from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.timezone.utc)
    if of_day and when > day:
        when -= datetime.timedelta(days=1)
    return calendar.timegm(when.utctimetuple()) * 1_000_000 + when.microsecond


def nodes_of(text: str) -> frozenset[str]:
    try:
        return frozenset(hostlist.expand(text))
    except ValueError as error:
        raise UserError(f"--node {text}: {error}") from error


def selection(options: argparse.Namespace, newest_us: int) -> Selection:
    if options.level.lower() not in LEVELS:
        raise UserError(f"--level {options.level}: expected one of {', '.join(LEVELS)}")
    pattern = None
    if options.grep is not None:
        try:
            pattern = re.compile(options.grep)
        except re.error as error:
            raise UserError(f"--grep {options.grep}: {error}") from error
    since = 0 if options.since is None else time_of("--since", options.since, newest_us)
    until = FOREVER_US if options.until is None else time_of("--until", options.until, newest_us)
    if options.follow and options.until is not None:
        raise UserError("--until: the end of --follow is the run's")
    if until < since:
        raise UserError(f"--until {options.until}: that is before --since {options.since}")
    return Selection(
        since_us=since,
        until_us=until,
        level=LEVELS[options.level.lower()] if options.level.lower() != "debug" else 0,
        steps=steps_of(options.step) if options.step is not None else None,
        phase=options.phase,
        nodes=nodes_of(options.node) if options.node is not None else None,
        grep=pattern,
    )


def attempt_of(options: argparse.Namespace) -> Union[str, int]:
    if options.attempt.isdecimal():
        return int(options.attempt)
    if options.attempt not in ("last", "all"):
        raise UserError(f"--attempt {options.attempt}: expected a number, last or all")
    return options.attempt


def in_colour(options: argparse.Namespace) -> bool:
    return options.color == "always" or (options.color == "auto" and os.isatty(1))


def explain(options: argparse.Namespace, run_dir: Path) -> None:
    """--why and --html."""
    attempt = attempt_of(options)
    if attempt == "last":
        attempt = max((record["attempt"] for record in records.read_all(run_dir)), default="all")
    number = attempt if isinstance(attempt, int) else None
    if options.why:
        found = why.explain(run_dir, number)
        sys.stdout.write(why.text(found, in_colour(options)))
    if options.html is not None:
        page = html.report(run_dir, number)
        try:
            files.write_atomic(options.html, page)
        except OSError as error:
            raise UserError(f"--html {options.html}: {error.strerror or error}") from error
        print(log_text.printable(str(options.html)))


def fetch(run_dir: Path) -> None:
    """--collect: `python3 -m strop.slurm collect earlier` on each node that has not been collected from."""
    all_records = records.read_all(run_dir)
    runs = status.assess(run_files.read(run_dir, quick=True)).state in status.RUNNING
    left: dict[str, set[str]] = {}
    for record in all_records[: -1 if runs else None]:
        for node in collect.uncollected(run_dir, record):
            left.setdefault(record["log_dir"], set()).add(node)
    number = len(all_records) if runs else len(all_records) + 1
    for log_dir, nodes in left.items():
        told = {"STROP_RUN_DIR": run_dir.resolve(), "STROP_ATTEMPT": number, "STROP_LOG_DIR": log_dir}
        words = ["env", f"PYTHONPATH={code.REPOSITORY / 'src'}", *(f"{k}={v}" for k, v in told.items())]
        words += [env.host_python(), "-m", "strop.slurm", "collect", "earlier"]
        if nodes != {socket.gethostname()}:
            step = [
                f"--nodes={len(nodes)}",
                f"--ntasks={len(nodes)}",
                "--ntasks-per-node=1",
                "--time=5",
                WAIT,
            ]
            words = ["srun", f"--nodelist={','.join(sorted(nodes))}", *step, *words]
        print(f"logs: collecting from {', '.join(sorted(nodes))}", file=sys.stderr)
        try:
            command.slurm(words, deadline_s=FETCH_S)
        except command.SlurmError as error:
            raise UserError(f"--collect: {error}") from error
    if not left:
        print("logs: nothing is left on any node", file=sys.stderr)


def find_logs(options: argparse.Namespace, run_dir: Path) -> Logs:
    ranks = ranges_of("--rank", options.rank) if options.rank is not None else None
    nodes = nodes_of(options.node) if options.node is not None else None
    logs = log_files.find(
        run_dir, attempts=attempt_of(options), ranks=ranks, nodes=nodes, raw=options.raw, live=options.follow
    )
    return log_follow.up_to_last_newlines(logs) if options.follow else logs


def write(blocks: Iterable[bytes]) -> None:
    """Straight to stdout, so that a broken pipe is met here and not at exit."""
    for block in blocks:
        view = memoryview(block)
        while view:
            view = view[os.write(1, view) :]


def last_lines(blocks: Iterable[bytes], number: int) -> bytes:
    kept: collections.deque[bytes] = collections.deque(maxlen=number)
    for block in blocks:
        kept.extend(block.splitlines(keepends=True)[-number:] if number else ())
    return b"".join(kept)


def tail_of(options: argparse.Namespace) -> Optional[int]:
    if options.tail is None:
        return FOLLOW_TAIL if options.follow and options.since is None else None
    if not options.tail.isdecimal():
        raise UserError(f"--tail {options.tail}: expected a number of lines")
    return min(int(options.tail), sys.maxsize)


def show(options: argparse.Namespace, run_dir: Path) -> None:
    logs = find_logs(options, run_dir)
    several = len(logs.attempts) > 1 and options.attempt == "all"
    view = View(options.json, options.collapse, options.ranges, in_colour(options), several)
    now_us = int(1e6 * time.time())
    selected = selection(options, logs.newest_us or now_us)
    tail = tail_of(options)
    merge = Merge(logs, selected, view)
    num_bytes = sum(f.size for s in logs.streams for f in (*s.structured, *s.raw))
    if not merge.native and (options.verbose or num_bytes > SLOW_BYTES):
        how = "`python -m tools.build_kernels` builds what does it ten times as fast"
        print(f"logs: {num_bytes >> 20} MiB are merged in Python; {how}", file=sys.stderr)
    write(merge if tail is None else [last_lines(merge, tail)])
    for note in merge.notes():
        print(f"logs: {note}", file=sys.stderr)
    if options.verbose:
        counts = [sum(c.counts[name] for c in merge.counted) for name in ("read", "shown")]
        print(
            f"logs: {counts[0]} lines of {len(logs.streams)} rank logs, {counts[1]} selected", file=sys.stderr
        )
    if options.follow:
        follow(options, logs, selected, view)


def follow(options: argparse.Namespace, logs: Logs, selected: Selection, view: View) -> None:
    ranks = ranges_of("--rank", options.rank) if options.rank is not None else None
    attempt = int(options.attempt) if options.attempt.isdigit() else None
    watched = log_follow.Watched(ranks, attempt, options.raw)
    follower = log_follow.Follower(logs.run_dir, logs, watched, selected, view)
    write(log_follow.follow(follower, lambda: log_follow.state_of(logs.run_dir)))
    for note in follower.told():
        print(f"logs: {note}", file=sys.stderr)


def main() -> None:
    options = parse()
    try:
        run_dir = find_run(options.run, options.dir)
        if options.collect:
            fetch(run_dir)
        elif options.why or options.html is not None:
            explain(options, run_dir)
        else:
            show(options, run_dir)
    except PermissionError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except KeyboardInterrupt:  # the usual end of --follow
        sys.exit(130)


if __name__ == "__main__":
    run(main)
