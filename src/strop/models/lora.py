"""Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021): y = W x + s B A dropout(x).

`Adapters(lm, config)` replaces the chosen linear layers of a model whose weights are not there yet. What is
left of the model is frozen and kept in the compute type: it needs no fp32 master, and neither gradient nor
moments. A and B (and modules that are trained whole) are fp32, so optimiser, checkpoints and reductions see
nothing else. A layer's own module stays as it is, as `base_layer`: another one with in_features and
out_features, a quantised one say, may stand there.

Two things make a run repeatable on any number of ranks: A is drawn from the run's seed and the layer's
name, and dropout is a hash of (seed, step, row, place in the row), which the batch brings along as `draw_T`,
and of layer and feature. A batch without it (validation, reference) drops nothing.

Shapes: T tokens, I and O the layer's inputs and outputs, r rank, N trained tokens, H hidden size, V
vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop import similar
from strop.config import LoraConfig, ModelConfig
from strop.dist import Dist
from strop.errors import UserError
from strop.models import hf

ALL_LINEAR = "all-linear"
SCORE = "score"
"""A sequence classifier's head in transformers: begun anew in every run, so never frozen."""


@dataclass
class _Now:
    """What all adapters of a model do in the forward under way."""

    enabled: bool = True
    draws: Optional[Tensor] = None
    """int32, shaped as the tokens that the layers see: the keys of dropout, or None for no dropout."""


