"""Adapters in a checkpoint become PEFT's files, or one with the weights that they stand beside.

A checkpoint of a run with adapters holds nothing of the frozen weights, but its state names their digest:
where the files of the base model are others now, nothing is exported. `Merged` is the model for
`export.export_checkpoint`, tensor by tensor: W + s B A, added in fp32 and rounded once. `write_adapter` makes
what `peft.PeftModel.from_pretrained` reads.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from strop.checkpoint import STATE
from strop.config import LoraConfig, ModelConfig
from strop.errors import UserError
from strop.models import hf
from strop.models.lora import SCORE, Adapters, matching, scale

PREFIX = "model."
"""Where the weights are in a checkpoint: PREFIX + the model's own parameter name."""
PEFT_PREFIX = "base_model.model."


def read_tensors(
    directory: Path,
    keys: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name; keys: name -> key in it. DCP casts while it copies the pieces."""
    tensors = {name: torch.empty(shapes[name], dtype=dtypes[name]) for name in keys}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        state = {key: tensors[name] for name, key in keys.items()}
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return tensors


class Trained:
    """What a checkpoint with adapters holds, beside the model (on the meta device) that it belongs to."""

    def __init__(
        self, directory: Path, model: PreTrainedModel, base: ModelConfig, config: LoraConfig,
        stored: Mapping[str, TensorStorageMetadata], cache: Path | None,
    ) -> None:  # fmt: skip
        """`model` gets adapters. Raises UserError if checkpoint, configuration and base do not fit."""
        assert base.path is not None
        self.directory, self.config = directory, config
        self.layers = dict(model.named_modules())
        self.adapters = Adapters(model, config)
        self.shapes = {n: t.shape for n, t in hf.distinct_state(model).items() if t.requires_grad}
        found = {key[len(PREFIX) :]: entry.size for key, entry in stored.items() if key.startswith(PREFIX)}
        if found != self.shapes:
            wrong = sorted(n for n in {*found, *self.shapes} if found.get(n) != self.shapes.get(n))
            raise UserError(
                f"{directory} does not fit the lora section of its configuration: {wrong[0]} (and "
                f"{len(wrong) - 1} more) is not as it says"
            )
        frozen = json.loads((directory / STATE).read_text()).get("frozen") or {}
        if frozen.get("base") != hf.weights_digest(base.path, base.revision, cache):
            raise UserError(
                f"model.path: the weights in {base.path} are not those that the adapters in {directory} were "
                "trained beside"
            )

    def read(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        keys = {name: PREFIX + name for name in self.shapes}
        return read_tensors(self.directory, keys, self.shapes, dict.fromkeys(keys, dtype))


class Merged:
    """The model with its adapters added in."""

    def __init__(self, trained: Trained, model: PreTrainedModel, base: Mapping[str, Tensor]) -> None:
        """base: the weights that the adapters stand beside."""
        self._trained, self._values, self._base = trained, trained.read(), base
        self._scale = scale(trained.config)
        self.sizes = {
            name: (tensor.shape, self._base[name].dtype)
            for name, tensor in hf.distinct_state(model).items()
            if not hf.is_adapter(name)
        }
        """Name -> shape and the base's type, in the model's order."""

    def read(self, names: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The tensors of these names in these types."""
        return {name: self._tensor(name).to(dtype) for name, dtype in names.items()}

    def _tensor(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._trained.adapters.layers:
            return self._base[name]
        a, b = (self._values[f"{layer}.lora_{x}.weight"] for x in "AB")
        delta = self._scale * (b @ a)
        is_turned = isinstance(self._trained.layers[layer], Conv1D)
        return self._base[name].float() + (delta.t() if is_turned else delta)


def write_adapter(
    trained: Trained, model: PreTrainedModel, base: ModelConfig, out: Path, dtype: torch.dtype
) -> None:
    """adapter_model.safetensors and adapter_config.json, as PEFT 0.21 writes them."""
    file = out / "adapter_model.safetensors"
    tensors, whole = _named_for_peft(trained, model, trained.read(dtype))
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name} is not finite as {dtype}")
    save_file(tensors, file, metadata={"format": "pt"})
    again, _ = _named_for_peft(trained, model, trained.read(dtype))
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, again.pop(name)), f"{name} differs after loading"
    assert not again
    (out / "adapter_config.json").write_text(json.dumps(_peft_config(trained, base, whole), indent=2) + "\n")


def _named_for_peft(
    trained: Trained, model: PreTrainedModel, values: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by PEFT's names, and the modules trained whole. PEFT makes a copy of each of those, so that of
    an embedding and the head tied to it both must be named."""
    names = {id(t): n for n, t in hf.distinct_state(model).items()}
    tensors, whole = {}, list(trained.adapters.whole)
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = values.get(names[id(tensor)])
        if value is not None:
            clean = hf.clean_name(name)
            tied = clean != names[id(tensor)]
            tensors[PEFT_PREFIX + clean] = value.clone() if tied else value
            if tied and clean.rpartition(".")[0] not in whole:
                whole.append(clean.rpartition(".")[0])
    return tensors, whole


def _peft_config(trained: Trained, base: ModelConfig, whole: list[str]) -> dict[str, Any]:
    config = trained.config
    assert base.path is not None
    is_local = Path(base.path).is_dir()
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if SCORE in whole else "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base.path).resolve()) if is_local else base.path,
        "revision": base.revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(trained),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(trained.layers[n], Conv1D) for n in trained.adapters.layers),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(trained: Trained) -> list[str]:
    """The last parts of the layers' names where these say the same, else whole names."""
    chosen = set(trained.adapters.layers)
    last = sorted({name.rpartition(".")[2] for name in chosen})
    meant = set[str]().union(*(matching(word, trained.layers) for word in last))
    return last if meant == chosen else sorted(chosen)
