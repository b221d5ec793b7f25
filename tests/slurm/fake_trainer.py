"""Stands for `strop.train` where a test is about the job and not about training: counts steps to a goal.

Arguments key=value: steps (goal), step_s, fail (user, exception, kill, segv, diverged, oom, storage, exit0),
at (the step at which rank `rank` fails), once (only in the first attempt), hold_commit_s (how long a commit
takes), log (1: every rank logs its steps as the trainer does), leak (the name of a variable whose value every
rank writes to the raw descriptors, at once and in two halves, before it fails).
Rank 0 writes every step to steps.jsonl; a stop request is agreed on through files, since there is no process
group here. `+metadata.steps=9` is the same as `steps=9`: the real configuration lets it pass.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from strop.errors import EXIT_DIVERGED, EXIT_STORAGE, EXIT_USER
from strop.slurm import attempts, rendezvous, stop
from strop.slurm.env import Env, read_env

EXIT_CODES = {"user": EXIT_USER, "diverged": EXIT_DIVERGED, "storage": EXIT_STORAGE}


def main(args: dict[str, str]) -> int:
    faulthandler.enable()
    env = read_env()
    assert env.run_dir is not None
    assert env.attempt is not None
    request = stop.StopRequest(env.run_dir, env.attempt)
    log = start_log(env) if args.get("log") else logging.getLogger()
    if env.rank == 0:
        rendezvous.publish(env.run_dir, env.attempt, rendezvous.own_address(env.ifname), 1)
    try:
        rendezvous.wait_for(env.run_dir, env.attempt, env.rank, env.world_size, 60.0, request)
    except rendezvous.Stopped:
        return 0  # there is nothing to save yet
    step = attempts.committed_step(env.run_dir) or 0
    goal = int(args.get("steps", 5))
    while step < goal:
        step += 1
        time.sleep(float(args.get("step_s", 0.1)))
        if env.rank == 0:
            with open(env.run_dir / "steps.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "attempt": env.attempt}) + "\n")
        log.info("step %d of %d", step, goal)
        fail(env, args, step)
        reason = agree(env, request, step)
        if reason:
            commit(env, step, args)
            return end(env, "YIELD", step, reason)
    commit(env, step, args)
    return end(env, "DONE", step, None)


def start_log(env: Env) -> logging.Logger:
    """With the real module; it is imported here because it takes a while."""
    from strop.config import LogConfig
    from strop.obs import logs
    from strop.run import Position

    assert env.run_dir is not None
    assert env.attempt is not None
    own = attempts.rank_log_dir(env.run_dir, env.attempt, env.log_dir)
    shared = attempts.log_dir(env.run_dir, env.attempt)
    logs.setup(LogConfig(), env, own, shared, env.attempt, Position())
    return logging.getLogger("strop")


def fail(env: Env, args: dict[str, str], step: int) -> None:
    kind = args.get("fail")
    if kind is None or step != int(args.get("at", 2)) or env.rank != int(args.get("rank", 0)):
        return
    if args.get("once") and env.attempt != 1:
        return
    if args.get("leak"):
        leak(os.environ[args["leak"]].encode())
    assert env.run_dir is not None
    assert env.attempt is not None
    if kind in ("kill", "segv"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSEGV)
    if kind == "exit0":
        os._exit(0)
    code = EXIT_CODES.get(kind, 1)
    message = args.get("message", f"made to fail: {kind}")
    attempts.write_verdict(
        env.run_dir,
        env.attempt,
        env.rank,
        kind=kind,
        exit_code=code,
        message=message,
        step=step,
        phase=args.get("phase", "TRAIN"),
        node=env.node,
    )
    os._exit(code)


def leak(secret: bytes) -> None:
    libc = ctypes.CDLL(None)
    for text in (b"before " + secret + b" after\n", b"half: " + secret[:7], secret[7:] + b" done\n"):
        libc.write(2, text, len(text))
        time.sleep(0.05)
    libc.write(1, b"last words " + secret, 11 + len(secret))


def agree(env: Env, request: stop.StopRequest, step: int) -> str | None:
    """Rank 0's view at this step counts for all; it waits for every rank, as a collective would."""
    assert env.run_dir is not None
    logs = attempts.log_dir(env.run_dir, env.attempt or 0)
    path = logs / f"agreed-{step}"
    (logs / f"reached-{step}-{env.rank}").touch()
    if env.rank == 0:
        while not all((logs / f"reached-{step}-{rank}").exists() for rank in range(env.world_size)):
            time.sleep(0.02)
        aside = path.with_suffix(".tmp")
        aside.write_text(request.poll() or "")
        aside.rename(path)
    while not path.exists():
        time.sleep(0.02)
    return path.read_text() or None


def commit(env: Env, step: int, args: dict[str, str]) -> None:
    assert env.run_dir is not None
    assert env.attempt is not None
    if env.rank != 0:
        return
    time.sleep(float(args.get("hold_commit_s", 0)))
    folder: Path = env.run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    assert attempts.holds_lease(env.run_dir, env.attempt)
    (folder / "COMMITTED.json").write_text("{}")


def end(env: Env, state: str, step: int, reason: str | None) -> int:
    assert env.run_dir is not None
    assert env.attempt is not None
    mark = attempts.log_dir(env.run_dir, env.attempt) / "ended"
    if env.rank == 0:
        attempts.finish(env.run_dir, env.attempt, state, step=step, reason=reason)
        mark.touch()
    while not mark.exists():
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    sys.exit(main(dict(a.replace("+metadata.", "").split("=", 1) for a in sys.argv[2:] if "=" in a)))
