"""linear_logprob with a head that is sharded over two ranks, as FSDP2 shards it, beside the whole one."""

from __future__ import annotations

import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from strop import ops

RANKS, ROWS, HIDDEN, VOCAB = 2, 5, 16, 301
"""301 words: the shards are of unlike sizes."""


def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(RANKS * ROWS, HIDDEN, generator=generator)
    w = torch.randn(VOCAB, HIDDEN, generator=generator)
    return x, w, torch.randint(VOCAB, (RANKS * ROWS,), generator=generator)


def rank_main(rank: int, store: str, out: str) -> None:
    td.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    x, w, target = inputs()
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    weight = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    logp, _ = ops.linear_logprob(x[own], weight, target[own])
    (logp * torch.arange(1.0, ROWS + 1)).sum().backward()
    loss, *_ = ops.linear_loss(x[own], weight.detach().requires_grad_(), target[own], lambda l, rows: l.sum())
    torch.save((logp.detach(), weight.grad.full_tensor(), loss.detach()), f"{out}-{rank}")
    td.destroy_process_group()


def test_a_sharded_head_is_gathered_and_its_gradient_summed(tmp_path):
    mp.spawn(rank_main, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=RANKS)
    x, w, target = inputs()
    wide = w.double().requires_grad_()
    right = torch.log_softmax(x.double() @ wide.T, 1).gather(1, target[:, None])[:, 0]
    (right * torch.arange(1.0, ROWS + 1).repeat(RANKS)).sum().backward()
    for rank in range(RANKS):
        logp, grad, loss = torch.load(tmp_path / f"out-{rank}")
        own = right[rank * ROWS : (rank + 1) * ROWS].detach()
        assert torch.allclose(logp.double(), own, atol=1e-5)
        assert torch.allclose(grad.double(), wide.grad, atol=1e-5)
        assert torch.allclose(loss.double(), own.sum(), atol=1e-4)
