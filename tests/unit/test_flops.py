"""Model FLOPs: counted by hand for a small Llama, and the table of peaks."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from strop.data.store import TokenisedRow, TokenStore
from strop.models import flops
from tests.unit.test_policy import SIZES, build

MATRICES = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
"""Two layers: q and o, k and v (two of four heads), gate, up and down."""
NORMS = 5 * 32


@pytest.fixture
def store(tmp_path):
    """Sequences of 2 and 6 tokens: the mean over tokens is (2*2 + 6*6) / 8 = 5."""
    sides = [(np.arange(n), np.arange(n) > 0) for n in (2, 6)]
    return TokenStore.write(
        tmp_path / "s", iter([TokenisedRow("a", 1, sides)]), kind="preference", digest="x"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token(store, tied):
    lm = build("llama", SIZES | {"tie_word_embeddings": tied})
    # The head is multiplied once either way; an embedding of its own is only looked up.
    expected = 6 * (MATRICES + NORMS + 120 * 32) + 6 * 2 * 32 * 5
    assert flops.per_token(lm, store) == expected


def test_peak_by_the_name_that_torch_gives(store):
    lm = build("llama", SIZES)
    cost = flops.per_token(lm, store)
    for name, tflops in (
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ):  # fmt: skip
        assert flops.peak_tokens_per_s(lm, store, name) == pytest.approx(tflops * 1e12 / cost)
    assert flops.peak_tokens_per_s(lm, store, "NVIDIA T4") is None
    assert flops.peak_tokens_per_s(lm, store, None) is None


def test_shared_prompts_count_as_the_model_has_them(store):
    lm = build("llama", SIZES)
    assert flops.per_token(lm, store.sharing_prompts()) == flops.per_token(lm, store)


def test_a_reward_model(store):
    """No logits: the matrices of the blocks and the head's 32 numbers; the embedding is only looked up."""
    config = AutoConfig.for_model("llama", **SIZES, num_labels=1)
    lm = AutoModelForSequenceClassification.from_config(config)
    assert flops.per_token(lm, store) == 6 * (MATRICES + NORMS + 32) + 6 * 2 * 32 * 5


def test_a_model_without_attention_has_no_figure(store):
    lm = build("mamba", {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8})
    assert flops.peak_tokens_per_s(lm, store, "NVIDIA H100") is None
