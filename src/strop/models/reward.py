"""A language model's backbone with a scalar head: packed tokens in, one score a sequence out.

tokens [T] of S sequences side by side -> hidden states [T, H], by `Policy`'s own packing, padding and shared
prompts -> only those at each sequence's last token (the end of the turn) meet the head, H numbers -> [S].
The model is transformers' sequence classifier with one label, so what is exported loads as one. It begins
from a causal language model, whose head is left behind and a new one drawn, or from another reward model,
head and all.

The head's product is taken in fp32: in bf16 scores near 3 would be 1/64 apart, and many pairs tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.utils import logging as hf_logging

from strop.config import ModelConfig
from strop.data.batch import Batch
from strop.errors import Diverged, UserError
from strop.models import hf
from strop.models.policy import (
    MOST_NOISE,
    PROBE_TOLERANCE,
    PartLoss,
    Policy,
    difference,
    each_sequence,
    probe_batch,
)

HEAD = "score.weight"
"""Name of the head's matrix [1, H] in transformers' sequence classifiers of causal models."""


class Scores(NamedTuple):
    score_S: Tensor
    """fp32 [S]."""
    hidden_SH: Tensor
    """fp32 [S, H]: the last hidden state at each sequence's last token."""
    loss: None = None
    """Nothing is taken in parts: the head is H numbers a sequence."""


class RewardModel(Policy):
    """Wraps a sequence classifier of one label. `head` is "score"; "logits" within the probe."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        self.head = "score"

    def forward(self, batch: Batch, loss: Optional[PartLoss] = None) -> Scores:  # type: ignore[override]
        if self.head == "logits":  # the model's own way, for one sequence
            own = self.lm(input_ids=batch.tokens_T[None], use_cache=False).logits[0].float()
            return Scores(own, own.new_zeros(1, 0))
        hidden_SH, _ = self._hidden_or_logits(batch, batch.cu_seqlens[1:].long() - 1)
        head: Any = self.lm.score
        weight_H = head.weight[0].to(hidden_SH.dtype).float()  # rounded, as the model's own head does it
        hidden_SH = hidden_SH.float()
        # No view of a larger result: FSDP warns of what could be done to one in place.
        return Scores(torch.mv(hidden_SH, weight_H), hidden_SH)

    @torch.no_grad()
    def probe(self, device: torch.device, dtype: torch.dtype, wanted: str) -> None:
        """See that scores are those of the model's own forward, then choose the layout. Collective.

        Raises UserError if they are not, Diverged if they are no numbers.
        """
        both = probe_batch(self.lm.config.get_text_config().vocab_size, device)
        self.head = "logits"
        self.set_layout("padded", device)
        own_S = torch.cat([self(one).score_S for one in each_sequence(both)])
        self.head = "score"
        if not own_S.isfinite().all():
            raise Diverged(f"model.path: scores of {self.name} are not finite: its weights are damaged")
        ours_S = torch.cat([self(one).score_S for one in each_sequence(both)])
        if not torch.allclose(ours_S, own_S, rtol=PROBE_TOLERANCE[dtype], atol=PROBE_TOLERANCE[dtype]):
            raise UserError(
                f"model.path: {self.name} does not score a sequence by its last token and a matrix"
            )
        truth = torch.cat([self._compared(one) for one in each_sequence(both)])
        self.noise = difference(self._compared(both), truth)
        if self.noise > MOST_NOISE * PROBE_TOLERANCE[dtype]:
            raise UserError(f"model.path: {self.name} gives other scores in a padded batch than alone")
        self._choose_layout(
            device, dtype, wanted, lambda: difference(self._compared(both), truth) <= self._tolerance(dtype)
        )

    def _compared(self, batch: Batch) -> Tensor:
        """What the head is multiplied with, to a mean square of 1: a small head would hide every leak."""
        hidden_SH = self(batch).hidden_SH
        return (hidden_SH / hidden_SH.square().mean(dim=1, keepdim=True).sqrt()).flatten()


def check_class(hf_config: PreTrainedConfig, path: Optional[str]) -> None:
    """UserError naming the class that transformers would need for a reward model of this architecture."""
    remote = "AutoModelForSequenceClassification" in (getattr(hf_config, "auto_map", None) or {})
    if not remote and type(hf_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        wanted = type(hf_config).__name__.removesuffix("Config") + "ForSequenceClassification"
        raise UserError(
            f"model.path: {path!r} cannot become a reward model: transformers has no {wanted} (model_type "
            f"{hf_config.model_type})"
        )
    if hf.is_classifier(hf_config) and hf_config.num_labels != 1:
        raise UserError(
            f"model.path: {path!r} sorts into {hf_config.num_labels} classes; a reward model has one"
        )


def scoring_config(hf_config: PreTrainedConfig, path: Optional[str]) -> PreTrainedConfig:
    """The same configuration with one label. Pad ids play no part until the export: without one,
    transformers scores the last token of a single sequence. Raises UserError as `check_class`."""
    check_class(hf_config, path)
    hf_config.num_labels = 1
    hf_config.problem_type = "regression"  # a score is not to be put through a sigmoid
    hf_config.get_text_config().pad_token_id = None
    return hf_config


def build_empty(config: ModelConfig) -> PreTrainedModel:
    """The sequence classifier with untouched weights (see `hf.untouched`). Raises UserError."""
    hf_config = scoring_config(hf.read_config(config), config.path)
    return checked_head(hf.untouched(AutoModelForSequenceClassification, hf_config, config))


def checked_head(model: PreTrainedModel) -> PreTrainedModel:
    """UserError if the head is not one row of a matrix: encoders have deeper ones, over their first token."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise UserError(
            f"model.path: the head of {type(model).__name__} is not a matrix named score: not a causal model"
        )
    return model


