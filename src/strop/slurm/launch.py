"""The wrapper of one rank: `srun ... python -m strop.slurm.launch -- ALGO ARGS`.

It makes the STROP_* variables out of srun's, blocks USR1 and TERM (the mask outlives the exec, and every
thread that torch will start inherits it), gives the rank a file of its own for what is written to the raw
descriptors 1 and 2, and becomes the trainer. Rank 0 keeps a way to the job's output: STROP_STDOUT_FD.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from strop.obs import log_line
from strop.slurm import attempts, env, rendezvous, stop


def main(argv: Sequence[str]) -> None:
    stop.block_signals()
    assert argv[:1] == ["--"], argv
    task = env.read_task()
    variables = env.rank_variables(task, env.all_variables(), len(os.sched_getaffinity(0)))
    if "GLOO_SOCKET_IFNAME" not in variables:
        # gloo would take what the host's own name stands for, on Debian a loopback address
        name = rendezvous.interface_of(rendezvous.own_address())
        if name:
            variables["GLOO_SOCKET_IFNAME"] = name
    variables["PYTHONFAULTHANDLER"] = "1"  # a native crash leaves its Python stack from the first import on
    try:
        descriptor = open_raw(task)
    except OSError as error:  # the training is worth more than its log
        print(f"strop: rank {task.rank} on {task.node} has no log of its own: {error}", file=sys.stderr)
    else:
        if task.rank == 0:
            variables["STROP_STDOUT_FD"] = str(os.dup(1))
            os.set_inheritable(int(variables["STROP_STDOUT_FD"]), True)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    python = task.python or sys.executable
    os.execvpe(python, [python, "-m", "strop.train", *argv[1:]], variables)


def open_raw(task: env.Task) -> int:
    """The first segment. What a namesake of this run has left on the node's own disk goes first."""
    directory = attempts.rank_log_dir(task.run_dir, task.attempt, task.log_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / log_line.Segment(task.rank, 0, True).name
    if task.log_dir is not None:
        for old in directory.glob(f"rank{task.rank:05d}.*"):
            old.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


if __name__ == "__main__":
    main(sys.argv[1:])
