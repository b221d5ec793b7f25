"""Metrics of the user's own on a validation set: `validation.metrics: [my_module:function]`.

Beside the loss, each batch leaves what the model says of its sequences (`Seen.add`). At the end of a set that
is gathered and put into the order of the rows, whichever rank had which, and rank 0 calls the user's
functions with it as `ValidationRows`, the texts decoded from the token store. What they return is written
with the other metrics of the set, and so can be `checkpoint.best_metric`. Without such functions nothing of
this runs.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from strop import ops, user_code
from strop.algos import Algorithm
from strop.config import Config
from strop.data.batch import Batch
from strop.data.store import TokenStore
from strop.data.tokenise import load_tokenizer
from strop.dist import Dist
from strop.errors import UserError
from strop.models.policy import Output

KEY = "validation.metrics"
Function = Callable[["ValidationRows"], dict[str, float]]


@dataclass(frozen=True)
class ValidationRows:
    """What a metric function gets: a validated set, in the order of its rows.

    R rows, S sequences a row: 2 (chosen, rejected) where rows are preference pairs, else 1.
    """

    name: str
    """validation, or the name in `validation.watch`."""
    step: int
    """Optimiser steps done."""
    places: list[tuple[str, int]]
    """[R] (source, line from 1) of each row."""
    prompts: list[str]
    """[R] what comes before the first trained token, without special tokens."""
    completions: list[list[str]]
    """[R][S] the trained tokens, without special ones."""
    num_trained: np.ndarray
    """int64 [R, S]: trained tokens."""
    logps: Optional[np.ndarray] = None
    """fp64 [R, S]: log-probs of the trained tokens, summed over the sequence; None where there are none."""
    ref_logps: Optional[np.ndarray] = None
    """fp64 [R, S]: the same sums of the reference model; None for an algorithm without one."""
    rewards: Optional[np.ndarray] = None
    """fp64 [R, S]: what the algorithm's `rewards` says, such as DPO's β times the log-ratio; None without."""


def names(config: Config) -> list[str]:
    metrics = config.validation.metrics
    return [metrics] if isinstance(metrics, str) else list(metrics or ())


def load(config: Config) -> dict[str, Function]:
    """The functions by their dotted paths. UserError for one that cannot be had."""
    return {name: user_code.load(name, KEY) for name in names(config)}


def begin(config: Config, algo: Algorithm) -> Optional[Seen]:
    """Where the batches of one set are noted; None where nobody asks for them."""
    return Seen(config, algo.rewards) if config.validation.metrics else None


@dataclass
class Seen:
    """What this rank's batches of one set have given so far."""

    config: Config
    rewards: Optional[Callable[[Any, Batch, Config], Tensor]]
    """Of the algorithm: [sequences of the batch], where it has such a thing."""
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """rows [R] and sums [R, S] of each batch, by name."""

    @torch.no_grad()
    def add(self, out: Any, batch: Batch) -> None:
        """Note a batch on the model's device, and what the model gave for it."""
        if batch.is_dummy:
            return
        sums = {"num_trained": ops.segment_sum(batch.trained_T.float(), batch.cu_seqlens)}
        if isinstance(out, Output):
            sums["logps"] = ops.segment_sum(out.logp_T, batch.cu_seqlens)
        if batch.ref_logp_T is not None:
            sums["ref_logps"] = ops.segment_sum(batch.ref_logp_T, batch.cu_seqlens)
        if self.rewards is not None:
            sums["rewards"] = self.rewards(out, batch, self.config)
        self.columns.setdefault("rows", []).append(batch.rows)
        for name, values in sums.items():
            own = values.double().cpu().numpy().reshape(len(batch.rows), -1)
            self.columns.setdefault(name, []).append(own)

    def results(
        self, name: str, step: int, store: TokenStore, dist: Dist, taken: Collection[str]
    ) -> dict[str, float]:
        """What all functions return, by name, none of it in `taken`. Collective; UserError on all ranks for
        what one of them does wrong."""
        ranks = dist.gather({key: np.concatenate(held) for key, held in self.columns.items()})
        told: tuple[dict[str, float], Optional[str]] = ({}, None)
        if dist.is_main:
            try:
                told = _call(_in_order(name, step, store, ranks, self.config), self.config, taken), None
            except UserError as error:
                told = {}, str(error)
        values, problem = dist.broadcast(told)
        if problem is not None:
            raise UserError(problem)
        return values


def _in_order(
    name: str, step: int, store: TokenStore, ranks: list[dict[str, np.ndarray]], config: Config
) -> ValidationRows:
    ranks = [own for own in ranks if own]
    columns = {key: np.concatenate([own[key] for own in ranks]) for key in ranks[0]}
    rows = columns.pop("rows")
    order = np.argsort(rows)
    columns = {key: values[order] for key, values in columns.items()}
    columns["num_trained"] = columns["num_trained"].astype(np.int64)
    whole = TokenStore.open(store.path)  # the loop's own may hold the prompt of a pair only once
    tokenizer = load_tokenizer(config.model)

    def decode(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    prompts, completions = [], []
    for row in rows[order]:
        sequences = whole.sequences(row)
        tokens, trained = sequences[0]
        prompts.append(decode(tokens[: int(np.argmax(trained))]))
        completions.append([decode(tokens[trained]) for tokens, trained in sequences])
    places = [whole.row_id(row) for row in rows[order]]
    return ValidationRows(name, step, places, prompts, completions, **columns)


def _call(rows: ValidationRows, config: Config, taken: Collection[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for path, function in load(config).items():
        try:
            own = function(rows)
        except (Exception, SystemExit) as error:
            told = user_code.told(error, path)
            raise UserError(
                f"{KEY}: {path} failed on the {rows.name} set at step {rows.step}: {told}"
            ) from error
        if not isinstance(own, dict):
            raise UserError(f"{KEY}: {path} gave {type(own).__name__}, not a dict of names and numbers")
        for name, value in own.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w./-]+", name):
                raise UserError(
                    f"{KEY}: {path} gave the name {name!r}; letters, digits and _ . / - are possible"
                )
            if not isinstance(value, numbers.Real):
                raise UserError(f"{KEY}: {path} gave {type(value).__name__} for {name}, not a number")
            if name in taken or name in values:
                raise UserError(f"{KEY}: {path} gave {name}, which there is already; call it otherwise")
            values[name] = float(value)
    return values
