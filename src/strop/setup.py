"""Everything between a configuration and the first step.

Rank 0 prepares the data while the others wait for a file, not in a collective. All ranks meet, build the
sharded model, find the newest committed checkpoint, and make sure that the reference log-probs are there.
A resumed run reads its checkpoint and nothing else: weights are loaded only by a run that has no
checkpoint yet, or whose reference must be computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from strop import algos, checkpoint, files, ops, optim, parallel, preflight, references, user_metrics
from strop import config as config_module
from strop import run as run_module
from strop.algos import Algorithm
from strop.config import Config
from strop.data import labels, plan
from strop.data.mismatched import Mismatched
from strop.data.repeats import find_overlap
from strop.data.sets import Maker, RowSet, content, open_set
from strop.data.store import WORTH_SHARING, TokenStore
from strop.data.tokenise import load_tokenizer, tokenizer_digest
from strop.dist import Dist
from strop.dist import start as start_dist
from strop.errors import UserError
from strop.models import hf, local, lora, reward
from strop.models.policy import Policy
from strop.report import Report
from strop.run import Position, Run
from strop.saver import Saver
from strop.slurm import attempts, rendezvous
from strop.stragglers import Pace
from strop.trainer import State, Trainer, tensors

log = logging.getLogger("strop")

FIRST_LOSS_SCALE = 2.0**16
"""Of fp16; halved at the first overflow."""


def build(run: Run, config: Config, position: Position, report: Report) -> Trainer:
    """A trainer at the newest committed step; not `ready` if asked to stop on the way."""
    algo = algos.load(config.algo)
    assert config.model.path is not None
    local.check_model(config.model.path)
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
    if config_module.trains_reward_model(config.algo):
        policy = reward.RewardModel(reward.build_empty(config.model))
    else:
        policy = Policy(hf.build_empty(config.model))
        policy.neftune_alpha = config.sft.neftune_alpha if config.algo == "sft" else None
    if config.lora.rank is not None:
        policy.adapters = lora.Adapters(policy.lm, config.lora, parallel.DTYPES[config.train.precision])
    return policy


def _data(run: Run, config: Config, algo: Algorithm, report: Report, position: Position) -> dict[str, RowSet]:
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
        decisive = [name for name in names if name not in config.validation.watch]
        run_module.agree_on_data(run, config, {name: content(places[name]) for name in decisive})
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


def _mismatched(config: Config, algo: Algorithm, sets: dict[str, RowSet]) -> dict[str, Mismatched]:
    """What the baseline of train and validation is measured on, for a loss that does so (strop.baseline)."""
    if not algo.needs_mismatched(config):
        return {}
    length = config.data.max_length
    return {name: Mismatched(s, length, name) for name, s in sets.items() if isinstance(s, TokenStore)}


def _check_names(config: Config, algo: Algorithm) -> None:
    """Before minutes go into the data: the models that a run loads from elsewhere are there."""
    model = config.model
    assert model.path is not None
    hf.check_hub("model.path", model.path, model.revision, "config.json")
    if not config_module.trains_reward_model(config.algo):
        hf.check_causal(hf.read_config(model), model.path)
    if model.tokenizer:
        hf.check_hub("model.tokenizer", model.tokenizer, model.revision, "tokenizer_config.json")
    if algo.needs_reference(config) and (other := algo.reference_model(config)):
        key = f"{config.algo}.reference"
        local.check_model(other, key)
        hf.check_hub(key, other, None, "config.json")
        other_config = hf.read_config(dataclasses.replace(model, path=other, revision=None), key)
        hf.check_causal(other_config, other, key)


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
    needs_pass = t.algo.needs_reference(t.config) and references.is_missing(t, choices)
    adapters = t.policy.adapters
    if step is None or needs_pass or not choices or adapters is not None:
        with t.report.phase("loading weights"):
            scores = config_module.trains_reward_model(t.config.algo)
            read = reward.reader(t.config.train.seed) if scores else hf.read_weights
            hf.scatter_weights(t.policy.lm, t.config.model, t.dist, read=read)
    if adapters is not None:
        adapters.initialise(t.config.train.seed)
        with t.report.phase("hashing the frozen weights"):
            cache = config_module.cache_dir(t.config, t.run.dir.parent)
            t.state.frozen = lora.facts(t.policy.lm, t.config.model, t.dist, cache)
    if choices:
        lora.check_facts(t.state.frozen, choices.get("frozen"), t.config.model, t.run.dir)
    _set_layout(t, choices)
    if needs_pass:
        with nullcontext() if adapters is None else adapters.off():
            if not references.compute(t, choices, again=step is None or adapters is not None):
                return False
    if t.algo.needs_reference(t.config):
        references.open_all(t, choices)
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
    if max(told, default=0) > 0 and not attempts.committed_steps(run.checkpoints):
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
        if choices.get("reference_of") != references.identity(t):
            choices.pop("reference", None)
    return t.dist.broadcast(choices)


def _set_layout(t: Trainer, choices: dict[str, Any]) -> None:
    """Layout, head and reference files, as chosen before or now."""
    t.position.enter("probe")
    before = dict(choices)
    if choices:
        t.policy.head = choices["head"]
        t.policy.attention = choices.get("attention", t.policy.attention)
        t.policy.set_layout(choices["layout"], t.dist.device)
    else:
        # A block is compiled for a few kinds of input only, which must be those of the training.
        with t.report.phase("probing attention and head"), torch.compiler.set_stance("force_eager"):
            t.policy.probe(t.dist.device, parallel.DTYPES[t.config.train.precision], t.config.model.attention)
            choices |= {"head": t.policy.head, "layout": t.policy.layout, "shared_prefix": _shares_prompts(t)}
        choices["attention"] = t.policy.attention
        choices["frozen"] = t.state.frozen
    if choices.get("shared_prefix"):
        assert isinstance(t.train_store, TokenStore)
        t.train_store = t.train_store.sharing_prompts()
        if isinstance(t.val_store, TokenStore):
            t.val_store = t.val_store.sharing_prompts()
        for name, store in t.watched.items():
            if isinstance(store, TokenStore):
                t.watched[name] = store.sharing_prompts()
    if t.algo.needs_reference(t.config) and "reference" not in choices:
        choices["reference"] = t.dist.broadcast(references.files(t) if t.dist.is_main else None)
        choices["reference_of"] = references.identity(t)
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
