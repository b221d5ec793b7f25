"""Models and tokenizers as Hugging Face directories: in, without a network call for local paths.

Rank 0 reads the weights once; every rank builds the same module with untouched memory and receives only
its shards (`scatter_weights`), so a model never exists whole but on rank 0.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import initialization as hf_init

from strop.config import ModelConfig
from strop.data.render import chat_template
from strop.dist import Dist
from strop.errors import UserError

WEIGHT_FILES = ("*.safetensors", "*.bin")


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with the configured chat template. Raises UserError naming the key."""
    name = config.tokenizer or config.path
    key = "model.tokenizer" if config.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer in {name!r} ({_first_line(error)})") from error
    tokenizer.chat_template = chat_template(config.chat_template, tokenizer)
    return tokenizer


def check_model(path: str) -> None:
    """Raise UserError if `path` looks local and is no model directory; a hub name passes."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "assets/")) or path.count("/") > 1:
            hint = "; the demo's models are made by: python -m tools.demo_assets" if "assets" in path else ""
            raise UserError(f"model.path: {path} does not exist{hint}")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json: not a model directory")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"model.path: {path} has a config.json but no weights ({' or '.join(WEIGHT_FILES)})")


def weights_digest(path: str, revision: Optional[str]) -> str:
    """Content address of a model's weights; for a hub name, the name and the resolved revision."""
    digest = hashlib.sha256()
    folder = Path(path)
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(path, revision=revision)
        digest.update(f"{path}@{getattr(config, '_commit_hash', None) or revision}".encode())
        return digest.hexdigest()[:24]
    files = sorted(f for pattern in (*WEIGHT_FILES, "config.json") for f in folder.glob(pattern))
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:24]


def build_empty(config: ModelConfig) -> PreTrainedModel:
    """The module in fp32 with allocated but untouched weights (no memory until written) and real buffers."""
    assert config.path is not None
    try:
        hf_config = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with hf_init.no_init_weights():
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path: {config.path!r} is no causal language model ({_first_line(error)})"
        ) from error
    model.tie_weights()
    model.config.use_cache = False
    return model


def scatter_weights(model: nn.Module, config: ModelConfig, dist: Dist, path: Optional[str] = None) -> None:
    """Fill the sharded `model` from a checkpoint in HF format (`config.path` if `path` is null)."""
    path = path or config.path
    assert path is not None
    source: dict[str, torch.Tensor] = {}
    failure = None
    if dist.is_main:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                revision=config.revision if path == config.path else None,
                trust_remote_code=config.trust_remote_code,
                dtype="auto",
            )
            source = loaded.state_dict()
        except (OSError, ValueError, KeyError) as error:
            failure = f"model.path: cannot load {path!r} ({_first_line(error)})"
    if failure := dist.broadcast(failure):
        raise UserError(failure)
    with torch.no_grad():
        for name, tensor in distinct_state(model).items():
            full = source.get(name) if dist.is_main else None
            if dist.is_main and (full is None or full.shape != tensor.shape):
                raise UserError(f"{path}: no weight {name} of shape {tuple(tensor.shape)}")
            _scatter(tensor, full)


def _scatter(target: torch.Tensor, full: Optional[torch.Tensor]) -> None:
    whole = torch.empty(target.shape, dtype=target.dtype, device=target.device) if full is None else full
    whole = whole.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(whole, src=0)
        target.copy_(whole)


def distinct_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by Hugging Face name; a tied weight stands once."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[clean_name(name)] = tensor
    return out


def clean_name(name: str) -> str:
    """A parameter's Hugging Face name without what wrappers put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
