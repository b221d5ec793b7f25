"""The wrapper of one rank: `srun ... python -m strop.slurm.launch -- ALGO ARGS`.

It makes the STROP_* variables out of srun's, blocks USR1 and TERM (the mask outlives the exec, and every
thread that torch will start inherits it), and starts the trainer. It stays itself as the process that writes
what comes out of the trainer's descriptors 1 and 2 to the rank's file, without secrets, and ends as the
trainer ends (`strop.obs.raw_writer`). Rank 0 keeps a way to the job's output: STROP_STDOUT_FD.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from strop.obs import raw_writer, secrets
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
    sink: raw_writer.Sink
    try:
        sink = open_raw(task)
    except OSError as error:  # the training is worth more than its log
        print(f"strop: rank {task.rank} on {task.node} has no log of its own: {error}", file=sys.stderr)
        sink = raw_writer.Descriptor(2)
    python = task.python or sys.executable

    def become(given: Mapping[str, str]) -> NoReturn:
        os.execvpe(python, [python, "-m", "strop.train", *argv[1:]], {**variables, **given})

    raw_writer.run(become, sink, secrets.values_in_args(argv[1:]), to_job=task.rank == 0)


def open_raw(task: env.Task) -> raw_writer.Segments:
    """The first segment. What a namesake of this run has left on the node's own disk goes first."""
    directory = attempts.rank_log_dir(task.run_dir, task.attempt, task.log_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if task.log_dir is not None:
        for old in directory.glob(f"rank{task.rank:05d}.*"):
            old.unlink()
    return raw_writer.Segments(directory, task.rank)


if __name__ == "__main__":
    main(sys.argv[1:])
