"""A tiny byte-level BPE tokenizer, made on the spot, and truths about its tokens."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells on the sea shore, and the shells she sells are sea shells.",
    "How many apples are there if 12 trees bear 7 apples each? There are 84 apples.",
    "A token that spans the end of the prompt is trained.  Two blanks,\n\na blank line.",
    "Straße, naïve, 東京, 🙂🙃",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "<s>{% if tools %}[{{ tools | length }} tools]{% endif %}" + CHATML


@functools.cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 5, trainer)
    return backend.to_str()


def tiny_tokenizer(
    *, chat_template: str | None = CHATML, bos: bool = False, trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """eos is </s>, pad is eos on purpose. bos: the tokenizer itself begins a text with <s>."""
    backend = Tokenizer.from_str(_trained())
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def num_bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    """Bytes of text that a token stands for: one for each letter of its byte-level spelling."""
    spelling = tokenizer.convert_ids_to_tokens(int(token))
    special = spelling in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    return len(spelling.encode()) if special else len(spelling)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
