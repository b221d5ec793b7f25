"""The model directory (or hub cache): configuration, weights, sizes. No weight is read.

The module is built on the meta device, so parameters, blocks and ties are those that the trainer will
have, for any architecture; the safetensors headers say what is in the files.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from strop import parallel
from strop.config import LoraConfig, ModelConfig
from strop.doctor.checks import Checks, gib
from strop.errors import UserError, first_line
from strop.models import hf, local, reward, whole
from strop.models.lora import Adapters, num_trainable

HEADER_LIMIT = 1 << 28


@dataclass(frozen=True)
class Shape:
    """What sizes follow from."""

    num_params: int
    """Tied weights once."""
    block_params: int
    """Of the largest transformer block; 0 where the model names none."""
    num_blocks: int
    root_params: int
    """Outside the blocks: embeddings, head, last norm."""
    hidden: int
    intermediate: int
    kv_hidden: int
    """Key heads times their size."""
    vocab_size: int
    """Rows of the embedding."""
    max_positions: Optional[int]
    file_bytes: int
    """Of the weights on disk; 0 where they are not here."""
    scores: bool = False
    """A scalar head: no logits."""
    num_trained: Optional[int] = None
    """With adapters: what is trained, beside num_params frozen ones; null: all of them."""
    is_known: bool = True
    """Whether one rank of a CPU can use its weights in place, as far as modules tell (models.whole)."""


def look(
    config: ModelConfig,
    checks: Checks,
    offline: bool,
    scores: bool = False,
    lora: Optional[LoraConfig] = None,
) -> Optional[Shape]:
    """The model's shape; None if there is no usable one. `offline`: the user's jobs do not ask the hub.
    `scores`: a model with a scalar head is trained."""
    assert config.path is not None
    try:
        local.check_model(config.path)
    except UserError as error:
        checks.fail("model", str(error))
        return None
    folder = _folder(config)
    try:
        hf_config = AutoConfig.from_pretrained(
            config.path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        _not_here(config.path, error, checks, offline)
        return None
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            from_lm = scores and not hf.is_classifier(hf_config)
            if scores:
                hf_config = reward.scoring_config(hf_config, config.path)
            else:
                hf.check_causal(hf_config, config.path)
            model = auto.from_config(hf_config, trust_remote_code=config.trust_remote_code)
            if scores:
                reward.checked_head(model)
    except UserError as error:
        checks.fail("model", str(error))
        return None
    except (ValueError, KeyError, TypeError, ImportError) as error:
        checks.fail("model", f"model.path: {config.path!r} is no causal language model ({first_line(error)})")
        return None
    model.tie_weights()
    shape = _shape(model, hf_config, _weight_bytes(folder) if folder else 0, scores)
    tied = "tied" if hf_config.get_text_config().tie_word_embeddings else "not tied"
    checks.ok(
        "model",
        f"{type(model).__name__}, {shape.num_params:,} parameters in {shape.num_blocks} blocks, embeddings "
        f"{tied}",
    )
    if shape.num_blocks == 0:
        checks.warn("model", "it names no transformer blocks", "it is sharded as a whole: more memory")
    if folder is None:
        text = f"the weights of {config.path} are not in the hub cache"
        advice = f"fetch them on a node with internet: hf download {config.path}"
        checks.fail("weights", text, advice) if offline else checks.warn("weights", text, advice)
    else:
        _compare_weights(folder, model, shape, checks, new={reward.HEAD} if from_lm else set())
    return shape if lora is None or lora.rank is None else _with_adapters(shape, model, lora, checks)


def _with_adapters(shape: Shape, model: Any, config: LoraConfig, checks: Checks) -> Optional[Shape]:
    try:
        adapters = Adapters(model, config)
    except UserError as error:
        checks.fail("adapters", str(error))
        return None
    checks.ok("adapters", adapters.describe(model))
    return replace(shape, num_trained=num_trainable(model))


def _folder(config: ModelConfig) -> Optional[Path]:
    """Where the weights lie: the directory itself or the hub cache's snapshot; None if not here."""
    assert config.path is not None
    if Path(config.path).is_dir():
        return Path(config.path)
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        found = try_to_load_from_cache(config.path, name, revision=config.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _not_here(path: str, error: Exception, checks: Checks, offline: bool) -> None:
    if Path(path).is_dir():
        checks.fail("model", f"model.path: {path!r}: {first_line(error)}", "see to its config.json")
        return
    text = f"model.path: {path!r} is neither a directory nor in the hub cache"
    advice = f"fetch it on a node with internet: hf download {path}"
    checks.fail("model", text, advice) if offline else checks.warn("model", text, advice)


def _shape(model: Any, hf_config: Any, file_bytes: int, scores: bool) -> Shape:
    text = hf_config.get_text_config()
    blocks = [
        sum(p.numel() for p in block.parameters()) for _, _, block in parallel.transformer_blocks(model)
    ]
    total = sum(p.numel() for p in model.parameters())
    heads = getattr(text, "num_attention_heads", None) or 1
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        num_params=total,
        block_params=max(blocks, default=0),
        num_blocks=len(blocks),
        root_params=total - sum(blocks),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_hidden=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        max_positions=getattr(text, "max_position_embeddings", None),
        file_bytes=file_bytes,
        scores=scores,
        is_known=whole.is_known(model),
    )


