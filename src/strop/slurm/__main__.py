"""`python3 -m strop.slurm begin|collect|end|term` for sbatch/lib.sh, `gpus|end-tool` for sbatch/tool.sh: on
the host, standard library only.

`begin ALGO ARGS` prints shell assignments for the ranks. `end --exit CODE --signals "USR1 TERM"` prints
"ACTION EXIT_CODE"; the summary for the reader goes to stderr, which is the job's output file. `term` is
called when TERM has reached the batch shell of a job with a successor. `collect` runs on every node;
`collect earlier`, before the ranks start, leaves out this attempt. `show ARGS` prints a command line without
its secrets. `gpus` prints how many this node has in the allocation. `end-tool` has the options of `end`, and
prints the job's exit code.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from strop.errors import EXIT_DONE, EXIT_STORAGE, EXIT_USER, STORAGE_ERRNOS, UserError
from strop.obs import secrets
from strop.slurm import body, collect, command, env, lease, stop, tool_end


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["begin"] and len(argv) > 1:
        return begin(argv[1], list(argv[2:]))
    if argv[:1] == ["end"]:
        return end(list(argv[1:]))
    if argv[:1] == ["end-tool"]:
        return end_tool(list(argv[1:]))
    if argv[:1] == ["gpus"]:
        print(env.num_gpus())
        return EXIT_DONE
    if argv[:1] == ["collect"]:
        return collect_logs(earlier=argv[1:] == ["earlier"])
    if argv[:1] == ["show"]:
        print(" ".join(secrets.mask_args(argv[1:])))
        return EXIT_DONE
    if argv[:1] == ["term"]:
        if body.cancel_successor(env.read_job()):
            say("cancelled, and its successor with it")
        return EXIT_DONE
    print(
        "usage: python3 -m strop.slurm begin ALGO ARGS | collect [earlier] | "
        "end --exit CODE --signals NAMES | end-tool (likewise) | gpus | term | show ARGS",
        file=sys.stderr,
    )
    return EXIT_USER


def begin(algo: str, args: list[str]) -> int:
    secrets.learn(secrets.values_in_args(args))
    job = env.read_job()
    try:
        tasks = env.tasks_per_node() if job.launcher == "slurm" else env.local_ranks()
        begun = body.begin(algo, args, job)
    except body.NothingToDo as reason:
        say(str(reason))
        print("exit 0")
        return EXIT_DONE
    except UserError as error:
        say(str(error))
        return EXIT_USER
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        say(f"the run cannot be written: {error}\n{body.hold(job)}")
        return EXIT_STORAGE
    except (lease.Held, body.Exhausted, command.SlurmError) as error:
        say(str(error))
        return 1
    for note in begun.notes:
        say(note)
    where = f"job {job.target} on {','.join(job.nodes)}" if job.target else "this machine"
    say(f"run {begun.run_dir}, attempt {begun.attempt}, {where}")
    values = {
        "STROP_RUN_DIR": begun.run_dir,
        "STROP_ATTEMPT": begun.attempt,
        "STROP_JOB_ID": job.target or "",
        "STROP_RESTART_COUNT": job.restart_count,
        "STROP_END_TIME": "" if begun.end_time is None else int(begun.end_time),
        "STROP_TASKS_PER_NODE": tasks,
        "STROP_GPUS_PER_NODE": env.num_gpus() if job.launcher == "slurm" else 0,
        "STROP_NUM_NODES": len(job.nodes),
        "STROP_SUCCESSOR_JOB": begun.successor or "",
        "STROP_LEFT_LOGS": 1 if begun.left_logs else "",
    }
    for name, value in values.items():
        print(f"export {name}={shlex.quote(str(value))}")
    return 0


def collect_logs(*, earlier: bool) -> int:
    job = env.read_job()
    assert job.run_dir is not None
    assert job.attempt is not None
    assert job.log_dir is not None
    failed = collect.from_this_node(job.run_dir, job.log_dir, job.node, job.attempt, earlier=earlier)
    for error in failed:
        print(f"{job.node}: {error}", file=sys.stderr)
    return 1 if failed else EXIT_DONE


def end(argv: list[str]) -> int:
    options = _how_it_ended("end", argv)
    job = env.read_job()
    decision = body.end(job, options.exit, options.signals.split())
    text = f"run {job.run_dir}, attempt {job.attempt}: {decision.summary}"
    say(decision.summary if decision.cause == "user" else text)
    body.notify(job, decision, text)
    if decision.cause == "user" and job.launcher == "local":
        body.discard_unnamed(job)
    print(decision.action, decision.exit_code)
    return 0


def end_tool(argv: list[str]) -> int:
    options = _how_it_ended("end-tool", argv)
    ending = tool_end.end(env.read_job(), options.exit, options.signals.split())
    say(ending.words)
    print(ending.exit_code)
    return 0


def _how_it_ended(name: str, argv: list[str]) -> argparse.Namespace:
    stop.block_signals()  # the requeue that this very command asks for sends TERM to it
    parser = argparse.ArgumentParser(prog=f"python3 -m strop.slurm {name}")
    parser.add_argument("--exit", type=int, required=True)
    parser.add_argument("--signals", default="")
    return parser.parse_args(argv)


def say(text: str) -> None:
    for line in secrets.redact(text).splitlines():
        print(f"strop: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
