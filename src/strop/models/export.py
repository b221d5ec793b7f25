"""A DCP checkpoint becomes a Hugging Face directory, one shard at a time.

The base model (the directory or cached hub name that the run started from) gives the configuration, the
parameter names and shapes, the tokenizer and the chat template; the checkpoint gives the numbers, and its
names tell whether it is a language model's or a reward model's (a sequence classifier of one label). The
checkpoint's manifest is verified before DCP opens `.metadata`, which is a pickle. Then the parameters are
grouped into safetensors files of at most `max_shard_bytes`; for each file DCP reads just its tensors into
buffers of the target type, casting chunk by chunk on the way, and the buffers go to disk and are freed.
So the memory needed is one shard and the largest piece that one rank has stored, whatever the model's size.

At the end transformers loads the directory (it maps the files, so this costs address space and not memory)
and every tensor is compared bit for bit with a second read of the checkpoint. Only then does the directory
get its name. No step talks to a network.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from strop import checkpoint
from strop.config import LoraConfig, ModelConfig
from strop.data.tokenise import load_tokenizer
from strop.errors import StorageError, UserError
from strop.files import new_directory
from strop.models import hf, reward
from strop.models.adapter_export import PREFIX, Merged, Trained, read_tensors, write_adapter
from strop.models.hf import distinct_state
from strop.parallel import DTYPES
from strop.slurm import attempts


@dataclass(frozen=True)
class Shard:
    file: str
    dtypes: dict[str, torch.dtype]
    """Tensor name in the file -> its type there."""
    num_bytes: int


Reader = Callable[[dict[str, torch.dtype]], dict[str, torch.Tensor]]
"""Tensors of these names in these types."""


@contextmanager
def _still_there(directory: Path) -> Iterator[None]:
    """UserError where what fails inside does so because a run that goes on has removed its checkpoint."""
    try:
        yield
    except (OSError, dcp.CheckpointException) as error:
        if directory.is_dir():
            raise
        raise UserError(
            f"{directory} was removed while it was exported: its run goes on, and keeps "
            "checkpoint.keep_last checkpoints; export again, or when it has ended"
        ) from error


def export_checkpoint(
    directory: Path,
    base: ModelConfig,
    out: Path,
    *,
    lora: LoraConfig | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 10**9,
    replace: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the checkpoint in `directory` as the HF directory `out`; of a run with adapters (`lora`) the
    model with them added in, or with `adapter` PEFT's files of them. cache: as of `hf.weights_digest`, where
    the digest of the base is known from training.

    `dtype` is a name of DTYPES, or None for the base model's own (of adapters: fp32). Raises UserError if the
    checkpoint does not fit the base model or is removed meanwhile, if `out` exists without `replace`, or if a
    weight is not finite in `dtype`; StorageError if the checkpoint is damaged.
    """
    if out.exists() and not replace:
        raise UserError(f"--out {out} exists; add --force to replace it, or name another directory")
    with _still_there(directory):
        _export(directory, base, out, lora, adapter, dtype, max_shard_bytes, replace, cache, say)


def _export(
    directory: Path,
    base: ModelConfig,
    out: Path,
    lora: LoraConfig | None,
    adapter: bool,
    dtype: str | None,
    max_shard_bytes: int,
    replace: bool,
    cache: Path | None,
    say: Callable[[str], None],
) -> None:
    """As `export_checkpoint`."""
    say(f"verifying {directory}")
    stored = _stored(directory)
    scores = PREFIX + reward.HEAD in stored
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    config, model = _base_model(base, auto, scores)
    target = DTYPES[dtype] if dtype else (config.dtype or torch.float32)
    tokenizer = load_tokenizer(base)
    if scores:
        reward.set_pad_token(config, tokenizer)
    read: Reader
    if lora is not None and lora.rank is not None:
        trained = Trained(directory, model, base, lora, stored, cache)
        if adapter:
            with new_directory(out, replace=replace) as aside:
                write_adapter(trained, model, base, aside, DTYPES[dtype or "fp32"])
                tokenizer.save_pretrained(aside)
            return
        merged = Merged(trained, model, reward.reader(0)(base, None) if scores else hf.read_weights(base))
        sizes, read = merged.sizes, merged.read
    else:
        if adapter:
            raise UserError(f"--adapter: {directory} holds all weights and no adapters (lora.rank is null)")
        keys = _match(model, stored, directory, base)
        sizes = {name: (stored[key].size, stored[key].properties.dtype) for name, key in keys.items()}
        read = _reader(directory, keys, sizes)
    shards = _plan(sizes, target, max_shard_bytes)
    with new_directory(out, replace=replace) as aside:
        _write_shards(shards, read, aside, say)
        config.dtype = target
        config.architectures = [type(model).__name__]
        config.save_pretrained(aside)
        if not scores:
            _write_generation_config(base, aside)
        _write_companions(base, tokenizer, aside)
        say("loading the result and comparing every tensor with the checkpoint")
        _verify(aside, read, shards, base, auto)


