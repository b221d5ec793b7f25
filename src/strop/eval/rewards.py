"""Preference rows and a reward model in, two scores a row out: any sequence classifier of one label.

rows -> rendered and tokenised by the trainer's own code, bad ones counted in its ledger -> batches of like
length, padded to the right -> the model's own forward, by transformers, so that a model of others (an
encoder, another head) is scored as it would be in use. A model without a pad token takes one sequence at a
time. The head of a causal model runs in fp32 whatever the type of the rest: in bf16 many pairs would be tied.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from strop.config import DataConfig
from strop.data import sources
from strop.data.fields import Refused, number
from strop.data.ledger import BadRow, Ledger, place
from strop.data.render import Rendered, Renderer
from strop.data.sources import Row
from strop.data.store import TokenisedRow
from strop.data.tokenise import Tokeniser
from strop.errors import UserError, first_line
from strop.models import hf, local

RATINGS = (
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
)
"""Fields with what people gave to each completion; the last pair is UltraFeedback's."""
CATEGORIES = ("category", "source", "subset")
NO_CATEGORY = "(none)"
MAX_LENGTH = 4096
"""Unless the model is made for less."""
KEYS = {
    "model.chat_template": "--chat-template",
    "model.path": "--model",
    "model.tokenizer": "--model: the tokenizer",
    "data.max_length=": "--max-length ",
    "data.hub_validation_split": "--split",
    "data.hub_subset": "--subset",
    " (data.split makes one)": "",
}
"""Of the configuration, and what they are called here."""


@dataclass(frozen=True)
class Pair:
    source: str
    line: int
    sequences: list[np.ndarray]
    """Token ids int32 [T] of chosen and rejected, prompts included."""
    ratings: tuple[float, float]
    """What people gave to them; NaN where the row does not say."""
    human_margin: float
    """By how much people prefer the chosen one: the difference of ratings, else the field `margin`."""
    category: str


def read_pairs(
    names: Sequence[str],
    tokenizer: Any,
    template: Optional[str],
    max_length: int,
    by: Optional[str],
    config: Optional[DataConfig] = None,
) -> tuple[list[Pair], Ledger, Optional[str]]:
    """The usable rows of files, directories or hub sets, the ledger of all, and the field of the categories:
    `by`, else the first of CATEGORIES that a row has. config: split and subset of hub sets. Raises UserError
    if no row can be used, or none has `by`."""
    config = config or DataConfig()
    found = [sources.find_one(name, "--data", "validation", config, "preference") for name in names]
    for key in ("hub_validation_split", "hub_subset"):
        if getattr(config, key) is not None and not any(source.format == "hub" for source in found):
            raise UserError(f"data.{key}: {', '.join(names)} is no hub set, which has such")
    renderer = Renderer("preference", tokenizer, template)
    waiting: deque[dict[str, Any]] = deque()

    def rendered() -> Iterator[Rendered | BadRow]:
        for source in found:
            for row in sources.read(source):
                waiting.append(row.fields if isinstance(row, Row) else {})
                yield renderer(row) if isinstance(row, Row) else row

    ledger = Ledger("evaluation")
    known: set[str] = set()
    candidates = CATEGORIES if by is None else (by,)
    used: list[tuple[dict[str, Any], Pair]] = []  # what may be the category; the texts would fill the memory
    for item in Tokeniser(tokenizer, max_length)(rendered()):  # in the order of the rows
        fields = waiting.popleft()
        if isinstance(item, TokenisedRow):
            try:
                used.append(({name: fields.get(name) for name in candidates}, _pair(item, fields)))
                known |= {key for key, value in fields.items() if value is not None}
                ledger.use(item)
                continue
            except Refused as refused:
                item = BadRow(item.source, item.line, refused.reason, refused.message)
        ledger.drop(dataclasses.replace(item, message=for_the_tool(item.message)))
    if not used:
        raise UserError(_nothing_usable(ledger))
    field = _category_field(known, by)
    return [_with_category(fields, pair, field) for fields, pair in used], ledger, field


def for_the_tool(text: str) -> str:
    """A message of the trainer's code with the tool's options in place of the configuration's keys."""
    for key, option in KEYS.items():
        text = text.replace(key, option)
    return text


