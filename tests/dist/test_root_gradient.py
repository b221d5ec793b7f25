"""The gradient of the root (embedding, head) where the head's exponentials have been: one rank, and two."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from strop import parallel
from strop.config import TrainConfig
from strop.dist import Dist
from strop.models.policy import Policy
from strop.ops import head, workspace
from tests.unit.test_policy import SIZES, build, packed_batch

CPU = torch.device("cpu")
LARGE = SIZES | {"vocab_size": 140_000, "tie_word_embeddings": True}
"""17.1 MiB of gradient in fp32; from 32 tokens on the exponentials are larger than the least piece too."""


def gradients(policy, batch, scale=1.0):
    (policy(batch).logp_T.sum() * scale).backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def rank_main(rank: int, world_size: int, store: str) -> None:
    td.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    workspace._allocator_keeps_memory = lambda: True
    batch, other = (packed_batch((40, 70, 50), seed=seed) for seed in (3, 4))
    alone = Policy(build("llama", LARGE))
    alone.set_layout("packed", CPU)
    right = {name: g.clone() for name, g in gradients(alone, batch, world_size).items()}
    del alone
    policy = Policy(build("llama", LARGE))
    policy.set_layout("packed", CPU)
    dist = Dist(rank, world_size, CPU, mesh, td.group.WORLD)
    parallel.whole.install = lambda *_: False  # one rank too is to be fully_shard's
    parallel.shard(policy, TrainConfig(precision="fp32"), dist)
    places = []
    empty = workspace.empty

    def noted(shape, dtype, device, largest=False):
        x = empty(shape, dtype, device, largest)
        if largest and x.nbytes >= workspace.LEAST:
            places.append((x.data_ptr(), list(shape)))
        return x

    workspace.empty = noted
    policy.zero_grad()
    workspace._idle.clear()
    grads = gradients(policy, batch)
    kept, root = places
    assert kept[1][0] == head.words_kept(torch.empty(len(batch.index_N), 32), torch.empty(140_000, 32), None)
    assert root[1][0] >= 140_000 * 32
    assert root[0] == kept[0]
    for name, grad in grads.items():
        assert torch.allclose(grad.full_tensor(), right[name], rtol=1e-4, atol=1e-4), name
    weight = next(p for p in policy.parameters() if p.shape[0] == 140_000)
    if world_size == 1:
        assert weight.grad.to_local().untyped_storage().data_ptr() == root[0]
    # With the gradient still there, the next forward and backward have memory of their own, and add to it.
    before = {name: g.full_tensor().clone() for name, g in grads.items()}
    places.clear()
    gradients(policy, other)
    if world_size == 1:
        assert root[0] not in [place for place, _ in places[:1]]
    more = {name: p.grad.full_tensor() - before[name] for name, p in policy.named_parameters()}
    policy.zero_grad()
    again = gradients(policy, other)
    for name, grad in again.items():
        assert torch.allclose(grad.full_tensor(), more[name], rtol=1e-3, atol=1e-3), name
    td.barrier()
    os._exit(0)  # an interpreter that is taken down beside gloo's threads may abort


@pytest.mark.avx512
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_roots_gradient_takes_the_heads_place_and_is_never_overwritten(tmp_path, world_size):
    mp.spawn(rank_main, (world_size, str(tmp_path / "store")), nprocs=world_size)
