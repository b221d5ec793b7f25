"""Everything between a configuration and the first step.

Rank 0 prepares the data while the others wait for a file, not in a collective. All ranks meet, build the
sharded model, find the newest committed checkpoint, and make sure that the reference log-probs are there.
A resumed run reads its checkpoint and nothing else: weights are loaded only by a run that has no
checkpoint yet, or whose reference must be computed again.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np
import torch

from strop import checkpoint, files, ops, optim, parallel, preflight, user_metrics
from strop import config as config_module
from strop import run as run_module
from strop.algos import reference
from strop.config import Config
from strop.data import labels, plan
from strop.data.mismatched import Mismatched
from strop.data.sets import Maker, RowSet, find_overlap, open_set
from strop.data.store import TokenStore
from strop.data.tokenise import load_tokenizer, tokenizer_digest
from strop.dist import Dist
from strop.dist import start as start_dist
from strop.errors import UserError
from strop.models import hf, lora, reward
from strop.models.policy import Policy
from strop.report import Report
from strop.run import Position, Run
from strop.saver import Saver
from strop.slurm import attempts, rendezvous
from strop.stragglers import Pace
from strop.trainer import State, Trainer, step_bins, stop_agreed, tensors, validation_bins

log = logging.getLogger("strop")

FIRST_LOSS_SCALE = 2.0**16
"""Of fp16; halved at the first overflow."""

MISMATCHED = ", mismatched"
"""Behind the name of a set: its prompts with the completions of other rows."""

WORTH_SHARING = 0.95
"""Prompts are shared where that leaves at most this part of the tokens."""


def build(run: Run, config: Config, position: Position, report: Report) -> Trainer:
    """A trainer at the newest committed step; not `ready` if asked to stop on the way."""
    algo = importlib.import_module(f"strop.algos.{config.algo}")
    assert config.model.path is not None
    hf.check_model(config.model.path)
    position.enter("preflight")
    preflight.check_machine(run, config.dist)
    position.enter("data")
    sets = _data(run, config, algo, report, position)
    if run.env.rank == 0:
        _tell_imbalance(config, sets["train"])
    mismatched = _mismatched(config, algo, sets)
    train_store = sets.pop("train")
    position.enter("rendezvous")
    dist = start_dist(config.dist, run.env, run.dir, run.attempt, run.stop)
    nodes = preflight.check_together(run, dist)
    position.enter("model")
    config = _settle(run, config, dist)
    with report.phase("building the model"):
        policy = _empty_policy(config)
        if policy.adapters is not None and dist.is_main:
            log.info("%s", policy.adapters.describe(policy.lm))
        policy.eval()  # dropout is off: the policy and its reference must be one function
        preflight.check_disk(run, policy, dist)
        parallel.shard(policy, config.train, dist)
        optimizer = optim.build(config.optim, policy)
    per_epoch = plan.steps_per_epoch(
        train_store.num_rows, config.train.global_batch_size, config.train.limit_train_batches
    )
    max_steps = config.train.max_steps or math.ceil(config.train.max_epochs * per_epoch)
    optim.check_schedule(config.optim, max_steps)
    if dist.is_main:
        attempts.update(run.dir, run.attempt, max_steps=max_steps)  # for tools.status
    t = Trainer(
        run,
        config,
        algo,
        dist,
        policy,
        optimizer,
        train_store,
        sets.pop("validation", None),
        sets,
        report,
        position,
        per_epoch,
        max_steps,
        mismatched=mismatched,
    )
    t.pace = Pace(policy, dist, nodes)
    t.reduce_each = parallel.reduce_each_micro_batch(policy)
    if config.train.precision == "fp16":
        t.state.loss_scale = FIRST_LOSS_SCALE
    t.ready = _load(t)
    return t


def _empty_policy(config: Config) -> Policy:
    """What the algorithm trains, without its weights: a language model, or one with a scalar head."""
    policy: Policy
    if config.algo in config_module.SCORING:
        policy = reward.RewardModel(reward.build_empty(config.model))
    else:
        policy = Policy(hf.build_empty(config.model))
        policy.neftune_alpha = config.sft.neftune_alpha if config.algo == "sft" else None
    if config.lora.rank is not None:
        policy.adapters = lora.Adapters(policy.lm, config.lora, parallel.DTYPES[config.train.precision])
    return policy


def _data(
    run: Run, config: Config, algo: ModuleType, report: Report, position: Position
) -> dict[str, RowSet]:
    """Rank 0 tokenises (or finds it done) and tells the others where; they wait without a collective,
    whose time-out long work would exceed. The sets by name."""
    told = run.logs / "data.json"
    if run.env.rank == 0:
        run_module.agree(run, config)
        _check_names(config, algo)
        user_metrics.load(config)
        tokenizer = load_tokenizer(config.model)
        maker = Maker(
            config,
            config_module.KINDS[config.algo],
            tokenizer,
            tokenizer_digest(tokenizer),
            config_module.cache_dir(config, run.dir.parent),
            progress=lambda done, total: position.beat(),
        )
        names = maker.names()
        if config.checkpoint.best_metric is not None and names == ["train"]:
            raise UserError(
                f"checkpoint.best_metric is {config.checkpoint.best_metric}, but there is no validation set: "
                "give data.validation or data.split, or checkpoint.best_metric=null"
            )
        places = {}
        ledgers = {}
        known = files.read_json(run.dir / "data" / "ledger.json") or {}
        for name in names:
            with report.phase(f"{name} data"):
                places[name], ledger = maker.prepare(name)
                if name != "train":
                    find_overlap(ledger, places[name], places["train"], known.get(name, {}).get("overlap"))
            report.ledger(ledger)
            ledgers[name] = ledger.as_json()
        files.write_json(run.dir / "data" / "ledger.json", ledgers)
        files.write_json(told, places)
    else:
        rendezvous.wait_for_file(run.dir, run.attempt, run.env.rank, told, run.stop)
    return {name: open_set(place, config, name) for name, place in json.loads(told.read_text()).items()}


def _tell_imbalance(config: Config, store: RowSet) -> None:
    if config_module.KINDS[config.algo] == "unpaired" and isinstance(store, TokenStore):
        num_good = int((store.values_R == 1).sum())
        if line := labels.imbalance(num_good, store.num_rows - num_good, config.kto):
            log.warning("training data: %s", line)


def _mismatched(config: Config, algo: ModuleType, sets: dict[str, RowSet]) -> dict[str, Mismatched]:
    """What the baseline of train and validation is measured on, for a loss that does so (strop.baseline)."""
    if not (hasattr(algo, "needs_mismatched") and algo.needs_mismatched(config)):
        return {}
    length = config.data.max_length
    return {name: Mismatched(s, length, name) for name, s in sets.items() if isinstance(s, TokenStore)}


def _check_names(config: Config, algo: ModuleType) -> None:
    """Before minutes go into the data: the models that a run loads from elsewhere are there."""
    model = config.model
    assert model.path is not None
    hf.check_hub("model.path", model.path, model.revision, "config.json")
    if model.tokenizer:
        hf.check_hub("model.tokenizer", model.tokenizer, model.revision, "tokenizer_config.json")
    if algo.needs_reference(config) and (other := algo.reference_model(config)):
        hf.check_model(other, f"{config.algo}.reference")
        hf.check_hub(f"{config.algo}.reference", other, None, "config.json")


def _settle(run: Run, config: Config, dist: Dist) -> Config:
    """The configuration with its machine-dependent choices made, the same on every rank."""
    if dist.is_main:
        config = run_module.agree(run, config)
        facts = {
            "device": torch.cuda.get_device_name() if dist.device.type == "cuda" else _cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "ranks": dist.world_size,
            "kernels": ops.backend(dist.device, torch.float32),
        }
        run_module.record_machine(run, facts)
    config = dist.broadcast(config)
    if config.train.precision == "auto":
        precision = "bf16" if not dist.any(not parallel.has_bf16(dist.device)) else "fp32"
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    return config


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _load(t: Trainer) -> bool:
    """Layout, weights, reference and the newest checkpoint, each only where needed; False if stopped."""
    root = t.run.checkpoints
    t.position.enter("resume")
    if t.dist.is_main:
        root.mkdir(exist_ok=True)
        checkpoint.remove_rubble(root)
        _forbid_silent_restart(t.run)
    with t.report.phase("verifying checkpoints"):
        step = checkpoint.newest_verified(root, t.dist)
    choices = _choices(t)
    needs_pass = t.algo.needs_reference(t.config) and _reference_is_missing(t, choices)
    adapters = t.policy.adapters
    if step is None or needs_pass or not choices or adapters is not None:
        with t.report.phase("loading weights"):
            scores = t.config.algo in config_module.SCORING
            read = reward.reader(t.config.train.seed) if scores else hf.read_weights
            hf.scatter_weights(t.policy.lm, t.config.model, t.dist, read=read)
    if adapters is not None:
        adapters.initialise(t.config.train.seed)
        with t.report.phase("hashing the frozen weights"):
            t.state.frozen = lora.facts(t.policy.lm, t.config.model, t.dist)
    if choices:
        lora.check_facts(t.state.frozen, choices.get("frozen"), t.config.model, t.run.dir)
    _set_layout(t, choices)
    if needs_pass:
        with nullcontext() if adapters is None else adapters.off():
            if not _reference_pass(t, choices, again=step is None or adapters is not None):
                return False
    if t.algo.needs_reference(t.config):
        _open_reference(t, choices)
    optim.materialise(t.optimizer)
    if step is not None:
        with t.report.phase(f"loading the checkpoint of step {step}"):
            t.state = State(**checkpoint.read_state(root, step))
            checkpoint.load(root, step, tensors(t))
            optim.set_num_updates(t.optimizer, t.state.num_updates)
    t.saver = Saver(t.run, t.config.checkpoint, t.dist, t.report, tensors(t))
    t.position.step = t.state.step
    return True


def _forbid_silent_restart(run: Run) -> None:
    """A run that has committed before but has no checkpoint left is not begun anew behind the user's back."""
    told = []
    for record in attempts.read_all(run.dir):
        told.append(record.get("committed_step") or 0)  # when it began
        if record["state"] in ("DONE", "YIELD"):
            told.append(record.get("step") or 0)
    if max(told, default=0) > 0 and not checkpoint.committed_steps(run.checkpoints):
        raise UserError(
            f"{run.checkpoints} holds no committed checkpoint, but step {max(told)} had been reached: "
            "give the run another name to begin anew"
        )


