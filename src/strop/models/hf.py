"""Models as Hugging Face directories: in, without a network call for local paths.

Rank 0 reads the weights once; every rank builds the same module with untouched memory and receives only
its shards (`scatter_weights`), so a model never exists whole but on rank 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init

from strop import files
from strop.config import ModelConfig
from strop.dist import Dist
from strop.errors import UserError, first_line
from strop.models.local import WEIGHT_FILES

HUB_TRIES_S = 6.0
"""How long a hub that does not answer is asked again, before anything is downloaded."""
HUB_TIMEOUT_S = 3.0

Reader = Callable[[ModelConfig, Optional[str]], dict[str, torch.Tensor]]
"""(model section, other path or None) -> the state of a checkpoint."""

SETTLED_NS = 2 * 10**9
"""A file that was written a moment ago may be written once more without a change of its times."""


def check_hub(key: str, name: str, revision: Optional[str], file: str) -> None:
    """UserError if `name`, which `key` gives, is neither a directory nor in the hub's cache nor on the hub.

    A mistyped directory looks like a hub name, and where no hub can be reached transformers takes most of a
    minute, in several turns, to say something about a connection.
    """
    if Path(name).is_dir():
        return
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        problem = _ask_hub(hf_hub_url(name, file, revision=revision))
    except HFValidationError:
        problem = "and cannot be one's name on the hub"
    if problem:
        raise UserError(f"{key}: {name!r} is no directory (looked in {Path.cwd()}), {problem}")


def _ask_hub(url: str) -> Optional[str]:
    """Why the file cannot be had; None where the hub answers: a download knows what to do then, retries
    included."""
    deadline = time.monotonic() + HUB_TRIES_S
    while True:
        try:
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            return f"and the hub has none of that name, or not for this account ({first_line(error)})"
        except HfHubHTTPError:
            return None
        except OfflineModeIsEnabled:
            return "not in the hub's cache here, and HF_HUB_OFFLINE forbids to ask the hub"
        except HTTPError as error:
            if time.monotonic() > deadline:
                return (
                    f"not in the hub's cache here, and the hub cannot be reached ({first_line(error)}). "
                    "Give a directory, or download it where there is a network; with HF_HUB_OFFLINE=1 only "
                    "the cache is looked at"
                )
            time.sleep(1)
        else:
            return None


def weights_digest(path: str, revision: Optional[str], cache: Optional[Path] = None) -> str:
    """Content address of a model's weights; for a hub name, the name and the resolved revision. `cache`:
    where the digests of files are kept, so that only those that have changed since are read."""
    digest = hashlib.sha256()
    folder = Path(path)
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(path, revision=revision)
        digest.update(f"{path}@{getattr(config, '_commit_hash', None) or revision}".encode())
        return digest.hexdigest()[:24]
    kept = (
        cache
        and cache / "weights" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    )
    known = (files.read_json(kept) if kept else None) or {}
    now: dict[str, Any] = {}
    for file in sorted(f for pattern in (*WEIGHT_FILES, "config.json") for f in folder.glob(pattern)):
        status, old = _status(file), known.get(file.name)
        content = old["sha256"] if old and old["status"] == status else files.sha256(file)
        digest.update(f"{file.name} {content}\n".encode())
        if time.time_ns() - max(status[1:3]) > SETTLED_NS and _status(file) == status:
            now[file.name] = {"status": status, "sha256": content}
    if kept and now != known:
        with contextlib.suppress(
            OSError
        ):  # a cache that others prepared may be read-only: they are read again
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(kept, now)
    return digest.hexdigest()[:24]


def _status(file: Path) -> list[int]:
    """Differs once a file was written or replaced, also where its time of writing was set back."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def read_config(config: ModelConfig, key: str = "model.path") -> PreTrainedConfig:
    """The model's config.json. Raises UserError naming `key`, which gave its path."""
    assert config.path is not None
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: {config.path!r} is no causal language model ({first_line(error)})"
        ) from error


def is_classifier(hf_config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is of a sequence classifier, head included."""
    return any("ForSequenceClassification" in name for name in hf_config.architectures or ())


def check_causal(hf_config: PreTrainedConfig, path: Optional[str], key: str = "model.path") -> None:
    """UserError for a reward model: transformers would leave its head behind, and take the embeddings, which
    no longer belong to a language model, for the one that it lacks."""
    if is_classifier(hf_config):
        kind = ", ".join(hf_config.architectures or [])
        raise UserError(
            f"{key}: {path} is no causal language model but a reward model or classifier ({kind})"
        )


def build_empty(config: ModelConfig) -> PreTrainedModel:
    """The causal language model of a configuration, without its weights (see `untouched`)."""
    return untouched(AutoModelForCausalLM, read_config(config), config)


def untouched(auto: Any, hf_config: PreTrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """The module in fp32 with allocated but untouched weights (no memory until written) and real buffers."""
    try:
        with hf_init.no_init_weights():
            model = auto.from_config(
                hf_config, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path: {config.path!r} is no causal language model ({first_line(error)})"
        ) from error
    model.tie_weights()
    model.config.use_cache = False
    return model


def scatter_weights(
    model: nn.Module,
    config: ModelConfig,
    dist: Dist,
    path: Optional[str] = None,
    read: Optional[Reader] = None,
    key: str = "model.path",
) -> None:
    """Fill the sharded `model` from a checkpoint in HF format (`config.path` if `path` is null), which rank 0
    reads with `read` (null: as a causal language model). `key` gave its path.

    Raises UserError on every rank if weights are missing, damaged or of another shape.
    """
    source: dict[str, torch.Tensor] = {}
    failure = None
    targets = {name: t for name, t in distinct_state(model).items() if not is_adapter(name)}
    if dist.is_main:
        try:
            source = (read or read_weights)(config, path)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            failure = f"cannot load its weights ({first_line(error)})"
        else:
            wrong = [
                name for name, t in targets.items() if name not in source or source[name].shape != t.shape
            ]
            if wrong:
                failure = f"no weight {wrong[0]} of shape {tuple(targets[wrong[0]].shape)}"
    if failure := dist.broadcast(failure):
        raise UserError(f"{key}: {path or config.path}: {failure}")
    with torch.no_grad():
        for name, tensor in targets.items():
            _scatter(tensor, source.get(name))


def read_weights(
    config: ModelConfig,
    path: Optional[str] = None,
    auto: Any = AutoModelForCausalLM,
    may_lack: Collection[str] = (),
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """The state of a checkpoint in HF format, without what it `may_lack` and does.

    transformers fills what a file lacks with random numbers, after a warning; here that is a ValueError.
    `settings` replace what its config.json says.
    """
    loaded, report = auto.from_pretrained(
        path or config.path,
        revision=config.revision if path is None else None,
        trust_remote_code=config.trust_remote_code,
        dtype="auto",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise ValueError(f"{name} has shape {tuple(found)}, but its config.json says {tuple(wanted)}")
    if missing := sorted(set(report["missing_keys"]) - set(may_lack)):
        raise ValueError(f"{len(missing)} are missing, such as {missing[0]}")
    return {name: t for name, t in loaded.state_dict().items() if name not in report["missing_keys"]}


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


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's (models.lora): it comes from no model's files."""
    return ".lora_A." in name or ".lora_B." in name


def clean_name(name: str) -> str:
    """A parameter's Hugging Face name without what wrappers put into it."""
    for part in ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer."):
        name = name.replace(part, "")
    return name