def _weight_bytes(folder: Path) -> int:
    patterns = ("*.safetensors",) if any(folder.glob("*.safetensors")) else ("*.bin",)
    return sum(f.stat().st_size for pattern in patterns for f in folder.glob(pattern))


def _compare_weights(folder: Path, model: Any, shape: Shape, checks: Checks, new: set[str]) -> None:
    """Every parameter but `new` ones must be in the files, in its shape; the index must name files that are
    there."""
    index = folder / "model.safetensors.index.json"
    names = {f.name for f in folder.glob("*.safetensors")}
    if index.is_file():
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - names)
        if missing:
            checks.fail("weights", f"{folder} lacks {', '.join(missing[:3])}", "copy or download them again")
            return
    found: dict[str, tuple[str, list[int]]] = {}
    for name in sorted(names):
        try:
            found |= read_header(folder / name)
        except ValueError as error:
            checks.fail("weights", f"{folder / name}: {error}", "copy or download it again")
            return
    size = f"{gib(shape.file_bytes)} in {len(names) or 'some'} file(s)"
    if not names:
        checks.ok("weights", f"{size}, not safetensors: their content is not looked at")
        return
    wanted = {name: list(t.shape) for name, t in hf.distinct_state(model).items() if name not in new}
    prefix = f"{model.base_model_prefix}."
    absent = [n for n in wanted if n not in found and n.removeprefix(prefix) not in found]
    other = [n for n in wanted if n in found and found[n][1] != wanted[n]]
    if other:
        text = f"{other[0]} is {found[other[0]][1]} in the file, config.json makes it {wanted[other[0]]}"
        checks.fail("weights", text, "config.json and weights do not belong together")
    elif absent and len(absent) == len(wanted):
        checks.warn("weights", f"{size}; names differ from the module's and are left to transformers")
    elif absent:
        text = f"{len(absent)} of {len(wanted)} weights are not in the files under their names: {absent[0]}"
        checks.warn("weights", text, "unless transformers renames them at load, they would be random")
    else:
        dtypes = sorted({found[n][0] for n in wanted if n in found})
        checks.ok("weights", f"{size}, {len(wanted)} tensors, {'/'.join(dtypes)}")


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """name -> (dtype, shape) of a safetensors file. ValueError if it is cut off or no such file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else HEADER_LIMIT + 1
        if length > min(HEADER_LIMIT, size):
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise ValueError(f"{size:,} bytes, its header needs {end:,}: damaged or cut off")
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