def _choices(t: Trainer) -> dict[str, Any]:
    """What the run's first attempt found out (layout, head, reference files); {} before.

    A reference of other data or of another model (run.allow_config_change) is not this run's any more.
    """
    choices: dict[str, Any] = {}
    if t.dist.is_main:
        choices = files.read_json(t.run.dir / "data" / "choices.json") or {}
        if choices.get("reference_of") != _reference_of(t):
            choices.pop("reference", None)
    return t.dist.broadcast(choices)


def _set_layout(t: Trainer, choices: dict[str, Any]) -> None:
    """Layout, head and reference files, as chosen before or now."""
    t.position.enter("probe")
    before = dict(choices)
    if choices:
        t.policy.head = choices["head"]
        t.policy.set_layout(choices["layout"], t.dist.device)
    else:
        with t.report.phase("probing attention and head"):
            t.policy.probe(t.dist.device, parallel.DTYPES[t.config.train.precision], t.config.model.attention)
        choices |= {"head": t.policy.head, "layout": t.policy.layout, "shared_prefix": _shares_prompts(t)}
        choices["frozen"] = t.state.frozen
    if choices.get("shared_prefix"):
        assert isinstance(t.train_store, TokenStore)
        t.train_store = t.train_store.sharing_prompts()
        if isinstance(t.val_store, TokenStore):
            t.val_store = t.val_store.sharing_prompts()
    if t.algo.needs_reference(t.config) and "reference" not in choices:
        choices["reference"] = t.dist.broadcast(_reference_files(t) if t.dist.is_main else None)
        choices["reference_of"] = _reference_of(t)
    if t.dist.is_main and choices != before:
        run_module.write_config(t.run, t.config)
        files.write_json(t.run.dir / "data" / "choices.json", choices)


