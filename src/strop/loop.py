"""The one training loop, for every algorithm.

A step: the batches of this rank (made ahead by a thread), their count over all ranks, what rewards are
compared with where the loss does that (strop.baseline), forward and backward with the loss's *sum* divided by
that count, one update. Then validation and a checkpoint, if due. Whatever one rank alone finds out (a signal,
a NaN) is reduced before anybody acts on it, so all ranks leave the loop together. Stopping at any moment is
ordinary: what is not committed is computed again to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from strop import baseline, optim, setup, trainer, user_metrics
from strop.algos import LARGEST, SMALLEST, Metrics
from strop.config import Config
from strop.data.batch import Batch, Prefetcher, make_batch
from strop.data.sets import RowSet
from strop.data.store import TokenStore
from strop.dist import Dist
from strop.errors import Diverged, UserError
from strop.models import flops
from strop.models.policy import PartLoss
from strop.report import Report
from strop.run import Position, Run
from strop.slurm import attempts
from strop.trainer import Trainer

log = logging.getLogger("strop")

LOSS_SCALE_GROWS_EVERY = 2000
SMALLEST_LOSS_SCALE = 2.0**-10


class Meter:
    """(sum, count) pairs and extremes over micro batches, reduced over the ranks once."""

    def __init__(self) -> None:
        self._totals: Metrics = {}
        self._extremes: Metrics = {}

    def add(self, metrics: Metrics, weight: float = 1.0) -> None:
        for name, (total, count) in metrics.items():
            if count is SMALLEST or count is LARGEST:
                # The smallest is the largest of the negated ones; a batch that does not count has none.
                own = total.detach().double() * float(count)
                if not weight:
                    own = torch.full_like(own, -math.inf)
                self._extremes[name] = (torch.maximum(own, self._extremes.get(name, (own, count))[0]), count)
                continue
            # fp64: a validation set has more tokens than fp32 can count
            pair = (total.detach().double() * weight, count.double() * weight)
            old = self._totals.get(name)
            self._totals[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def reduce(self, dist: Dist) -> dict[str, float]:
        """Means and extremes over all ranks, by name. Every rank must have added the same names."""
        names = sorted(self._totals)
        values = torch.stack([x for name in names for x in self._totals[name]]).tolist()
        sums = dist.sum(values)
        found = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(names) if sums[2 * i + 1]}
        if self._extremes:
            tops = dist.max(torch.stack([top for top, _ in self._extremes.values()]).tolist())
            found |= {name: float(sign) * top for (name, (_, sign)), top in zip(self._extremes.items(), tops)}
        return found


def train(run: Run, config: Config, position: Position) -> None:
    """Train to the end or to a stop request; the attempt's record says which. Raises what ends it."""
    report = Report(run, config)
    t = setup.build(run, config, position, report)
    outcome = "YIELD"
    if t.ready:
        name = torch.cuda.get_device_name() if t.dist.device.type == "cuda" else None
        peak = flops.peak_tokens_per_s(t.policy.lm, t.train_store, name)
        report.start(t.config, t.state.metrics_bytes, t.state.step, t.max_steps, _gpu_name(t), peak)
        if not run.launched:
            run.stop.hear_ctrl_c()
        try:
            outcome = _run_steps(t)
        except Exception:
            # A commit under way is of sound weights, and what ends a run here ends it on all ranks alike.
            t.saver.wait()
            raise
        t.saver.wait()
    if t.dist.is_main:
        reason = (run.stop.reason or "another rank was asked to stop") if outcome == "YIELD" else None
        attempts.finish(run.dir, run.attempt, outcome, step=t.state.step, reason=reason)
    report.close()
    # Nobody leaves before the record is there: a rank that ends early may have the others ended.
    t.dist.barrier()
    t.dist.close()