def _pair(item: TokenisedRow, fields: dict[str, Any]) -> Pair:
    """Raises Refused for a rating that is no number."""
    ratings = _ratings(fields)
    human_margin = item.value if math.isnan(ratings[0]) else ratings[0] - ratings[1]
    ids = [tokens for tokens, _ in item.sequences]
    return Pair(item.source, item.line, ids, ratings, human_margin, NO_CATEGORY)


def _ratings(fields: dict[str, Any]) -> tuple[float, float]:
    for chosen, rejected in RATINGS:
        if fields.get(chosen) is not None and fields.get(rejected) is not None:
            return number(fields, chosen), number(fields, rejected)
    return math.nan, math.nan


def _category_field(known: set[str], by: Optional[str]) -> Optional[str]:
    if by is not None and by not in known:
        raise UserError(f"--by {by}: no usable row has that field; there are {', '.join(sorted(known))}")
    return by or next((name for name in CATEGORIES if name in known), None)


def _with_category(fields: dict[str, Any], pair: Pair, field: Optional[str]) -> Pair:
    value = fields.get(field) if field else None
    return pair if value is None else dataclasses.replace(pair, category=str(value))


def _nothing_usable(ledger: Ledger) -> str:
    lines = [f"--data: none of {ledger.read:,} rows can be used"]
    for entry in ledger.sources.values():
        for reason, dropped in entry.dropped.items():
            first = dropped.examples[0]
            where = place(entry.name, int(first["line"]))
            lines.append(f"  {dropped.rows:,} {reason}, the first at {where}: {first['message']}")
    return "\n".join(lines)


def load_model(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A sequence classifier of one label, from a directory or the hub. Raises UserError naming --model."""
    local.check_model(path, "--model")
    hf.check_hub("--model", path, None, "config.json")
    try:
        hf_config = AutoConfig.from_pretrained(path)
        if not hf.is_classifier(hf_config):
            kind = ", ".join(hf_config.architectures or []) or hf_config.model_type
            raise UserError(
                f"--model: {path} is no reward model but {kind}. Train one (sbatch/rm.sh) and export it "
                "(tools.convert_dcp_to_hf)"
            )
        if hf_config.num_labels != 1:
            raise UserError(
                f"--model: {path} sorts into {hf_config.num_labels} classes; a reward model has one"
            )
        auto: Any = AutoModelForSequenceClassification
        model, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model: cannot load {path} ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--model: {path} lacks {len(missing)} weights, such as {missing[0]}")
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        head.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
    model.config.use_cache = False
    return model.eval().to(device)


def longest(model: Any) -> int:
    """Tokens that a sequence may have unless the user says otherwise."""
    return min(MAX_LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", MAX_LENGTH))


def score_pairs(
    model: Any,
    pairs: Sequence[Pair],
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """fp64 [P, 2]: scores of chosen and rejected. progress: sequences done, of how many.

    Raises UserError naming the first row whose score is no number.
    """
    sequences = [ids for pair in pairs for ids in pair.sequences]
    scores = np.empty(len(sequences))
    pad = model.config.get_text_config().pad_token_id
    done = 0
    for members in _batches([len(ids) for ids in sequences], batch_tokens if pad is not None else 0):
        lengths = torch.tensor([len(sequences[i]) for i in members])
        mask_SL = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
        tokens_SL = torch.full(mask_SL.shape, pad or 0, dtype=torch.int64)
        tokens_SL[mask_SL] = torch.from_numpy(np.concatenate([sequences[i] for i in members])).long()
        with torch.inference_mode():
            logits_S1 = model(
                input_ids=tokens_SL.to(model.device), attention_mask=mask_SL.long().to(model.device)
            ).logits
        scores[members] = logits_S1[:, 0].double().cpu().numpy()
        done += len(members)
        progress(done, len(sequences))
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        pair, side = pairs[bad[0] // 2], ("chosen", "rejected")[bad[0] % 2]
        raise UserError(
            f"--model: the score of {place(pair.source, pair.line)} ({side}) is {scores[bad[0]]}, and "
            f"{len(bad) - 1} more are not finite: damaged weights, or too narrow a type (try --dtype fp32)"
        )
    return scores.reshape(-1, 2)


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first; padded, a batch has at most `max_tokens` (a
    longer sequence, or any where that is 0, is one of its own)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