class LoraLinear(nn.Module):
    """A linear layer (or GPT-2's Conv1D) with an adapter: x [..., I] -> [..., O]."""

    feature_I: Tensor

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig, now: _Now) -> None:
        super().__init__()
        assert config.rank is not None
        self.base_layer = base_layer
        num_in, num_out = features(base_layer)
        device = next(base_layer.parameters()).device
        self.lora_A = _matrix(config.rank, num_in, device)
        self.lora_B = _matrix(num_out, config.rank, device)
        self.name, self._now, self.dropout = name, now, config.dropout
        self.scale = scale(config) / (1 - config.dropout)
        if config.dropout:
            self.register_buffer("feature_I", _feature_keys(name, num_in), persistent=False)
            self._keep_from = round(config.dropout * 2**32) - 2**31

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self._now.enabled:
            return y
        low, part = self._low(x, self._now.draws)
        # One rounding of the sum, and y itself, to the bit, while B is 0.
        out = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.weight.t(), alpha=part)
        return out.view_as(y)

    def beside(self, hidden_NH: Tensor, draws_N: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """As a head: hidden [N, H + r] and weight [V, H + r], whose product are the logits. So the fused head
        needs to know nothing of adapters; its weight then has a gradient, most of which is not used."""
        if not self._now.enabled:
            return hidden_NH, self.weight
        low_Nr, part = self._low(hidden_NH, draws_N)
        return torch.cat((hidden_NH, low_Nr * part), 1), torch.cat((self.weight, self.lora_B.weight), 1)

    def _low(self, x: Tensor, draws: Optional[Tensor]) -> tuple[Tensor, float]:
        """A dropout(x), and the factor that is still missing."""
        if self.dropout == 0 or draws is None:
            return nn.functional.linear(x, self.lora_A.weight), self.scale * (1 - self.dropout)
        if x.shape[:-1] != draws.shape:
            raise UserError(
                f"lora.dropout: {self.name} does not see the batch's tokens as they stand there; give other "
                "lora.targets, or lora.dropout=0"
            )
        dropped = _mixed(draws[..., None] ^ self.feature_I) < self._keep_from
        return nn.functional.linear(x.masked_fill(dropped, 0.0), self.lora_A.weight), self.scale


class Adapters:
    """All adapters of a model, by the names of their layers."""

    def __init__(self, lm: PreTrainedModel, config: LoraConfig, dtype: Optional[torch.dtype] = None) -> None:
        """Puts adapters into `lm` and freezes the rest, in `dtype` from now on (its values are lost).

        Raises UserError for a name that no layer has, a rank that is larger than a layer, an embedding,
        a head that is tied to one, a layer that is trained whole, and where no layer is left.
        """
        modules = dict(lm.named_modules())
        names = [] if config.modules_to_save is None else _listed(config.modules_to_save)
        self.whole = _chosen("lora.modules_to_save", names, modules) if names else []
        if isinstance(modules.get(SCORE), nn.Module) and SCORE not in self.whole:
            self.whole.append(SCORE)
        inside = {n for n in modules for whole in self.whole if n == whole or n.startswith(f"{whole}.")}
        chosen = choose(lm, config.targets)
        if config.targets == ALL_LINEAR:  # all that are left
            chosen = [name for name in chosen if name not in inside]
        for name in inside.intersection(chosen):
            raise UserError(
                f"lora.targets: {name} is trained whole (lora.modules_to_save): no adapter beside it"
            )
        if not chosen:
            raise UserError(
                f"lora.modules_to_save: {', '.join(self.whole)} leaves no layer for an adapter; "
                "lora.rank=null trains all weights"
            )
        for name in chosen:
            _check_layer(lm, name, modules[name], config)
        lm.requires_grad_(False)
        for name in self.whole:
            modules[name].requires_grad_(True)
        if dtype is not None:
            for p in lm.parameters():
                if not p.requires_grad:
                    p.data = torch.empty_like(p, dtype=dtype)
        self._now = _Now()
        self.layers: dict[str, LoraLinear] = {}
        for name in chosen:
            self.layers[name] = LoraLinear(modules[name], name, config, self._now)
            parent, _, attribute = name.rpartition(".")
            setattr(lm.get_submodule(parent), attribute, self.layers[name])
        self.dropout = config.dropout

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """A as PEFT draws it, uniform within 1/√I, but from the seed and the layer's name; B is 0."""
        for name, layer in self.layers.items():
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            target = layer.lora_A.weight
            bound = 1 / math.sqrt(target.shape[1])
            drawn = torch.empty(target.shape).uniform_(-bound, bound, generator=generator)
            drawn = drawn.to(target.device, target.dtype)
            if isinstance(target, DTensor):  # every rank has drawn the whole: nothing is sent
                drawn = distribute_tensor(drawn, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(drawn)
            layer.lora_B.weight.zero_()

    def draw(self, draws: Optional[Tensor]) -> None:
        """The keys of dropout in the next forward, and in its recomputation, shaped as its tokens."""
        self._now.draws = draws

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was without adapters, to the bit."""
        self._now.enabled = False
        try:
            yield
        finally:
            self._now.enabled = True

    def describe(self, lm: nn.Module) -> str:
        trained, everything = num_trainable(lm), sum(p.numel() for p in lm.parameters())
        beside = f" and {', '.join(self.whole)}" if self.whole else ""
        return (
            f"LoRA on {len(self.layers)} layers{beside}: trainable parameters {trained:,} of {everything:,} "
            f"({100 * trained / everything:.2f} %)"
        )


def facts(lm: nn.Module, model: ModelConfig, dist: Dist, cache: Path) -> dict[str, str]:
    """What the checkpoints of a run with adapters belong to: the frozen weights, which stand in none of them,
    and what is trained. `cache`: see `hf.weights_digest`. Collective."""
    assert model.path is not None
    base = dist.broadcast(hf.weights_digest(model.path, model.revision, cache) if dist.is_main else None)
    shapes = {n: list(t.shape) for n, t in hf.distinct_state(lm).items() if t.requires_grad}
    trained = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:24]
    return {"base": base, "trained": trained}


def check_facts(
    now: Optional[dict[str, str]], begun: Optional[dict[str, str]], model: ModelConfig, run_dir: Path
) -> None:
    """Raises UserError if a run goes on with other frozen weights, or other adapters, than it began with."""
    old, new = begun or {}, now or {}
    if old.get("trained") != new.get("trained"):
        change = "without adapters" if now and not begun else "with other adapters, or modules trained whole"
        raise UserError(f"lora: {run_dir} began {change}; give the run another name to begin anew")
    if old.get("base") != new.get("base"):
        raise UserError(
            f"model.path: the weights in {model.path} are not those that {run_dir} began with, which its "
            "adapters belong to: put them back, or give the run another name to begin anew"
        )


def num_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def scale(config: LoraConfig) -> float:
    """By which B A x is multiplied."""
    assert config.rank is not None
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def features(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def choose(lm: PreTrainedModel, targets: Any) -> list[str]:
    """Names of the modules that `lora.targets` means, in the model's order. UserError if it means none."""
    modules = dict(lm.named_modules())
    if isinstance(targets, str):
        if targets == ALL_LINEAR:
            head = lm.get_output_embeddings()
            names = [n for n, m in modules.items() if _is_linear(m) and m is not head and n != SCORE]
            if not names:
                raise UserError(f"lora.targets: {type(lm).__name__} has no linear layers")
            return names
        found = [name for name in modules if name and re.fullmatch(targets, name)]
        if not found:
            raise UserError(
                f"lora.targets: no layer's whole name matches {targets!r}"
                + (f"; write [{targets}]?" if matching(targets, modules) else _nearest(targets, modules))
            )
        return found
    return _chosen("lora.targets", targets, modules)


def _chosen(key: str, wanted: Iterable[str], modules: dict[str, nn.Module]) -> list[str]:
    """As PEFT reads a list: whole names, or the end of one behind a dot. Each must name something."""
    found: set[str] = set()
    for word in wanted:
        own = matching(word, modules)
        if not own:
            raise UserError(f"{key}: no layer is called {word!r}{_nearest(word, modules)}")
        found |= own
    return [name for name in modules if name in found]


def matching(word: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules that a word in a list means."""
    return {name for name in modules if name == word or name.endswith(f".{word}")}


def _nearest(word: str, modules: dict[str, nn.Module]) -> str:
    linear = [name for name, module in modules.items() if _is_linear(module)]
    return similar.meant_or_known(word.rpartition(".")[2], (name.rpartition(".")[2] for name in linear))


def _check_layer(lm: PreTrainedModel, name: str, layer: nn.Module, config: LoraConfig) -> None:
    if isinstance(layer, nn.Embedding):
        raise UserError(
            f"lora.targets: {name} is an embedding, which gets no adapter; lora.modules_to_save "
            "trains it whole"
        )
    if not _is_linear(layer):
        raise UserError(f"lora.targets: {name} is a {type(layer).__name__} and no linear layer")
    embedding = lm.get_input_embeddings()
    if layer is lm.get_output_embeddings() and layer.weight is embedding.weight:
        raise UserError(
            f"lora.targets: {name} has the weight of the embedding, which would stay as it is: "
            "such a pair gets no adapter; lora.modules_to_save trains both whole"
        )
    assert config.rank is not None
    if config.rank > min(features(layer)):
        num_in, num_out = features(layer)
        raise UserError(
            f"lora.rank: {config.rank} is larger than {name} ({num_in} inputs, {num_out} outputs)"
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _matrix(rows: int, columns: int, device: torch.device) -> nn.Linear:
    """fp32, with untouched values."""
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32, device=device))
    return linear


def _feature_keys(name: str, num: int) -> Tensor:
    """int32 [num], other ones for every layer."""
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big", signed=True)
    return _mixed(torch.arange(num, dtype=torch.int32) * -1640531527 ^ salt)


def _mixed(h: Tensor) -> Tensor:
    """int32, in place: the finaliser of MurmurHash3 (Appleby), less its last shift, which leaves the upper
    bits as they are. Its right shifts are logical."""
    h ^= (h >> 16) & 0xFFFF
    h *= -2048144789
    h ^= (h >> 13) & 0x7FFFF
    h *= -1028477387
    return h
