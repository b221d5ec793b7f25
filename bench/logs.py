"""How fast many ranks' logs become one: merged, collapsed, followed, beside `sort -m` and heapq.merge.

    python bench/logs.py [--ranks 1024] [--lines 10000] [--json FILE] [--keep DIR] [--only merge|follow|write]

It generates a run of realistic text whose nodes' clocks differ by up to half a second, then measures one
after the other, each in a process of its own, with its peak memory:

    merge          the lines as they are, in order (--json); this is merge_lines_per_s
    text           the same as text (--no-collapse)
    collapse       as tools.logs shows it by default; this is collapse_lines_per_s
    ranges         and with --ranges
    python ...     the same without the library, of some of the ranks
    sort -m        GNU sort over the same files, in the C locale: by the clocks as they are, nothing filtered
    heapq.merge    over json.loads of every line, written out with json.dumps, of some of the ranks

then what --follow costs on 512 live files when nothing happens and how late a new line is shown, and what a
line costs its writer. Files come from the page cache. The figures of some of the ranks are of those alone:
with more of them a heap is deeper, so for all they would be a little worse.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "src")]  # run uninstalled

from bench.log_writing import write_us  # noqa: E402
from bench.results import write  # noqa: E402
from strop.obs import log_files, log_line  # noqa: E402
from strop.obs.log_text import Selection, View  # noqa: E402
from strop.obs.merge import Merge  # noqa: E402
from strop.slurm import attempts  # noqa: E402

SUBSET = 64
"""Ranks for the slow ones."""
LINE_EVERY_S = 0.05
VIEWS = {
    "merge": View(json=True),
    "text": View(collapse=False),
    "collapse": View(),
    "ranges": View(ranges=True),
}
FOLLOWED = 512
IDLE_S = 20.0
NEW_LINES = 15
WRITTEN = 50_000


@dataclass(frozen=True)
class Result:
    name: str
    ranks: int
    lines: int
    seconds: float
    cpu_s: float
    """User and system time: what one core of its own would have taken."""
    rss_mb: float
    shown: int
    """Lines of the output."""

    @property
    def lines_per_s(self) -> float:
        return self.lines / self.seconds


# ------------------------------------------------------------------------------------------ generate

PHRASES = (
    ("INFO", "strop.train", "step {step}: loss 0.{a:04d}, grad_norm 1.{b:03d}, 16384 tokens in 8 sequences"),
    ("INFO", "strop.data", "batch {i} packed: 12 examples, 3.{b:03d} % padding, longest 2048 tokens"),
    ("DEBUG", "strop.dist", "all-gather of layer {layer} took {own:.3f} ms, reduce-scatter {other:.3f} ms"),
    ("INFO", "strop.train", "step {step}: {tokens} tokens/s, {mem:.1f} GiB peak, data waited {own:.3f} s"),
    ("INFO", "strop.checkpoint", "shard {rank} of step {step} written in {other:.2f} s, 1.3 GiB"),
    ("WARNING", "py.warnings", "torch/nn/utils/clip_grad.py:{b}: the total norm is of mixed dtypes"),
)
"""Equal on all ranks, or with the rank's own numbers."""
WEIGHTS = (4, 4, 3, 3, 1, 1)


