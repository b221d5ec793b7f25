"""The wrapper of one rank: `srun ... python -m strop.slurm.launch -- ALGO ARGS`.

It makes the STROP_* variables out of srun's, blocks USR1 and TERM (the mask outlives the exec, and every
thread that torch will start inherits it), gives the rank its own stderr file, and becomes the trainer.
Rank 0 keeps stdout, which is the job's output; the other ranks' stdout joins their stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

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
    logs = attempts.log_dir(task.run_dir, task.attempt)
    logs.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(logs / f"rank{task.rank:05d}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    os.dup2(descriptor, 2)
    if task.rank != 0:
        os.dup2(descriptor, 1)
    python = task.python or sys.executable
    os.execvpe(python, [python, "-m", "strop.train", *argv[1:]], variables)


if __name__ == "__main__":
    main(sys.argv[1:])
