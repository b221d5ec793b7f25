"""Noise of NEFTune: size and draws, written out one number at a time; packing does not change a bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from strop.data.batch import Batch
from strop.data.draws import token_keys
from strop.models import lora, neftune


def word(x):
    """lowbias32 on Python's integers."""
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ x >> 15


def mixed(x):
    """SplitMix64's finaliser on Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def draw(seed, step, row, position, channel):
    """One number in (-1, 1), in exact arithmetic."""
    key = mixed(seed)
    for number in (step, row, position):
        key = mixed(key ^ (number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    bits = word(key >> 32 ^ word(channel ^ 0x4E454654))
    return ((bits >> 9) + 0.5) / 2**22 - 1


def batch(lengths, rows, seed=3, step=5):
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(
        tokens_T=torch.arange(sum(lengths)),
        positions_T=positions,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        trained_T=positions > 0,
        rows=np.array(rows),
        max_seqlen=max(lengths),
        draw_T=torch.from_numpy(token_keys(seed, step, np.repeat(rows, lengths), positions.numpy())),
    )


def noise_of(one, layout, hidden=6, alpha=5.0, dtype=torch.float32):
    """[T, H]: what is added to embeddings of zero."""
    embedding = torch.nn.Embedding(100, hidden, dtype=dtype)
    torch.nn.init.zeros_(embedding.weight)
    if layout == "packed":
        tokens = one.tokens_T[None]
        mask = torch.ones_like(tokens, dtype=torch.bool)
    else:
        mask = torch.arange(one.max_seqlen)[None] < one.cu_seqlens.diff()[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
    with neftune.noise(embedding, one, alpha, layout):
        out = embedding(tokens)
    assert torch.equal(embedding(tokens), torch.zeros_like(out))  # the hook is gone
    return out[mask].detach()


def test_each_number_by_hand():
    """Sequences of 1, 3 and 2 tokens; rows as large as a store may be."""
    lengths, rows, hidden = (1, 3, 2), (0, 2**31, 123456789012), 6
    for layout in ("packed", "padded"):
        found = noise_of(batch(lengths, rows), layout)
        expected = [
            [5 / math.sqrt(n * hidden) * draw(3, 5, row, p, h) for h in range(hidden)]
            for n, row in zip(lengths, rows)
            for p in range(n)
        ]
        assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_packing_changes_no_bit():
    lengths, rows = (4, 1, 7, 3), (9, 4, 0, 2)
    whole = batch(lengths, rows)
    together = noise_of(whole, "packed")
    assert torch.equal(noise_of(whole, "padded"), together)
    order = (2, 0, 3, 1)
    other = noise_of(batch([lengths[i] for i in order], [rows[i] for i in order]), "packed")
    parts = dict(zip(order, other.split([lengths[i] for i in order])))
    assert torch.equal(torch.cat([parts[i] for i in range(4)]), together)
    alone = [noise_of(batch([n], [row]), "packed") for n, row in zip(lengths, rows)]
    assert torch.equal(torch.cat(alone), together)


def test_steps_rows_and_seeds_differ():
    drawn = [
        noise_of(batch([5], [r], seed=s, step=k), "packed")
        for r, s, k in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 2), (0, 1, 22))
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a == b).float().mean() < 0.05


def test_the_draws_are_uniform_and_independent():
    """10^6 numbers: moments and histogram within 5 standard errors; neighbours do not go together."""
    keys = token_keys(0, 0, np.repeat(np.arange(10), 100), np.tile(np.arange(100), 10))
    u = neftune.uniform(torch.from_numpy(keys), 1000).double().view(10, 100, 1000)
    n = u.numel()
    assert u.abs().max() < 1
    assert abs(float(u.mean())) < 5 * math.sqrt(1 / 3 / n)
    assert abs(float(u.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    counts = torch.histc(u.flatten(), 64, -1, 1)
    chi2 = float(((counts - n / 64).square() / (n / 64)).sum())
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    for dim in range(3):
        a, b = u.narrow(dim, 0, u.shape[dim] - 1), u.narrow(dim, 1, u.shape[dim] - 1)
        assert abs(float((a * b).mean()) * 3) < 5 / math.sqrt(a.numel())


def test_noise_and_dropout_go_apart():
    """Of the same tokens, channel by channel and shifted against each other: the correlations of 10^6 numbers
    with the masks of LoRA's dropout lie within 5 standard errors."""
    keys = torch.from_numpy(token_keys(0, 0, np.repeat(np.arange(20), 50), np.tile(np.arange(50), 20)))
    u = neftune.uniform(keys, 1000).double() * math.sqrt(3)
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        dropped = (lora._mixed(keys[:, None] ^ lora._feature_keys(name, 1000)) < 0).double() * 2 - 1
        for rows, channels in ((0, 0), (1, 0), (0, 1), (0, 7)):
            together = (u * dropped.roll((rows, channels), (0, 1))).mean()
            assert abs(float(together)) < 5 / math.sqrt(u.numel())


def test_no_keys_or_no_alpha_no_noise():
    one = batch((3, 2), (0, 1))
    assert not noise_of(one, "packed", alpha=None).any()
    assert noise_of(one, "packed").any()
    assert not noise_of(Batch(**{**vars(one), "draw_T": None}), "packed").any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_has_the_type_of_the_embeddings(dtype):
    assert noise_of(batch((3,), (0,)), "packed", dtype=dtype).dtype == dtype