def generate(run_dir: Path, ranks: int, lines: int) -> int:
    """A finished run. Returns its size in bytes."""
    attempt = attempts.begin(run_dir, job_id=None, restart_count=0, nodes=["n0"])
    attempts.finish(run_dir, attempt, "DONE", step=lines)
    folder = attempts.log_dir(run_dir, attempt)
    draw = random.Random(1)
    offsets = [draw.uniform(-0.5, 0.5) for _ in range(-(-ranks // 8))]
    rows = [
        {"rank": r, "node": f"gpu{r // 8:03d}", "offset_s": offsets[r // 8], "error_s": 1e-4}
        for r in range(ranks)
    ]
    (folder / "clock.json").write_text(json.dumps({"reference_rank": 0, "ranks": rows}))
    order = draw.choices(range(len(PHRASES)), WEIGHTS, k=lines)
    began_us = int(1e6 * time.time())
    for rank in range(ranks):
        content = b"".join(_lines(rank, order, began_us + int(1e6 * offsets[rank // 8])))
        (folder / log_line.Segment(rank, 0, False).name).write_bytes(content)
    return sum(p.stat().st_size for p in folder.iterdir())


def _lines(rank: int, order: list[int], began_us: int) -> Iterator[bytes]:
    """A rank's lines; the writer's encoder makes the form, which is filled in."""
    draw = random.Random(rank).random
    who = {"rank": rank, "node": f"gpu{rank // 8:03d}", "attempt": 1, "step": "@", "phase": "train"}
    forms = []
    for level, logger, _ in PHRASES:
        fields = {"time": "@", **who, "level": level, "logger": logger, "message": "@"}
        forms.append(log_line.encode(fields).decode().replace('"step":"@"', '"step":@').split("@"))
    second, text = 0, ""
    for i, kind in enumerate(order):
        now_us = began_us + int(1e6 * (i * LINE_EVERY_S + 0.004 * draw()))
        if now_us // 1_000_000 != second:
            second = now_us // 1_000_000
            stamp = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
            text = f"{stamp:%Y-%m-%dT%H:%M:%S}"
        own, step = draw(), i // 16
        message = PHRASES[kind][2].format(
            i=i, step=step, rank=rank, layer=i % 48, a=7000 - step % 6000, b=i % 997,
            own=9 * own, other=4 * own, tokens=int(15000 + 900 * own), mem=61 + own,
        )  # fmt: skip
        a, b, c, d = forms[kind]
        yield f"{a}{text}.{now_us % 1_000_000:06d}Z{b}{step}{c}{message}{d}".encode()


# ------------------------------------------------------------------------------------------- measure


def measure(name: str, run_dir: Path, ranks: int) -> dict[str, Any]:
    """In a process of its own: see `child`."""
    logs = log_files.find(run_dir, ranks=[(0, ranks - 1)])
    begin, cpu = time.perf_counter(), time.process_time()
    if name == "heapq.merge":
        read, shown = _heapq_merge(logs)
    else:
        kind = name.rsplit(" ")[-1]
        merge = Merge(logs, Selection(), VIEWS[kind], native=not name.startswith("python"))
        shown = 0
        with open(os.devnull, "wb") as out:
            for block in merge:
                shown += block.count(b"\n")
                out.write(block)
        read = sum(c.counts["read"] for c in merge.counted)
        assert not merge.notes(), merge.notes()
    spent = {"seconds": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"lines": read, **spent, "rss_mb": peak, "shown": shown}


def _heapq_merge(logs: log_files.Logs) -> tuple[int, int]:
    """What one would write first."""

    def stream(source: log_files.Stream) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        with open(source.structured[0].path) as file:
            for number, text in enumerate(file):
                fields = json.loads(text)
                when = datetime.datetime.fromisoformat(fields["time"][:-1])
                when -= datetime.timedelta(microseconds=source.offset_us)
                yield when.isoformat(), source.rank, number, fields

    num = 0
    with open(os.devnull, "w") as out:
        for when, _, _, fields in heapq.merge(*map(stream, logs.streams)):
            fields["time"] = when + "Z"
            out.write(json.dumps(fields) + "\n")
            num += 1
    return num, num


def child(name: str, run_dir: Path, ranks: int) -> Result:
    command = [sys.executable, __file__, "--child", name, "--keep", str(run_dir), "--ranks", str(ranks)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Result(name, ranks, **json.loads(done.stdout))


def sort_merge(run_dir: Path, ranks: int, lines: int) -> Result:
    """All files at once, if the limit of open files allows it."""
    files = sorted(str(p) for p in attempts.log_dir(run_dir, 1).glob("rank*.jsonl"))
    most = min(ranks, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 32)
    command = ["sort", "-m", f"--batch-size={most}", "-T", str(run_dir), "-o", os.devnull, *files]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env={"LC_ALL": "C", "PATH": os.defpath})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    assert status == 0, status
    num, cpu_s = ranks * lines, usage.ru_utime + usage.ru_stime
    return Result("sort -m", ranks, num, seconds, cpu_s, usage.ru_maxrss / 1024, num)


# -------------------------------------------------------------------------------------------- follow


def follow(directory: Path) -> tuple[float, list[float]]:
    """(share of a core on FOLLOWED live files that stand still, seconds until each new line was shown)"""
    run_dir = directory / "live"
    attempt = attempts.begin(run_dir, job_id=None, restart_count=0, nodes=["n0"])
    folder = attempts.log_dir(run_dir, attempt)
    for rank in range(FOLLOWED):
        (folder / log_line.Segment(rank, 0, False).name).write_bytes(_new_line(rank, "it begins"))
        (folder / log_line.Segment(rank, 0, True).name).write_bytes(b"")
    command = [sys.executable, "-m", "tools.logs", str(run_dir), "--follow"]
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'src'}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        time.sleep(2.0)
        begin = time.perf_counter(), _cpu_s(process.pid)
        time.sleep(IDLE_S)
        share = (_cpu_s(process.pid) - begin[1]) / (time.perf_counter() - begin[0])
        late = []
        for number in range(NEW_LINES):
            time.sleep(0.3 + 0.13 * (number % 5))
            written = time.perf_counter()
            with open(folder / log_line.Segment(37 + number, 0, False).name, "ab") as file:
                file.write(_new_line(37 + number, f"line {number}"))
            assert f"line {number}" in process.stdout.readline()
            late.append(time.perf_counter() - written)
        return share, late
    finally:
        process.kill()
        process.wait()
        attempts.finish(run_dir, attempt, "DONE", step=0)


def _new_line(rank: int, message: str) -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc)
    head = {"time": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}", "rank": rank, "node": "n0", "attempt": 1, "step": None}
    return log_line.encode({**head, "phase": None, "level": "INFO", "logger": "strop", "message": message})


def _cpu_s(pid: int) -> float:
    """User and system time of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


# -------------------------------------------------------------------------------------------- report


def main() -> None:
    args = parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.keep, args.ranks)))
        return
    directory = args.keep or Path(tempfile.mkdtemp(prefix="strop-logs-"))
    try:
        numbers = bench(args, directory)
    finally:
        if not args.keep:
            shutil.rmtree(directory)
    if args.json:
        write(args.json, numbers)


def bench(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    if args.only in (None, "merge"):
        numbers |= bench_merge(args, directory)
    if args.only in (None, "follow"):
        share, late = follow(directory)
        numbers |= {"follow_cpu_share": share, "follow_latency_s": max(late)}
        middle = statistics.median(late)
        print(f"--follow on {FOLLOWED} files: {100 * share:.1f} % of a core when idle; a new line is shown")
        print(f"    after {middle:.2f} s (median of {len(late)}), at most {max(late):.2f} s")
    if args.only in (None, "write"):
        (directory / "written").mkdir()
        numbers["write_us_per_line"] = write_us(directory / "written", WRITTEN)["write"]
        print(f"writing: {numbers['write_us_per_line']:.1f} us a line")
    return numbers


def bench_merge(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    run_dir = directory / "generated"
    begin = time.perf_counter()
    num_bytes = generate(run_dir, args.ranks, args.lines)
    spent = time.perf_counter() - begin
    print(f"{args.ranks} ranks x {args.lines} lines, {num_bytes / 2**30:.2f} GiB, made in {spent:.0f} s")
    print(
        f"{'':20}{'ranks':>7}{'lines/s':>12}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}{'lines out':>12}",
        flush=True,
    )
    subprocess.run([sys.executable, "-m", "tools.build_kernels", "--log", "--quiet"], check=True)
    few = min(SUBSET, args.ranks)
    jobs = [(name, args.ranks) for name in VIEWS]
    jobs += [("python merge", few), ("python collapse", few), ("heapq.merge", few)]
    results = []
    for name, ranks in jobs:
        results.append(_shown(child(name, run_dir, ranks)))
    results.append(_shown(sort_merge(run_dir, args.ranks, args.lines)))
    by_name = {r.name: r for r in results}
    return {
        "merge_lines_per_s": by_name["merge"].lines_per_s,
        "collapse_lines_per_s": by_name["collapse"].lines_per_s,
        "peak_rss_mb": max(by_name[name].rss_mb for name in VIEWS),
        "lines": args.ranks * args.lines,
        "rows": [{**vars(r), "lines_per_s": r.lines_per_s} for r in results],
    }


def _shown(r: Result) -> Result:
    speed = f"{r.lines_per_s:12,.0f}{r.seconds:9.1f}{r.cpu_s:8.1f}"
    print(f"{r.name:20}{r.ranks:7}{speed}{r.rss_mb:9.0f}{r.shown:12,}", flush=True)
    return r


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--lines", type=int, default=10_000, help="of each rank")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="work in this new directory and keep it")
    parser.add_argument("--only", choices=("merge", "follow", "write"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
