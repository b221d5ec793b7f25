"""`python -m strop.train ALGO [--config FILE] [key=value ...]`: one rank of a run, or a whole small one.

The configuration is read and refused before torch is imported. What happens after that, happens in
`strop.loop`; here it is turned into the attempt's record, a verdict and an exit code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Optional

from strop import config as config_module
from strop import packages
from strop import run as run_module
from strop.errors import EXIT_DONE, EXIT_USER, UserError
from strop.obs import logs, native_stack, secrets
from strop.slurm import attempts, rendezvous, stop
from strop.slurm.env import Env, read_env
from strop.watchdog import Watchdog

log = logging.getLogger("strop")

EXIT_INTERRUPTED = 130
"""As a shell gives it for Ctrl-C."""

USAGE = f"usage: python -m strop.train {{{','.join(config_module.ALGOS)}}} [--config FILE] [key=value ...]"


def main(argv: Optional[Sequence[str]] = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        print(USAGE + "\nEvery key of an algorithm: python -m strop.train ALGO --help")
        return EXIT_DONE
    env = read_env()
    stop.block_signals()
    faulthandler.enable()
    has_native_stacks = native_stack.install()
    try:
        if not words or words[0] not in config_module.ALGOS:
            raise UserError(f"{words[0] if words else 'no algorithm'}: {USAGE}")
        path, overrides = config_module.parse_args(words[1:], words[0])
        notes: list[str] = []
        config = config_module.load(words[0], path, overrides, notes)
        run = run_module.open_run(config, env)
    except UserError as error:
        return _refuse(error, env)
    position = run_module.Position()
    secrets.learn(secrets.values_in(config_module.to_dict(config)))
    rank_log = logs.setup(config.log, env, run.rank_logs, run.logs, run.attempt, position)
    position.on_phase = lambda phase: rank_log.write("DEBUG", "strop", f"phase {phase}")
    if env.rank == 0:
        for note in notes:
            log.info("note: %s", note)
        if not has_native_stacks:
            log.info("note: a crash will show no native stack (python -m tools.build_kernels --crash)")
    return _train(run, config, position)


def _refuse(error: UserError, env: Env) -> int:
    """The user's error before there is a run: said once, by the batch shell where there is one."""
    if env.run_dir is not None and env.attempt is not None:
        attempts.write_verdict(
            env.run_dir, env.attempt, env.rank, kind="user", exit_code=EXIT_USER, message=str(error)
        )
    else:
        print(f"error: {secrets.redact(str(error))}", file=sys.stderr)
    return EXIT_USER


def _train(run: run_module.Run, config: config_module.Config, position: run_module.Position) -> int:
    try:
        packages.check()
        with Watchdog(run, config.watchdog, position):
            from strop import loop  # torch and transformers: seconds that a wrong key need not wait for

            loop.train(run, config, position)
        if run.stop.reason == stop.CTRL_C:
            committed = "committed" if position.step else "with nothing to commit yet"
            text = "interrupted at step %s, %s; run.name=%s goes on"
            log.info(text, position.step, committed, run.dir.name)
            return EXIT_INTERRUPTED
    except rendezvous.Stopped as error:
        log.info("stopped before training: %s", error)
        if run.env.rank == 0:
            attempts.finish(run.dir, run.attempt, "YIELD", step=position.step, reason=str(error))
    except KeyboardInterrupt:
        log.info(
            "interrupted at step %s; run.name=%s goes on from the last checkpoint",
            position.step,
            run.dir.name,
        )
        if not run.launched:
            attempts.finish(run.dir, run.attempt, "FAIL", step=position.step, reason="interrupted")
        _leave(EXIT_INTERRUPTED)
    except Exception as error:
        code = run_module.fail(run, error, step=position.step, phase=position.phase)
        if isinstance(error, UserError) and not run.launched:
            print(f"error: {secrets.redact(str(error))}", file=sys.stderr)
        else:
            log.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, UserError))
        if isinstance(error, UserError) and not run.launched and config.run.name is None:
            attempts.discard(run.dir, run.attempt)
        _leave(code)
    return EXIT_DONE


def _leave(code: int) -> NoReturn:
    """End at once: other ranks may be inside a collective that can never end, and destructors would wait."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
