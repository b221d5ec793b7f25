"""A language model as what a loss needs: packed tokens in, per-token log-probs out.

tokens [T] of S sequences side by side -> hidden states [T, H] -> only the trained positions go through the
head, which gives log-probs without logits -> [T] again, 0 where nothing is trained. Two things differ
between architectures and are found out by a probe at load instead of believed: whether sequences can lie
side by side (else they are padded), and whether the head is a plain matrix with the scalings we know
(else the model's own logits are used).

A micro batch too large for its exponentials to be kept for the backward is taken in parts, where the loss
comes along: each part's gradient is formed as soon as its log-probs are there (`ops.linear_loss`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from strop import ops
from strop.data.batch import Batch
from strop.errors import Diverged, UserError, first_line
from strop.models import attention, fused, neftune, tied
from strop.models.lora import Adapters, LoraLinear

log = logging.getLogger(__name__)

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest mean difference in nats a token that rounding explains; a leak is tens of times that. Of a model
whose own log-probs are further off when a batch is only higher, `PER_NOISE` times that noise is allowed."""
PER_NOISE = 2
MOST_NOISE = 5
"""Times the tolerance."""

NUM_SHARED = 4
"""Tokens of the prompt in the probe of shared prompts."""


class Output(NamedTuple):
    """fp32 [T] each, 0 where nothing is trained. Only logp_T carries a gradient, or `loss` in its place."""

    logp_T: Tensor
    entropy_T: Tensor
    correct_T: Tensor
    mean_logit_T: Tensor
    loss: Optional[Tensor] = None
    """The sum of `PartLoss` over the batch, where it was taken in parts."""


