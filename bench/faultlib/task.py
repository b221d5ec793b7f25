"""The run that is disturbed: a Llama of 1.3 million parameters, made-up preference pairs, hundreds of short
steps. Everything follows from fixed seeds, so that it is the same model and data wherever it is made.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 480
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
RARE_WORD = "w0"
"""Last in the vocabulary and in one row only: `make_narrow_model` has no embedding for it."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Task:
    """Where model and data lie, and how long a run is."""

    folder: Path
    max_steps: int
    save_every: int = 10
    validate_every: int = 25

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def narrow_model(self) -> Path:
        return self.folder / "narrow-model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def sft_data(self) -> Path:
        return self.folder / "sft-data"

    @property
    def bad_data(self) -> Path:
        return self.folder / "bad-data"

    def words(self, name: str) -> list[str]:
        """The trainer's arguments of one run. A cache of its own makes each run do its reference pass."""
        return [
            f"model.path={self.model}",
            f"data.train={self.data}",
            f"data.cache_dir={self.folder}/cache/{name}",
            f"run.dir={self.folder}/runs",
            f"run.name={name}",
            f"train.max_steps={self.max_steps}",
            "train.global_batch_size=8",
            "train.micro_batch_tokens=512",
            "train.precision=fp32",
            "optim.lr=1e-4",
            "optim.warmup_steps=5",
            f"validation.every={self.validate_every}",
            f"checkpoint.every={self.save_every}",
            "checkpoint.keep_last=3",
            "checkpoint.async=true",
            "checkpoint.best_metric=eval_loss",
        ]

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name


def make(folder: Path, max_steps: int, save_every: int = 10, validate_every: int = 25) -> Task:
    """Write model and data below `folder`."""
    task = Task(folder, max_steps, save_every, validate_every)
    task.folder.mkdir(parents=True, exist_ok=True)
    _make_data(task)
    _make_models(task)
    return task


def _make_data(task: Task) -> None:
    draw = random.Random(0)
    rows = [_pair(draw) for _ in range(304)]
    rows[200]["chosen"][0]["content"] += f" {RARE_WORD}"
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for folder, good, bad in (
        (task.data, rows, []),
        (task.sft_data, sft, []),
        (task.bad_data, rows, [{"prompt": rows[0]["prompt"], "chosen": rows[0]["chosen"]}]),
    ):
        folder.mkdir()
        for name, part in (("training", good[:256] + bad), ("validation", good[256:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _pair(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """A prompt, and two answers whose words come from different ends of the vocabulary."""

    def text(low: int, high: int, shortest: int, longest: int) -> str:
        return " ".join(f"w{draw.randrange(low, high)}" for _ in range(draw.randint(shortest, longest)))

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": message("user", text(100, 400, 4, 12)),
        "chosen": message("assistant", text(1, 300, 4, 16)),
        "rejected": message("assistant", text(150, 450, 4, 16)),
    }


def _make_models(task: Task) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL) - 1, -1, -1))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )
    ids: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": 1}
    for path, size in ((task.model, VOCABULARY), (task.narrow_model, VOCABULARY - 1)):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=size, bos_token_id=None, dtype="float32", **SHAPE, **ids)
        )
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
