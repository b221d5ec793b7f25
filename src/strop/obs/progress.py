"""What a person sees while a job runs: a bar on a terminal, a line per step in a file.

    step 12/100  loss 0.6931  acc 0.53  lr 1.0e-06  grad 1.23  412 tok/s  eta 3m12s

Lines go through logging, so that they end where the rank's log goes. Phases (loading, tokenising, ...)
are announced and timed.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("strop.progress")

ACCURACY = ("rewards/accuracies", "accuracy", "mean_token_accuracy")
"""Metrics shown as `acc`, the first that a record has."""
MARGIN = ("rewards/margins", "margin")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """`loading ...` when it begins, `loading: 3.2 s` when it ends well."""
    log.info("%s ...", name)
    start = time.monotonic()
    yield
    log.info("%s: %s", name, seconds(time.monotonic() - start))


def seconds(s: float) -> str:
    """3.2 s, 3m12s, 2h05m."""
    if not abs(s) < float("inf"):  # of a damaged timing.jsonl
        return "?"
    if s < 60:
        return f"{s:.1f} s"
    if s < 3600:
        return f"{int(s) // 60}m{int(s) % 60:02d}s"
    return f"{int(s) // 3600}h{int(s) % 3600 // 60:02d}m"


class Progress:
    """Progress of the training loop; one `step` a training step, on rank 0."""

    def __init__(
        self,
        total_steps: int,
        done_steps: int = 0,
        terminal: Optional[bool] = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self._clock = clock
        self._last = clock()
        self._last_step = done_steps
        self._durations_s: deque[float] = deque(maxlen=31)
        self._bar: Optional[RichProgress] = None
        if sys.stdout.isatty() if terminal is None else terminal:
            self._bar = RichProgress(MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._task = self._bar.add_task("", total=total_steps, completed=done_steps)
            self._bar.start()

    def step(self, step: int, record: Mapping[str, Any], tokens_per_s: Optional[float] = None) -> None:
        """Show a finished step, a later one than before. `record`: its line of metrics.jsonl, or nothing."""
        now = self._clock()
        self._durations_s.append((now - self._last) / (step - self._last_step))
        self._last, self._last_step = now, step
        parts = summary(record)
        if tokens_per_s is not None:
            parts.append(f"{tokens_per_s:,.0f} tok/s")
        parts.append(f"eta {seconds(self.eta_s(step))}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="  ".join(parts))
        else:
            log.info("  ".join([f"step {step}/{self.total_steps}", *parts]))

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """Show the result of a validation (names with eval_)."""
        plain = {key[5:]: value for key, value in record.items() if key.startswith("eval_")}
        log.info("  ".join([f"validation at step {step}", *summary(plain)]))

    def eta_s(self, step: int) -> float:
        """Seconds to the end, by the median of the last steps: a validation or a commit now and then, or
        the slow first step, does not shake it."""
        return statistics.median(self._durations_s) * (self.total_steps - step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(record: Mapping[str, Any]) -> list[str]:
    """The few numbers that people watch, those that the record has."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    accuracy = next((record[key] for key in ACCURACY if record.get(key) is not None), None)
    if accuracy is not None:
        parts.append(f"acc {accuracy:.2f}")
    margin = next((record[key] for key in MARGIN if record.get(key) is not None), None)
    if margin is not None:
        parts.append(f"margin {margin:.3f}")
    if record.get("learning_rate") is not None:
        parts.append(f"lr {record['learning_rate']:.1e}")
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.2f}")
    return parts
