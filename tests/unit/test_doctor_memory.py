"""What the doctor counts itself: activations against autograd, memory and quotas by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from strop.doctor import examine, memory, model, schedule
from tests.unit.doctor_helpers import LLAMA

SHAPE = model.Shape(
    num_params=1_000_003,
    block_params=100_000,
    num_blocks=8,
    root_params=200_003,
    hidden=128,
    intermediate=512,
    kv_hidden=64,
    vocab_size=1000,
    max_positions=512,
    file_bytes=2_000_006,
)


def saved_bytes(config: LlamaConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """What autograd keeps for the backward, each storage once, without the weights."""
    net = LlamaForCausalLM(config).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.model(input_ids=torch.zeros((1, num_tokens), dtype=torch.int64), use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("dtype", "c"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_activations_are_what_autograd_keeps(dtype, c):
    """Four blocks more, without what is kept once; grouped heads, so that keys and queries differ."""
    config = LlamaConfig(
        **{**LLAMA, "hidden_size": 256, "intermediate_size": 704}, attn_implementation="sdpa"
    )
    few, many = (LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": n}) for n in (2, 6))
    measured = (saved_bytes(many, dtype, 64) - saved_bytes(few, dtype, 64)) / 4 / 64
    shape = replace(SHAPE, hidden=256, intermediate=704, kv_hidden=128, num_blocks=1)
    assert memory.activation_bytes(shape, c, "none") == pytest.approx(measured, rel=0.01)


def test_memory_by_hand():
    m = memory.estimate(
        SHAPE,
        num_ranks=2,
        micro_batch_tokens=100,
        precision="bf16",
        activation_checkpointing="full",
        gpu=False,
    )
    assert (m.weights, m.optimizer) == (4 * 500_002, 8 * 500_002)  # 1,000,003 / 2, rounded up
    assert m.gradients == 4 * 500_002 + 4 * 1_000_003  # small: kept whole over a step
    assert m.gathered == 2 * (200_003 + 2 * 100_000)
    one_block = 2 * (6 * 128 + 2 * 64 + 4 * 512) + 8 * 128
    assert m.activations == 100 * (8 * 2 * 128 + one_block)
    assert m.total == m.states + m.activations + m.head + m.framework
    large = replace(SHAPE, num_params=2**29 + 1)  # its fp32 gradient has more than 2 GiB
    m = memory.estimate(
        large,
        num_ranks=4,
        micro_batch_tokens=1,
        precision="fp32",
        activation_checkpointing="none",
        gpu=True,
    )
    assert m.gradients == 4 * (2**27 + 1) + 8 * 100_000
    assert memory.disk_bytes(SHAPE, keep_last=2, has_best=True) == 4 * 12 * 1_000_003


def test_memory_of_one_rank_by_hand():
    """On a CPU weights are used in place; in 16 bit a model with unknown matrices is left to fully_shard."""
    unknown = replace(SHAPE, is_known=False)
    options = {"num_ranks": 1, "micro_batch_tokens": 100, "activation_checkpointing": "full"}
    for shape, precision in ((SHAPE, "bf16"), (SHAPE, "fp32"), (unknown, "fp32")):
        m = memory.estimate(shape, precision=precision, gpu=False, **options)
        assert (m.gradients, m.gathered) == (4 * 1_000_003, 0)
    for shape, gpu in ((unknown, False), (SHAPE, True)):
        m = memory.estimate(shape, precision="bf16", gpu=gpu, **options)
        assert (m.gradients, m.gathered) == (8 * 1_000_003, 2 * (200_003 + 2 * 100_000))


def test_memory_with_adapters_by_hand():
    """Frozen weights in the compute type and nothing else; what is trained in fp32, with all that belongs to
    it. Here both together stay below 2 GiB on a rank."""
    adapted = replace(SHAPE, num_trained=50_001)
    options = {"micro_batch_tokens": 100, "activation_checkpointing": "full", "gpu": False}
    m = memory.estimate(adapted, num_ranks=2, precision="bf16", **options)
    assert (m.weights, m.optimizer) == (4 * 25_001 + 2 * 500_002, 8 * 25_001)
    assert m.gradients == 4 * 25_001 + 4 * 50_001
    assert m.host_staging == 12 * 25_001
    assert memory.disk_bytes(adapted, keep_last=2, has_best=False) == 3 * 12 * 50_001
    full = memory.estimate(SHAPE, num_ranks=2, precision="bf16", **options)
    assert (m.gathered, m.activations, m.head) == (full.gathered, full.activations, full.head)
    large = replace(SHAPE, num_params=2**30, num_trained=300_000)  # in bf16 alone 2 GiB
    m = memory.estimate(large, num_ranks=1, precision="bf16", **options)
    assert m.gradients == 4 * 300_000 + (2 + 4) * 100_000


def test_quota():
    text = (
        "Disk quotas for user me (uid 1000):\n     Filesystem  blocks   quota   limit   grace   files\n"
        "      /dev/sda1  1000*  900  1500  6days  10 0 0\n      nfs:/home  10  50  0  0  3 0 0\n"
    )
    assert schedule.parse_quota(text, "/dev/sda1") == 500 * 1024
    assert schedule.parse_quota(text, "nfs:/home") == 40 * 1024
    assert schedule.parse_quota(text, "/dev/sdb1") is None


def test_guess_algo(tmp_path):
    (tmp_path / "x.yaml").write_text("model: {}\nalgo: sft # as written by a run\n")
    assert examine.guess_algo(tmp_path / "x.yaml") == "sft"
    for name, algo in [("llama3.1-8b-dpo.yaml", "dpo"), ("sft.yaml", "sft"), ("adpo.yaml", None)]:
        assert examine.guess_algo(tmp_path / name) == algo
