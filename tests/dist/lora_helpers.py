"""A run with adapters, and the truth about one: its layers and dropout in fp64, by formulas of their own."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from strop.data import plan
from tests import toy as t

LORA = {"rank": 4, "alpha": 6.0}
SCALE = 6.0 / 4
LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
]
OPTIM = {"lr": 2e-2, "schedule": "constant"}
"""Large, so that adapters matter after a step."""


def run(ranks, toy, tmp_path, algo, name, world_size=1, words=(), **sections):
    sections = {"lora": LORA, "optim": OPTIM, **sections}
    return t.run(ranks, toy, tmp_path, algo, name, world_size, words, **sections)


# ------------------------------------------------------------------------------------------- the truth


def splitmix(x):
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def kept(seed, step, row, length, layer, num_in, p):
    """Which inputs of an adapter survive, bool [length, num_in], with Python's integers and unsigned ones."""
    keys = []
    for place in range(length):
        key = splitmix(seed)
        for number in (step, row, place):
            key = splitmix(key ^ ((number + 1) * 0x9E3779B97F4A7C15) % 2**64)
        keys.append(key >> 32)
    salt = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:4], "big")

    def murmur(h):  # its published finaliser, less the last shift
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        return (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)

    feature = murmur((np.arange(num_in, dtype=np.uint32) * np.uint32(0x9E3779B9)) ^ np.uint32(salt))
    drawn = murmur(np.array(keys, dtype=np.uint32)[:, None] ^ feature[None, :])
    # signed comparison: the lowest signed number is 2^31 as an unsigned one
    return (drawn ^ np.uint32(2**31)).astype(np.int64) >= round(p * 2**32)


class Truth:
    """transformers in fp64 with adapters by hooks."""

    def __init__(self, model_dir, weights, scale=SCALE, p=0.0, whole=()):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
        self.model.requires_grad_(False)
        self.weights = {n: w.double().requires_grad_() for n, w in weights.items() if ".lora_" in n}
        self.p, self.row, self.step = p, None, None
        layers = {re.sub(r"\.lora_[AB]\.weight", "", n) for n in self.weights}
        for layer in layers:
            a, b = (self.weights[f"{layer}.lora_{x}.weight"] for x in "AB")
            self.model.get_submodule(layer).register_forward_hook(self._hook(layer, a, b, scale))
        for name in whole:
            parameter = self.model.get_parameter(name)
            parameter.data = weights[name].double()
            parameter.requires_grad_(True)
            self.weights[name] = parameter

    def _hook(self, layer, a, b, scale):
        def add(module, args, output):
            x = args[0]
            if self.p and self.row is not None:
                keep = kept(42, self.step, self.row, x.shape[1], layer, x.shape[2], self.p)
                x = x * torch.from_numpy(keep) / (1 - self.p)
            return output + scale * (x @ a.T) @ b.T

        return add

    def logps(self, store, row, step):
        self.row, self.step = int(row), step
        return [t.token_logprobs(self.model, *seq)[0] for seq in store.sequences(row)]


def step_loss(truth, store, algo, step, reference=None):
    """Mean loss of optimiser step `step` (from 0)."""
    rows = plan.step_rows(store.num_rows, 6, 42, step)
    logps = {int(row): truth.logps(store, row, step) for row in rows}
    if algo == "sft":
        return -torch.cat([x for seqs in logps.values() for x in seqs]).mean()
    losses = []
    for row, (chosen, rejected) in logps.items():
        c, d = (t.token_logprobs(reference, *seq)[0].sum() for seq in store.sequences(row))
        losses.append(-F.logsigmoid(0.1 * ((chosen.sum() - c) - (rejected.sum() - d))))
    return torch.stack(losses).mean()


def weights_of(saved):
    return {name.removeprefix("model."): x for name, x in saved.items() if name.startswith("model.")}
