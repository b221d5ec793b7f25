"""The peers of bench/kernels.py, by a Python that has them: TRL's selective log-softmax, Liger's DPO loss.

    PYTHON bench/kernels_peers.py N H V ROUNDS OUT.json

Needs nothing of strop. Writes, by peer, the median seconds of its forward (TRL) or of forward and backward
(Liger), and of the naive way in the same rounds; or {"skipped": why}.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def timed(ways: dict[str, Any], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def trl(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, rounds: int) -> dict[str, Any]:
    from trl.trainer.utils import selective_log_softmax

    def naive() -> None:
        F.log_softmax((x @ weight.t()).float(), dim=-1).gather(1, target[:, None])

    with torch.no_grad():
        ways = {"forward": lambda: selective_log_softmax(x @ weight.t(), target), "naive forward": naive}
        return {"version": importlib.metadata.version("trl"), **timed(ways, rounds)}


def liger(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Its DPO loss over two halves of the rows, chosen and rejected, without a reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)
    pairs = target.view(2, -1)

    def run() -> None:
        own, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss(w, own.view(2, pairs.shape[1], -1), pairs)[0].backward()

    def naive() -> None:
        own, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        logp = F.log_softmax((own @ w.t()).float(), dim=-1).gather(1, target[:, None]).view(2, -1).sum(1)
        (-F.logsigmoid(0.1 * (logp[0] - logp[1]))).backward()

    ways = {"forward and backward": run, "naive forward and backward": naive}
    return {"version": importlib.metadata.version("liger-kernel"), **timed(ways, rounds)}


def main() -> None:
    num_tokens, hidden, vocab, rounds = (int(word) for word in sys.argv[1:5])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    weight = (torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5).bfloat16()
    target = torch.randint(vocab, (num_tokens,), generator=generator)
    out = {}
    for name, peer in (("trl", trl), ("liger", liger)):
        try:
            out[name] = peer(x, weight, target, rounds)
        except Exception as error:  # whatever keeps a peer from running here is its result
            out[name] = {"skipped": f"{type(error).__name__}: {error}"[:300]}
    Path(sys.argv[5]).write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main()
