"""What rank 0 tells the world: metrics.jsonl, timing.jsonl, trackers, progress. Other ranks stay silent.

metrics.jsonl holds only what the same run would give again, bit for bit; how long things took goes to
timing.jsonl, which is never cut back and so shows repeated steps too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from strop import config as config_module
from strop.config import Config
from strop.data.ledger import Ledger
from strop.obs import metrics, progress, secrets
from strop.obs.device import DeviceMeter
from strop.obs.metrics import MetricsFile
from strop.obs.sinks import Sinks, check_installed
from strop.run import Run

LINE_EVERY_S = 10.0


class Report:
    """Every method may be called on every rank; only rank 0 acts."""

    def __init__(self, run: Run, config: Config) -> None:
        of = config.log
        check_installed(tensorboard=of.tensorboard, wandb=of.wandb, mlflow=of.mlflow)
        self._run = run
        self._config = config
        self._main = run.env.rank == 0
        self._metrics: Optional[MetricsFile] = None
        self._stall_s = 0.0
        self._peak: Optional[float] = None
        (run.dir / "data").mkdir(exist_ok=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Announce and time a stretch of work; gives a function that reports (done, total)."""
        if not self._main:
            yield lambda done, total: None
            return
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > LINE_EVERY_S:
                last = time.monotonic()
                progress.log.info("%s: %d of %d", name, done, total)

        with progress.phase(name):
            yield tell

    def ledger(self, ledger: Ledger) -> None:
        """What became of every row of one set."""
        progress.log.info("%s", ledger.table())

    def start(
        self,
        config: Config,
        metrics_bytes: int,
        step: int,
        max_steps: int,
        gpu: Optional[str],
        peak_tokens_per_s: Optional[float],
    ) -> None:
        """Open everything at `step`; what metrics.jsonl holds beyond its commit is of steps done again.
        `peak_tokens_per_s`: of one device at its peak, where that is known."""
        if not self._main:
            return
        self._peak = peak_tokens_per_s
        path = self._run.dir / "metrics.jsonl"
        metrics.cut_back(path, metrics_bytes)
        self._metrics = MetricsFile(path)
        self._timing = MetricsFile(self._run.dir / "timing.jsonl")
        self._device = DeviceMeter(gpu)
        self._progress = progress.Progress(max_steps, step)
        self._sinks = Sinks(
            self._run.dir,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            mlflow=config.log.mlflow,
            project=config.log.project,
            config=secrets.mask(config_module.to_dict(config)),
            resumed_from=step or None,
        )

    def step(
        self, line: dict[str, Any], *, tokens: int, seconds: float, data_s: float, pace: dict[str, Any]
    ) -> None:
        """One optimiser step: its line of metrics.jsonl, and how long it took."""
        if self._metrics is None or line["step"] % self._config.log.every:
            return
        self._metrics.write(line)
        world = self._run.env.world_size
        timing = {
            "step": line["step"],
            "time": time.time(),
            "attempt": self._run.attempt,
            "step_s": seconds,
            "data_s": data_s,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_device": tokens / seconds / world,
            **({"mfu": tokens / seconds / world / self._peak} if self._peak else {}),
            "save_stall_s": self._stall_s,
            **pace,
            **self._device.read(),
        }
        self._stall_s = 0.0
        self._timing.write(timing)
        self._sinks.log(line)
        self._progress.step(line["step"], line, timing["tokens_per_s"])

    def validation(self, line: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(line)
            self._sinks.log(line)
            self._progress.evaluation(line["step"], line)

    def sync(self) -> int:
        """Length of metrics.jsonl once it is on disk: part of a commit."""
        return self._metrics.sync() if self._metrics is not None else 0

    def stalled(self, seconds: float) -> None:
        """Training stood still for a save; told with the next step's timing."""
        self._stall_s += seconds

    def saved(self, step: int, *, seconds: float) -> None:
        if self._main:
            progress.log.info("checkpoint of step %d committed in %.1f s", step, seconds)

    def close(self) -> None:
        if self._metrics is not None:
            for closable in (self._metrics, self._timing, self._device, self._progress, self._sinks):
                closable.close()
            self._metrics = None
