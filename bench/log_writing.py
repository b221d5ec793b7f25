"""What a line of a rank's log costs the rank: `RankLog.write` itself, and a call of Python's logging.

    python -m bench.log_writing [--lines 50000] [--directory DIR]

The directory is on the disk to be measured; by default a temporary one. Target: under 20 us a line.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

from strop.obs.logs import ToRankLog
from strop.obs.rank_log import RankLog
from strop.run import Position

MESSAGE = "step %d/50000  loss 0.6931  acc 0.53  lr 1.0e-06  grad 1.23  412 tok/s  eta 3m12s"


def write_us(directory: Path, lines: int) -> dict[str, float]:
    """Microseconds a line: "write" and "logging", each with rotation on the way."""
    rank_log = RankLog(directory, 0, "node1", 1, position=Position(), max_bytes=8 << 20)
    log = logging.getLogger("bench.log_writing")
    log.propagate = False
    log.setLevel(logging.INFO)
    log.addHandler(ToRankLog(rank_log))
    start = time.perf_counter()
    for i in range(lines):
        rank_log.write("INFO", "bench", MESSAGE % i)
    between = time.perf_counter()
    for i in range(lines):
        log.info(MESSAGE, i)
    end = time.perf_counter()
    return {"write": (between - start) / lines * 1e6, "logging": (end - between) / lines * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for name, us in write_us(Path(folder), options.lines).items():
            print(f"{name}: {us:.1f} us a line")


if __name__ == "__main__":
    main()