@dataclass(frozen=True)
class PartLoss:
    """A loss that the forward may take in parts, to form its gradient where the logits are at hand."""

    of: Callable[[Output, Batch], Tensor]
    """(out, part) -> scalar, a sum over rows or tokens; `out` knows log-probs only, its statistics are NaN.
    Times all that the gradient will be multiplied with, or a 16-bit one might underflow."""
    row_edges: Optional[Sequence[int]]
    """`Batch.row_edges`, where parts must be of whole rows; None: a sum over tokens, parted anywhere."""

    def edges(self, num_trained: int) -> Sequence[int]:
        return range(num_trained + 1) if self.row_edges is None else self.row_edges

    def by_tokens(self, batch: Batch, index_N: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """(log-probs, which of the trained tokens) -> loss, as `ops.linear_loss` asks for it."""
        batch = batch.trained_only(index_N)

        def loss(logp_n: Tensor, tokens: slice) -> Tensor:
            rows = slice(0, len(batch.rows))
            if self.row_edges is not None:
                # Of rows without trained tokens, which have no gradient, it does not matter where they go.
                rows = slice(*(bisect_left(self.row_edges, edge) for edge in (tokens.start, tokens.stop)))
            unknown = torch.full_like(logp_n, torch.nan)
            return self.of(Output(logp_n, unknown, unknown, unknown), batch.part(tokens, rows))

        return loss


class Policy(nn.Module):
    """Wraps a causal LM. `layout` is "packed" or "padded", `head` is "fused" or "logits"."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        fused.install(lm)
        self.lm = lm
        text_config = lm.config.get_text_config()
        self.softcap: Optional[float] = getattr(text_config, "final_logit_softcapping", None)
        self.temperature = _head_temperature(text_config)
        self.head = "fused"
        self.layout = "padded"
        self.attention = attention.NAME
        """What packed sequences are given to on a GPU, of `attention.implementations`."""
        self.noise = 0.0
        """What the probe measured: the mean difference in nats that the height of a batch makes."""
        self.neftune_alpha: Optional[float] = None
        self.adapters: Optional[Adapters] = None

    def set_requires_gradient_sync(self, sync: bool) -> None:
        """fully_shard replaces it: whether the next backward reduces the gradient."""

    def set_reshard_after_backward(self, reshard: bool) -> None:
        """fully_shard replaces it: whether the next backward frees the gathered weights."""

    @property
    def draws_at_random(self) -> bool:
        """Whether training needs the keys of random draws in its batches (`draw_T`)."""
        return self.neftune_alpha is not None or (self.adapters is not None and self.adapters.dropout > 0)

    def set_layout(self, layout: str, device: torch.device) -> None:
        self.layout = layout
        if layout == "packed":
            name = self.attention if device.type == "cuda" else attention.NAME
        else:  # some have no attention at all; transformers 5.17 would take SDPA, which has no soft caps
            capped = getattr(self.lm.config.get_text_config(), "attn_logit_softcapping", None) is not None
            name = "sdpa" if self.lm._supports_sdpa and not capped else "eager"
        self.lm.set_attn_implementation(name)

    def forward(self, batch: Batch, loss: Optional[PartLoss] = None) -> Output:
        """Log-probs of the trained tokens; given a loss, and where that is quicker, its gradient as well."""
        index_N = batch.index_N
        target_N = batch.tokens_T[index_N]
        # The hidden state before a token predicts it. A sequence's first token is never trained.
        pick_N = batch.previous_T[index_N]
        apart = tied.apart(self.lm) if self.head == "fused" else contextlib.nullcontext()
        noise = neftune.noise(self.lm.get_input_embeddings(), batch, self.neftune_alpha, self.layout)
        with noise, apart as twin_of_weight:
            hidden_ND, logits_NV = self._hidden_or_logits(batch, pick_N)
        total = None
        if logits_NV is not None:
            logp_N, stats = ops.logprob(logits_NV, target_N)
        else:
            head = self.lm.get_output_embeddings()
            weight = head.weight if twin_of_weight is None else twin_of_weight
            scalings = (getattr(head, "bias", None), self.softcap, self.temperature)
            if isinstance(head, LoraLinear):
                draws_N = None if batch.draw_T is None else batch.draw_T[pick_N]
                hidden_ND, weight = head.beside(hidden_ND, draws_N)
                loss = None  # little of its weight's gradient is used
            edges = None if loss is None else loss.edges(len(index_N))
            if loss and edges and ops.one_pass_pays(hidden_ND, weight, edges, self.softcap):
                of_tokens = loss.by_tokens(batch, index_N)
                total, logp_N, stats = ops.linear_loss(
                    hidden_ND, weight, target_N, of_tokens, edges, *scalings
                )
            else:
                logp_N, stats = ops.linear_logprob(hidden_ND, weight, target_N, *scalings)
        logp_T, *stats_T = (self._spread(x, index_N, batch.tokens_T) for x in (logp_N, *stats))
        return Output(logp_T, *stats_T)._replace(loss=total)

    @staticmethod
    def _spread(x_N: Tensor, index_N: Tensor, like_T: Tensor) -> Tensor:
        return x_N.new_zeros(len(like_T)).scatter(0, index_N, x_N)

    def _hidden_or_logits(self, batch: Batch, pick_N: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        model = self.lm if self.head == "logits" else self.lm.base_model
        if self.layout == "packed":
            self._draw(None if batch.draw_T is None else batch.draw_T[None])
            out = model(
                input_ids=batch.tokens_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                cu_seq_lens_q=batch.cu_seqlens,
                cu_seq_lens_k=batch.cu_seqlens if batch.cu_keys is None else batch.cu_keys,
                max_length_q=batch.max_seqlen,
                max_length_k=batch.max_seqlen,
                **attention.settings(self.attention),
            )
        else:
            place_T, mask_SL = _padded_places(batch)
            tokens_SL = mask_SL.new_zeros(mask_SL.shape, dtype=torch.int64)
            tokens_SL.view(-1).scatter_(0, place_T, batch.tokens_T)
            positions_SL = torch.arange(tokens_SL.shape[1], device=tokens_SL.device).expand_as(tokens_SL)
            draws_SL = None
            if batch.draw_T is not None:
                draws_SL = mask_SL.new_zeros(mask_SL.shape, dtype=torch.int32)
                draws_SL.view(-1).scatter_(0, place_T, batch.draw_T)
            self._draw(draws_SL)
            kwargs = {"position_ids": positions_SL} if _takes(model, "position_ids") else {}
            out = model(input_ids=tokens_SL, attention_mask=mask_SL.long(), use_cache=False, **kwargs)
            pick_N = place_T[pick_N]
        x = out.logits if self.head == "logits" else out.last_hidden_state
        x = x.flatten(0, 1)[pick_N]
        return (x, x) if self.head == "logits" else (x, None)

    def _draw(self, draws: Optional[Tensor]) -> None:
        if self.adapters is not None:
            self.adapters.draw(draws)

    @torch.no_grad()
    def probe(self, device: torch.device, dtype: torch.dtype, wanted: str) -> None:
        """Choose head and layout by comparing them with each sequence run alone through the model's own
        logits. Collective: all ranks run the same forwards.

        Raises UserError if the model cannot be made to agree with itself, Diverged if it gives no numbers.
        """
        both = probe_batch(self.lm.config.get_text_config().vocab_size, device)
        self.head = "logits"
        self.set_layout("padded", device)
        truth = torch.cat([self._compared(one) for one in each_sequence(both)])
        if not truth.isfinite().all():
            raise Diverged(f"model.path: log-probs of {self.name} are not finite: its weights are damaged")

        own = self._compared(both)
        self.noise = difference(own, truth)
        if self.noise > MOST_NOISE * PROBE_TOLERANCE[dtype]:
            raise UserError(f"model.path: {self.name} gives other log-probs in a padded batch than alone")
        self.head = "fused"
        # of the same batch: the head alone makes the difference
        if difference(self._compared(both), own) > PROBE_TOLERANCE[dtype]:
            self.head = "logits"
            log.warning(
                "%s: the head is more than a matrix; its own logits are used (more memory)", self.name
            )
        self._choose_layout(
            device, dtype, wanted, lambda: difference(self._compared(both), truth) <= self._tolerance(dtype)
        )

    def _tolerance(self, dtype: torch.dtype) -> float:
        return max(PROBE_TOLERANCE[dtype], PER_NOISE * self.noise)

    def _compared(self, batch: Batch) -> Tensor:
        """What the probes compare: the log-probs of the trained tokens."""
        return self(batch).logp_T[batch.trained_T]

    def _choose_layout(
        self, device: torch.device, dtype: torch.dtype, wanted: str, agrees: Callable[[], bool]
    ) -> None:
        """packed, with the first attention for which `agrees` then still holds; it holds for padded. Raises
        UserError as `probe`."""
        if wanted == "padded" or not _takes(self.lm.base_model, "cu_seq_lens_q"):
            return
        for name in attention.implementations(device, dtype):
            self.attention = name
            reason = self._why_not_packed(device, agrees)
            if reason is None:
                return
            log.info("%s: %s is not used: %s", self.name, name, reason)
        if wanted == "packed":
            raise UserError(f"model.attention: packed does not work for {self.name}: {reason}")
        log.warning("%s: batches are padded, since packing does not work here: %s", self.name, reason)
        self.set_layout("padded", device)

    def _why_not_packed(self, device: torch.device, agrees: Callable[[], bool]) -> Optional[str]:
        """None where `agrees` holds with `self.attention`."""
        try:
            self.set_layout("packed", device)
            with attention.watch_windows():
                if not agrees():
                    return "sequences side by side see each other"
            attention.check_windows(self.attention)
        except attention.PackingUnsupported as error:
            return str(error)
        except (ImportError, RuntimeError, ValueError) as error:
            # Kernels of others, for which this GPU, model or head may be the wrong one; ours must run.
            if self.attention == attention.NAME:
                raise
            return first_line(error)
        return None

    @torch.no_grad()
    def shares_prompts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the model gives the same log-probs when the rejected sequence of a pair goes on from the
        chosen one's prompt. Collective. The kernels for GPUs would need keys of their own for it."""
        if self.layout != "packed" or self.attention != attention.NAME:
            return False
        apart, together = _probe_pair(self.lm.config.get_text_config().vocab_size, device)
        truth = torch.cat([self._compared(one) for one in each_sequence(apart)])
        return difference(self._compared(together), truth) <= self._tolerance(dtype)

    @property
    def name(self) -> str:
        return type(self.lm).__name__


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def _head_temperature(text_config: object) -> float:
    """What the logits are divided by: Granite's logits_scaling, or one over Cohere's logit_scale."""
    scale = getattr(text_config, "logit_scale", None)
    return float(getattr(text_config, "logits_scaling", None) or 1.0) / float(scale or 1.0)


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _padded_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """int64 [T]: where the tokens stand among S x L, padded on the right; and which of these are any, [S, L].
    Made of sums, since a mask looked through on a GPU would have to be waited for."""
    num_tokens, longest, device = len(batch.tokens_T), batch.max_seqlen, batch.tokens_T.device
    lengths_S = batch.cu_seqlens.diff().long()
    padding_S = torch.arange(len(lengths_S), device=device) * longest - batch.cu_seqlens[:-1]
    before_T = padding_S.repeat_interleave(lengths_S, output_size=num_tokens)
    mask_SL = torch.arange(longest, device=device)[None, :] < lengths_S[:, None]
    return torch.arange(num_tokens, device=device) + before_T, mask_SL


def probe_batch(vocab_size: int, device: torch.device) -> Batch:
    """Two sequences of 7 and 12 tokens; every token but the first is trained."""
    generator = torch.Generator().manual_seed(7)
    lengths = (7, 12)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(
        tokens_T=torch.randint(0, vocab_size, (sum(lengths),), generator=generator),
        positions_T=positions,
        cu_seqlens=torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        trained_T=positions > 0,
        rows=np.arange(2),
        max_seqlen=max(lengths),
    ).to(device)


def _probe_pair(vocab_size: int, device: torch.device) -> tuple[Batch, Batch]:
    """Two sequences that begin with the same NUM_SHARED untrained tokens: with these twice, and once."""
    apart = probe_batch(vocab_size, device)
    first, n = int(apart.cu_seqlens[1]), NUM_SHARED
    tokens_T, trained_T = apart.tokens_T.clone(), apart.positions_T >= n
    tokens_T[first : first + n] = tokens_T[:n]
    apart = dataclasses.replace(apart, tokens_T=tokens_T, trained_T=trained_T)
    kept_T = trained_T | (torch.arange(len(tokens_T), device=device) < n)
    together = dataclasses.replace(
        apart,
        tokens_T=tokens_T[kept_T],
        positions_T=apart.positions_T[kept_T],
        trained_T=trained_T[kept_T],
        cu_seqlens=apart.cu_seqlens - n * (apart.cu_seqlens > first).int(),
        cu_keys=apart.cu_seqlens,
    )
    return apart, together


def each_sequence(batch: Batch) -> list[Batch]:
    out = []
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:]):
        out.append(
            dataclasses.replace(
                batch,
                tokens_T=batch.tokens_T[start:end],
                positions_T=batch.positions_T[start:end],
                trained_T=batch.trained_T[start:end],
                cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32, device=batch.tokens_T.device),
                max_seqlen=end - start,
            )
        )
    return out