def _shares_prompts(t: Trainer) -> bool:
    """Whether the prompt of a pair is computed once. Raises UserError if it was asked for and cannot be."""
    wanted = t.config.train.shared_prefix
    store = t.train_store
    if wanted is False or not isinstance(store, TokenStore) or store.seqs_per_row == 1:
        return False
    if not t.policy.shares_prompts(t.dist.device, parallel.DTYPES[t.config.train.precision]):
        if wanted:
            raise UserError(f"train.shared_prefix: the attention of {t.policy.name} does not allow it here")
        return False
    once, twice = store.sharing_prompts().row_lengths.sum(), store.row_lengths.sum()
    return bool(wanted or once < WORTH_SHARING * twice)


def _reference_of(t: Trainer) -> Optional[dict[str, Any]]:
    """What the log-probs of the reference belong to; None for an algorithm without one."""
    if not t.algo.needs_reference(t.config):
        return None
    stores = {name: store.digest for name, store in _stores(t).items()}
    model = t.config.model
    return {
        "model": [model.path, model.revision],
        "other": t.algo.reference_model(t.config),
        "stores": stores,
    }


def _reference_files(t: Trainer) -> dict[str, str]:
    """Where the log-probs of each set are kept, by all that they depend on."""
    c = t.config
    model, revision = c.model.path, c.model.revision
    if path := t.algo.reference_model(c):
        model, revision = path, None
    assert model is not None
    with t.report.phase("hashing the reference's weights"):
        weights = hf.weights_digest(model, revision)
    facts = {
        "weights": weights,
        "precision": c.train.precision,
        "layout": t.policy.layout,
        "head": t.policy.head,
        "shared_prefix": isinstance(t.train_store, TokenStore) and t.train_store.shared_R is not None,
        "device": t.dist.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": ops.backend(t.dist.device, parallel.DTYPES[c.train.precision]),
        "ranks": t.dist.world_size,
        "plan": [
            c.train.seed,
            c.train.global_batch_size,
            c.train.micro_batch_tokens,
            c.train.micro_batch_size,
            c.data.weights,
        ],
    }
    cache = config_module.cache_dir(c, t.run.dir.parent)
    return {name: str(reference.cache_file(cache, store, facts)) for name, store in _stores(t).items()}