def reader(seed: int) -> hf.Reader:
    """What reads the weights of a reward model that begins from any checkpoint; a head that it lacks is
    drawn from `seed`, the same on any number of ranks."""

    def read(config: ModelConfig, path: Optional[str]) -> dict[str, Tensor]:
        hf_config = hf.read_config(config)
        may_lack = () if hf.is_classifier(hf_config) else (HEAD,)
        state = _quietly(
            lambda: hf.read_weights(config, path, AutoModelForSequenceClassification, may_lack, num_labels=1)
        )
        if HEAD not in state:
            state[HEAD] = new_head(hf_config.get_text_config().hidden_size, seed)
        return state

    return read


def new_head(hidden_size: int, seed: int) -> Tensor:
    """fp32 [1, H], normal with standard deviation 1 / sqrt(H + 1) (Stiennon et al. 2020, "Learning to
    summarize from human feedback"): scores of any model begin at about the size of its hidden states."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def _quietly(read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Without transformers' table of what it did not find: we look for ourselves."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        return read()
    finally:
        hf_logging.set_verbosity(level)


def set_pad_token(hf_config: PreTrainedConfig, tokenizer: Any) -> None:
    """Give an exported reward model and its tokenizer one pad token that no sequence ends with.

    transformers scores the last token that is not the pad token. Where that is the end-of-turn token, as
    often, a padded batch would be scored one token too early. UserError if no token is free for it.
    """
    ends = _last_tokens(tokenizer)
    special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [tokenizer.pad_token, *(t for t in special if "pad" in t.lower()), tokenizer.unk_token]
    named += [*(t for t in special if "reserved" in t.lower()), tokenizer.bos_token, *special]
    for token in filter(None, named):
        if (id := tokenizer.convert_tokens_to_ids(str(token))) not in ends:
            tokenizer.pad_token = str(token)
            hf_config.get_text_config().pad_token_id = hf_config.pad_token_id = id
            return
    raise UserError(
        "model.tokenizer has no special token to pad with beside those that a sequence ends with: add one"
    )


def _last_tokens(tokenizer: Any) -> set[int]:
    """Ids that rows of text (EOS) and of messages end with."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ends.add(tokenizer(text, add_special_tokens=False)["input_ids"][-1])
    return ends
