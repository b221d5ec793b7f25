"""A model, a tokenizer and data small enough to train in a second, made on the spot; and truths about them.

The oracles use transformers in fp64 on one padded sequence at a time, and none of the trainer's code. They
begin at the token store, whose content has tests of its own.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from strop.data.store import TokenStore
from tests.unit.data_helpers import tiny_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "sea",
    "shells",
    "sell",
    "on",
    "the",
    "shore",
    "of",
    "Straße",
]
NUM_TRAIN, NUM_VALIDATION = 21, 7
"""Odd on purpose: with batches of 6 rows an epoch is three whole steps and one of three rows."""


def make(directory: Path) -> Path:
    """model/, preference/, sft/, unpaired/ and text/ under `directory`."""
    tokenizer = tiny_tokenizer()
    model = llama(len(tokenizer))
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, count in (("training", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        write_jsonl(directory / "preference" / f"{name}.jsonl", preference_rows(count, name))
        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preference_rows(count, name)]
        write_jsonl(directory / "sft" / f"{name}.jsonl", rows)
        write_jsonl(directory / "unpaired" / f"{name}.jsonl", labelled_rows(count, name))
        write_jsonl(directory / "text" / f"{name}.jsonl", texts(count, name))
    return directory


def llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    # a large initializer range: a toy with the usual one predicts all tokens alike
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    )


def preference_rows(count: int, seed: str) -> list[dict[str, str]]:
    """Lengths differ widely, so that batches are uneven."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        {"prompt": f"{i} {text(2, 9)}?", "chosen": text(1, 12), "rejected": text(2, 18) + "."}
        for i in range(count)
    ]


def labelled_rows(count: int, seed: str) -> list[dict[str, Any]]:
    """Two of three are desirable."""
    rows = preference_rows(count, seed)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
        for i, row in enumerate(rows)
    ]


def texts(count: int, seed: str) -> list[dict[str, str]]:
    """Documents of one word to several blocks of 32 tokens."""
    draw = random.Random(seed)
    lengths = [1, 2, 60, *(draw.randint(1, 25) for _ in range(count - 3))]
    return [{"text": " ".join([str(i), *draw.choices(WORDS, k=n)])} for i, n in enumerate(lengths)]


FOLDERS = {"dpo": "preference", "rm": "preference", "sft": "sft", "kto": "unpaired", "cpt": "text"}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(toy: Path, algo: str, target: Path, **sections: Any) -> Path:
    """A YAML file for the toy in fp32; `sections` are merged over it."""
    tree: dict[str, Any] = {
        "model": {"path": str(toy / "model")},
        "data": {"train": str(toy / FOLDERS[algo]), "max_length": 32 if algo == "cpt" else 256},
        "train": {"global_batch_size": 6, "micro_batch_tokens": 200, "max_steps": 6, "precision": "fp32"},
        "optim": {"lr": 1e-3, "schedule": "constant"},
        "checkpoint": {"every": None},
        "validation": {"at_start": False, "at_end": False},
        "log": {"tensorboard": False},
        "dist": {"backend": "gloo"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(tree))
    return target


def run(
    ranks: Any, toy: Path, tmp_path: Path, algo: str, name: str, world_size: int = 1, words: Any = (),
    **sections: Any,
) -> Path:  # fmt: skip
    """One attempt with `config(sections)` -> the run's directory. `words`: of the command line."""
    file = config(toy, algo, tmp_path / f"{name}.yaml", **sections)
    return ranks.run(algo, file, f"{tmp_path.name}-{name}", *words, world_size=world_size).run_dir


def stores(run_dir: Path) -> dict[str, TokenStore]:
    """The token stores of a run of SFT, DPO or KTO: train, validation."""
    paths = json.loads((run_dir / "logs" / "0001" / "data.json").read_text())
    return {name: TokenStore.open(path) for name, path in paths.items()}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, read by DCP's own offline loader."""
    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors,
        storage_reader=FileSystemReader(run_dir / "checkpoints" / f"step-{step:06d}"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return tensors


@functools.lru_cache(maxsize=2)
def model64(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def token_logprobs(model: Any, tokens: np.ndarray, trained: np.ndarray) -> tuple[Tensor, Tensor]:
    """fp64 log-probs of the trained tokens of one sequence, and the logits [trained, V] they come from."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    where = torch.from_numpy(np.array(trained)).nonzero()[:, 0]
    logits = model(ids[None]).logits[0][where - 1]
    return torch.log_softmax(logits, dim=-1).gather(1, ids[where][:, None])[:, 0], logits


def assert_equal_checkpoints(a: Path, b: Path, step: int) -> None:
    """Weights and both moments, bit for bit."""
    left, right = checkpoint(a, step), checkpoint(b, step)
    assert left.keys() == right.keys()
    assert any(name.endswith("exp_avg_sq") for name in left)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def assert_gradients(model: Any, run_dir: Path) -> None:
    """AdamW's first moment after one step is (1 - β1) times the gradient of every parameter."""
    saved = checkpoint(run_dir, 1)
    names = {f"optim.{name}.exp_avg" for name, _ in model.named_parameters()}
    assert names == {name for name in saved if name.endswith(".exp_avg")}
    for name, p in model.named_parameters():
        ours = saved[f"optim.{name}.exp_avg"].double() / 0.1
        assert torch.allclose(ours, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max())), name