def _stores(t: Trainer) -> dict[str, reference.RowStore]:
    """Those that have a reference: rows, never text, and what a baseline is measured on."""
    stores = {"train": t.train_store} | ({"validation": t.val_store} if t.val_store is not None else {})
    own: dict[str, reference.RowStore] = {n: s for n, s in stores.items() if isinstance(s, TokenStore)}
    return own | {f"{name}{MISMATCHED}": view for name, view in t.mismatched.items()}


def _reference_is_missing(t: Trainer, choices: dict[str, Any]) -> bool:
    if "reference" not in choices:
        return True
    gone = False
    if t.dist.is_main:
        for name, store in _stores(t).items():
            rows = np.concatenate([r for own in _reference_bins(t, name) for r in own])
            gone = gone or reference.missing(Path(choices["reference"][name]), store, rows)
    return t.dist.any(gone)


def _reference_bins(t: Trainer, name: str) -> reference.Bins:
    """Batches as the loop will see them, up to the one in which the last row is seen for the first time (the
    first epoch, unless some of its steps are left out or data.weights draws rows); or those of validation."""
    store = _stores(t)[name]
    if name.startswith("validation"):
        return validation_bins(t, store)
    view = store if isinstance(store, Mismatched) else None
    ranks: reference.Bins = [[] for _ in range(t.dist.world_size)]
    unseen, left = np.ones(t.train_store.num_rows, dtype=np.bool_), t.train_store.num_rows
    for step in range(t.max_steps):
        if not left:
            break
        for micro_batch in zip(*step_bins(t, step, view)):
            rows = np.unique(np.concatenate(micro_batch))
            new = rows[unseen[rows]]
            if len(new):
                unseen[new] = False
                left -= len(new)
                for own, bin_ in zip(ranks, micro_batch):
                    own.append(bin_)
    return ranks


def _reference_pass(t: Trainer, choices: dict[str, Any], *, again: bool) -> bool:
    """Compute what is missing; False if stopped. `again`: the policy's own weights are needed afterwards."""
    t.position.enter("reference")
    other = t.algo.reference_model(t.config)
    if other is not None:
        hf.scatter_weights(t.policy.lm, t.config.model, t.dist, path=other)
    for name, store in _stores(t).items():
        with t.report.phase(f"reference log-probs ({name})") as progress:
            path = Path(choices["reference"][name])
            bins = _reference_bins(t, name)
            if not reference.compute(
                t.policy, store, bins, path, t.dist, t.run.dir.name, lambda: stop_agreed(t), progress
            ):
                return False
    if other is not None and again:
        hf.scatter_weights(t.policy.lm, t.config.model, t.dist)
    return True


def _open_reference(t: Trainer, choices: dict[str, Any]) -> None:
    t.train_ref = np.load(choices["reference"]["train"], mmap_mode="r")
    if t.val_store is not None:
        t.val_ref = np.load(choices["reference"]["validation"], mmap_mode="r")
    for name in t.mismatched:
        t.mismatched_refs[name] = np.load(choices["reference"][f"{name}{MISMATCHED}"], mmap_mode="r")