def _gpu_name(t: Trainer) -> str | None:
    """This rank's GPU as NVML knows it: the index in the process says nothing about the node's."""
    if t.dist.device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(t.dist.device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _run_steps(t: Trainer) -> str:
    """ "DONE", or "YIELD" after committing where it stands."""
    if t.state.step >= t.max_steps:
        log.info("nothing left to train: step %d is done, train.max_steps is %d", t.state.step, t.max_steps)
    if t.state.step == 0 and t.config.validation.at_start and not t.state.validated and not _validate(t):
        return "YIELD"
    if t.state.step > 0 and not _after_step(t):
        return "YIELD"
    with Prefetcher(_batches(t)) as steps:
        asked = time.monotonic()
        for batches, mismatched in steps:
            data_s = time.monotonic() - asked
            if _patience_is_over(t):
                log.info(
                    "early stop: %d validations without a better %s",
                    t.state.misses,
                    t.config.checkpoint.best_metric,
                )
                break
            if not _step(t, batches, mismatched, data_s) or not _after_step(t):
                return "YIELD"
            asked = time.monotonic()
    _save(t, last=True)
    return "DONE"


def _batches(t: Trainer) -> Iterator[tuple[list[Batch], list[Batch]]]:
    """Of each step what is trained on, and what its baseline is measured on."""
    for step in range(t.state.step, t.max_steps):
        own = trainer.step_bins(t, step)[t.dist.rank]
        draw = (t.config.train.seed, step) if t.policy.draws_at_random else None
        batches = [make_batch(t.train_store, rows, t.train_ref, draw) for rows in own]
        mismatched = list(baseline.batches(t, step))
        yield [b.ready_for(t.dist.device) for b in batches], [b.ready_for(t.dist.device) for b in mismatched]


def _step(t: Trainer, batches: list[Batch], mismatched: list[Batch], data_s: float) -> bool:
    """One optimiser step. False if asked to stop before its end; then the state before it is committed."""
    c, state = t.config, t.state
    begin = time.monotonic()
    t.position.step = state.step
    t.position.enter("train")
    count, tokens, stops, failures = t.dist.sum(
        [
            sum(t.algo.count(b) for b in batches),
            sum(_num_tokens(b) for b in batches),
            float(trainer.must_stop(t)),
            float(t.saver.failed),
        ]
    )
    if failures:
        t.saver.wait()
    if stops:
        return _abandon(t)
    compared_with = baseline.of_step(t, mismatched)
    if compared_with is None:
        return _abandon(t)
    meter = Meter()
    for i, batch in enumerate(batches):
        if i > 0 and trainer.stop_agreed(t):
            return _abandon(t)
        whole = i < len(batches) - 1 and not t.reduce_each
        t.policy.set_requires_gradient_sync(not whole)
        t.policy.set_reshard_after_backward(not whole)
        weight = 0.0 if batch.is_dummy else 1.0
        scaled, metrics = _forward(t, batch, compared_with, weight * state.loss_scale / count)
        scaled.backward()
        t.position.beat()
        meter.add(metrics, weight)
    means = meter.reduce(t.dist)
    means |= t.algo.derived(means)
    lr = optim.learning_rate(c.optim, state.step, t.max_steps)
    norm = _update(t, lr, means["loss"], batches)
    state.step += 1
    state.num_tokens += int(tokens)
    baseline.remember(t, means, count)
    state.validated = False
    t.position.step = state.step
    line = {
        "step": state.step,
        "epoch": state.step / t.steps_per_epoch,
        "loss": means.pop("loss"),
        "grad_norm": norm,
        "learning_rate": lr,
        "num_tokens": state.num_tokens,
        **means,
    }
    seconds = time.monotonic() - begin
    t.step_s = max(t.step_s, seconds)
    pace = t.pace.step(state.step, sum(len(b.tokens_T) for b in batches), data_s)
    t.report.step(line, tokens=int(tokens), seconds=seconds, data_s=data_s, pace=pace)
    return True


def _abandon(t: Trainer) -> bool:
    """Commit the state before a step that is under way: a long step must not outlast a grace time."""
    t.optimizer.zero_grad(set_to_none=True)
    if t.dist.is_main:
        log.info("asked to stop (%s)", t.run.stop.reason or "another rank was")
    _save(t, last=True)
    return False


def _forward(
    t: Trainer,
    batch: Batch,
    compared_with: float,
    factor: float = 1.0,
    seen: Optional[user_metrics.Seen] = None,
) -> tuple[Tensor, Metrics]:
    """`factor` times the loss's sum over the batch, and metrics with that sum itself among them; `seen` notes
    what the user's own need."""
    # Before the move: on a GPU these would wait for it.
    count, edges = t.algo.count(batch), None if t.algo.per_token else batch.row_edges()
    batch = dataclasses.replace(batch.to(t.dist.device), baseline=compared_with)
    parted = PartLoss(lambda out, part: t.algo.loss(out, part, t.config)[0] * factor, edges)
    out = t.policy(batch, parted)
    loss, metrics = t.algo.loss(out, batch, t.config)
    if seen is not None:
        seen.add(out, batch)
    scaled = loss * factor if out.loss is None else out.loss
    return scaled, {"loss": (loss, loss.new_full((), count)), **metrics}


def _num_tokens(batch: Batch) -> int:
    return 0 if batch.is_dummy else batch.num_tokens


def _update(t: Trainer, lr: float, loss: float, batches: list[Batch]) -> float:
    """Clip and step; the gradient's norm before clipping. Raises Diverged if it or the loss is not finite."""
    state, c = t.state, t.config
    grads = optim.local_grads(t.policy.parameters())
    norm = optim.global_grad_norm(grads, t.dist) / state.loss_scale
    finite = math.isfinite(norm) and math.isfinite(loss)
    if not finite and not _may_rescale(t, loss):
        t.saver.wait()  # the steps before were sound: a commit of them in flight counts
        raise Diverged(_dump_batch(t, batches, loss, norm))
    if finite:
        clip = c.train.max_grad_norm
        factor = clip / norm if clip is not None and norm > clip else 1.0
        optim.step(t.optimizer, lr, factor / state.loss_scale)
        state.num_updates += 1
    t.optimizer.zero_grad(set_to_none=True)
    if c.train.precision == "fp16":
        _adapt_loss_scale(t, finite)
    return norm


def _may_rescale(t: Trainer, loss: float) -> bool:
    """An fp16 gradient that overflows under a loss scale is tried with a smaller one."""
    fp16 = t.config.train.precision == "fp16"
    return fp16 and math.isfinite(loss) and t.state.loss_scale > SMALLEST_LOSS_SCALE


def _adapt_loss_scale(t: Trainer, finite: bool) -> None:
    """Halved after an overflow (that step changes no weight), doubled after many steps without one."""
    state = t.state
    state.scale_steps += 1
    if not finite:
        state.loss_scale, state.scale_steps = state.loss_scale / 2, 0
    elif state.scale_steps == LOSS_SCALE_GROWS_EVERY:
        state.loss_scale, state.scale_steps = state.loss_scale * 2, 0


def _dump_batch(t: Trainer, batches: list[Batch], loss: float, norm: float) -> str:
    """Keep which rows the step was made of; the message for the user. Collective."""
    rows = [int(r) for own in t.dist.gather([r for b in batches for r in b.rows]) for r in own]
    path = t.run.logs / f"diverged-step-{t.state.step + 1:06d}.json"
    if t.dist.is_main:
        ids = [dict(zip(("source", "line"), t.train_store.row_id(r))) for r in rows]
        path.write_text(json.dumps({"step": t.state.step + 1, "rows": ids}, indent=1))
    return (
        f"step {t.state.step + 1}: loss {loss} and gradient norm {norm} are not both finite; "
        f"nothing of it is committed, its rows are in {path}"
    )


def _after_step(t: Trainer) -> bool:
    """Validation and checkpoint, if due at this step; False if stopped (and committed) on the way."""
    v, step = t.config.validation, t.state.step
    last = step >= t.max_steps
    due = (last and v.at_end) or (v.every is not None and step % v.every == 0)
    if due and not t.state.validated and not _validate(t):
        _save(t, last=True)
        return False
    if t.dist.any(t.dist.is_main and t.saver.due(step)) or t.state.best_step == step:
        _save(t)
    return True


def _validate(t: Trainer) -> bool:
    """Exact means over the validation set and those watched beside it, whatever the batches; False if asked
    to stop in the middle."""
    sets = [("validation", "eval_", t.val_store, t.val_ref)] if t.val_store is not None else []
    sets += [(name, f"eval_{name}_", store, None) for name, store in t.watched.items()]
    if not sets:
        t.state.validated = True
        return True
    t.position.enter("validation")
    compared_with = baseline.of_validation(t)
    if compared_with is None:
        return False
    means: dict[str, float] = {}
    for name, prefix, store, ref in sets:
        own = _means(t, name, store, ref, compared_with)
        if own is None:
            return False
        means |= {prefix + metric: value for metric, value in own.items()}
    t.report.validation({"step": t.state.step, **means})
    t.state.validated = True
    _note_best(t, means)
    return True


def _means(
    t: Trainer, name: str, store: RowSet, ref: Optional[np.ndarray], compared_with: float
) -> Optional[dict[str, float]]:
    """Loss and metrics over one set, with those of the user; None if asked to stop in the middle."""
    meter = Meter()
    seen = user_metrics.begin(t.config, t.algo)
    bins = trainer.validation_bins(t, store)[t.dist.rank]
    with Prefetcher(make_batch(store, rows, ref).ready_for(t.dist.device) for rows in bins) as batches:
        for batch in batches:
            if trainer.stop_agreed(t):
                return None
            with torch.no_grad():
                _, metrics = _forward(t, batch, compared_with, seen=seen)
            meter.add(metrics, 0.0 if batch.is_dummy else 1.0)
    means = meter.reduce(t.dist)
    means |= t.algo.derived(means)
    if seen is not None:
        assert isinstance(store, TokenStore)
        t.position.enter("metrics")  # the watchdog gives it longer than a micro batch
        means |= seen.results(name, t.state.step, store, t.dist, means)
        t.position.enter("validation")
    return means


def _note_best(t: Trainer, means: dict[str, float]) -> None:
    """Keep the best value of `checkpoint.best_metric`, and how long ago it was."""
    c, state = t.config.checkpoint, t.state
    if c.best_metric is None:
        return
    if c.best_metric not in means:
        raise UserError(
            f"checkpoint.best_metric: no {c.best_metric} in validation; there are {', '.join(means)}"
        )
    if state.step == 0:
        return
    value = means[c.best_metric]
    falls = c.best_mode == "min" or (c.best_mode == "auto" and c.best_metric.endswith(("loss", "perplexity")))
    gain = (
        math.inf
        if state.best_value is None
        else (state.best_value - value if falls else value - state.best_value)
    )
    if math.isnan(value):  # a metric of the user's own can be; once the best one, it would stay that
        gain = -math.inf
    if gain > t.config.validation.min_delta:
        state.best_value, state.best_step, state.misses = value, state.step, 0
    else:
        state.misses += 1


def _patience_is_over(t: Trainer) -> bool:
    patience = t.config.validation.patience
    return patience is not None and t.state.misses >= patience


def _save(t: Trainer, *, last: bool = False) -> None:
    """Begin to commit the state as it stands (nothing to do at step 0, or where it is committed already);
    the last time, do it."""
    if t.state.step == 0:
        return
    t.position.enter("save")
    trainer.check_data(t)
    t.state.metrics_bytes = t.report.sync()
    t.saver.start(trainer.tensors(t), dataclasses.asdict(t.state), last=last)
