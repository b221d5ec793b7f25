"""srun's stand-in on one machine: `python3 -m strop.slurm.local_launch --ranks N -- ALGO ARGS`.

Sets the variables that srun would set, forwards USR1 and TERM to the ranks, and kills the others when
one fails, as `srun --kill-on-bad-exit=1` does. HUP kills them all (a second Ctrl-C in lib.sh).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from strop.slurm import env

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)
POLL_S = 0.1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m strop.slurm.local_launch")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    watched = {*FORWARDED, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # before the first rank: none may be missed
    ranks = [start(rank, options.ranks, options.args) for rank in range(options.ranks)]
    return supervise(ranks, watched)


def start(rank: int, num_ranks: int, args: Sequence[str]) -> subprocess.Popen[bytes]:
    variables = env.all_variables()
    variables.update(
        SLURM_PROCID=str(rank),
        SLURM_NTASKS=str(num_ranks),
        SLURM_LOCALID=str(rank),
        SLURM_NODEID="0",
        SLURM_STEP_TASKS_PER_NODE=str(num_ranks),
    )
    variables.pop("SLURM_CPUS_PER_TASK", None)
    python = variables.get("PYTHON") or sys.executable
    return subprocess.Popen([python, "-m", "strop.slurm.launch", *args], env=variables)


def supervise(ranks: Sequence[subprocess.Popen[bytes]], watched: set[signal.Signals]) -> int:
    """Wait for all ranks; the first bad exit code is the result, as a shell would give it."""
    result = 0
    while any(rank.poll() is None for rank in ranks):
        received = signal.sigtimedwait(watched, POLL_S)
        if received and received.si_signo in FORWARDED:
            send(ranks, received.si_signo)
        failed = next(((i, r.returncode) for i, r in enumerate(ranks) if r.poll() not in (None, 0)), None)
        if failed and result == 0:
            rank, code = failed
            if code == -signal.SIGKILL:  # as srun says it: strop.slurm.deaths reads this
                name = socket.gethostname()
                print(f"local_launch: error: {name}: task {rank}: Killed", file=sys.stderr, flush=True)
            result = code if code > 0 else 128 - code
            time.sleep(0.5)  # the others may be about to say why
            send(ranks, signal.SIGKILL)
        if received and received.si_signo == signal.SIGHUP:
            result = result or 128 + signal.SIGHUP
            send(ranks, signal.SIGKILL)
    codes = [r.returncode for r in ranks if r.returncode]
    return result or (codes[0] if codes and codes[0] > 0 else 128 - codes[0] if codes else 0)


def send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            os.kill(rank.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