def _stored(directory: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, which is verified before its metadata, a pickle, is read."""
    try:
        checkpoint.verify(directory)
    except checkpoint.Damaged as error:
        raise StorageError(errno.EIO, f"{error}; nothing exported (another --step may be intact)") from error
    entries = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _write_shards(shards: list[Shard], read: Reader, aside: Path, say: Callable[[str], None]) -> None:
    for number, shard in enumerate(shards, 1):
        say(f"shard {number}/{len(shards)}: {shard.file} ({shard.num_bytes / 1e9:.2f} GB)")
        tensors = read(shard.dtypes)
        _check_finite(tensors)
        save_file(tensors, aside / shard.file, metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        (aside / "model.safetensors.index.json").write_text(_index(shards))


def _base_model(base: ModelConfig, auto: Any, scores: bool) -> tuple[Any, PreTrainedModel]:
    """The base model's configuration, and its parameters on the meta device (names and shapes only);
    `scores`: those of a reward model."""
    assert base.path is not None
    options: dict[str, Any] = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base.path, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={base.path}: no configuration found there or in the hub cache ({error})"
        ) from error
    if scores:
        config = reward.scoring_config(config, base.path)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=base.trust_remote_code)
    return config, model


def _match(
    model: torch.nn.Module, stored: dict[str, TensorStorageMetadata], directory: Path, base: ModelConfig
) -> dict[str, str]:
    """Parameter name -> key in the checkpoint, tied ones once. UserError where the two do not fit."""
    wanted = distinct_state(model)
    keys = {name: PREFIX + name for name in wanted}
    problems = []
    for name, key in keys.items():
        if key not in stored:
            problems.append(f"{name} is missing")
        elif stored[key].size != wanted[name].shape:
            problems.append(f"{name} is {list(stored[key].size)}, not {list(wanted[name].shape)}")
    present = {key for key in stored if key.startswith(PREFIX)}
    problems += [f"{key[len(PREFIX) :]} is unknown" for key in sorted(present - set(keys.values()))]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{directory} does not fit the model {base.path}: {'; '.join(problems[:5])}{more}")
    return keys


def _reader(
    directory: Path, keys: dict[str, str], sizes: dict[str, tuple[torch.Size, torch.dtype]]
) -> Reader:
    """Reads tensors of a checkpoint that holds all weights."""
    shapes = {name: shape for name, (shape, _) in sizes.items()}
    return lambda dtypes: read_tensors(directory, {name: keys[name] for name in dtypes}, shapes, dtypes)


def _plan(
    sizes: dict[str, tuple[torch.Size, torch.dtype]], target: torch.dtype, max_shard_bytes: int
) -> list[Shard]:
    """Group the tensors, in the model's order, into files of at most `max_shard_bytes` (or one tensor)."""
    groups: list[list[str]] = [[]]
    totals = [0]
    dtypes = {}
    for name, (shape, own) in sizes.items():
        dtypes[name] = target if own.is_floating_point else own
        num_bytes = shape.numel() * dtypes[name].itemsize
        if groups[-1] and totals[-1] + num_bytes > max_shard_bytes:
            groups.append([])
            totals.append(0)
        groups[-1].append(name)
        totals[-1] += num_bytes
    total = len(groups)
    return [
        Shard(
            file="model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors",
            dtypes={name: dtypes[name] for name in names},
            num_bytes=size,
        )
        for i, (names, size) in enumerate(zip(groups, totals), 1)
    ]


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        # In pieces: isfinite makes a mask as long as its argument.
        if not all(bool(piece.isfinite().all()) for piece in tensor.view(-1).split(1 << 22)):
            raise UserError(
                f"{name} is not finite as {tensor.dtype}"
                + (" (too large for fp16; export as bf16)" if tensor.dtype == torch.float16 else "")
            )


def _index(shards: list[Shard]) -> str:
    total = sum(shard.num_bytes for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.dtypes}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _write_generation_config(base: ModelConfig, out: Path) -> None:
    try:
        reader: Any = GenerationConfig
        reader.from_pretrained(base.path, revision=base.revision, local_files_only=True).save_pretrained(out)
    except OSError:
        pass  # not every model has one


def _write_companions(base: ModelConfig, tokenizer: Any, out: Path) -> None:
    """The tokenizer with the run's chat template, and a model's own Python code."""
    assert base.path is not None
    tokenizer.save_pretrained(out)
    if base.trust_remote_code and Path(base.path).is_dir():
        for code in Path(base.path).glob("*.py"):
            shutil.copy(code, out)


def _verify(out: Path, read: Reader, shards: list[Shard], base: ModelConfig, auto: Any) -> None:
    """Load `out` with transformers and compare every tensor with the checkpoint, bit for bit."""
    model, info = auto.from_pretrained(
        out,
        dtype="auto",
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=base.trust_remote_code,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"transformers reports {problem}: {info[problem]}"
    loaded = model.state_dict()
    for shard in shards:
        for name, tensor in read(shard.dtypes).items():
            assert loaded[name].dtype == tensor.dtype, name
            assert torch.equal(_bytes(loaded[name]), _bytes(tensor)), f"{name} differs after loading"
            _page_out(loaded[name])


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _page_out(tensor: torch.Tensor) -> None:
    """Tell Linux that these pages are not needed now, so that a mapped model does not stay in memory.

    Only a hint (MADV_PAGEOUT, Linux 5.4): it never changes what the pages hold, and where the kernel does
    not know it, the kernel drops the pages by itself once memory is short.
    """
    page = os.sysconf("SC_PAGESIZE")
    start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = -(-start // page) * page, (start + num_bytes) // page * page
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 21)


def find_checkpoint(run: Path, which: str) -> Path:
    """The committed checkpoint that "latest", "best" or a step number means. Raises UserError."""
    if which not in ("latest", "best") and not which.isdecimal():
        raise UserError(f"--step {which}: expected a step number, latest or best")
    found = attempts.find_checkpoint(run, which)
    if found is not None:
        return found
    root = run / "checkpoints"
    steps = attempts.committed_steps(root)
    if not steps:
        raise UserError(f"{run}: no committed checkpoint in {root}")
    if which == "best" and not (root / "BEST.json").is_file():
        raise UserError(
            f"{run}: no best checkpoint (set checkpoint.best_metric in the run); have steps {steps}"
        )
    name = f"step {which}" if which.isdecimal() else f"the {which} step"
    raise UserError(f"{run}: {name} has no committed checkpoint; have steps {steps}")
