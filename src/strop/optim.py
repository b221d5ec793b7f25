"""AdamW over sharded fp32 master weights, the learning rate as a function of the step, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from strop.config import OptimConfig
from strop.dist import Dist
from strop.errors import UserError


def build(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; `lr` is set by the loop before every step."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then the schedule down to
    lr * min_lr_ratio, which it would reach at step `max_steps`.

    wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at lr and decays in the last
    `decay_steps` by 1 - sqrt(share of them done), the best of the forms compared by Hägele et al. 2024
    (arXiv 2405.18392). Up to there it does not depend on `max_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max_steps - decay_steps(config, max_steps)
        if step < begin:
            return config.lr
    done = (step - begin) / max(1, max_steps - begin)
    if config.schedule == "wsd":
        left = 1 - math.sqrt(done)
    else:
        left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def decay_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps in which wsd decays: `optim.decay_steps`, or that share of all, one at least."""
    steps = config.decay_steps
    return int(steps) if steps >= 1 else max(1, round(steps * max_steps))


def check_schedule(config: OptimConfig, max_steps: int) -> None:
    """UserError where the phases of wsd do not fit into the run."""
    decay = decay_steps(config, max_steps)
    if config.schedule == "wsd" and config.warmup_steps + decay > max_steps:
        raise UserError(
            f"optim.decay_steps: {config.warmup_steps} steps of warm-up and {decay} of decay are more than "
            f"the run's {max_steps}"
        )


@torch.no_grad()
def step(optimizer: torch.optim.AdamW, lr: float, factor: float) -> None:
    """One update with the gradients times `factor`, by which the fused kernel divides as it reads them.

    Of this rank's shards: given DTensors, torch would find out anew in each step how the call is sharded."""
    device = optimizer.param_groups[0]["params"][0].device
    scale = None if factor == 1.0 else torch.full((), 1 / factor, device=device)
    for group in optimizer.param_groups:
        group["lr"] = lr
        params = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            [_local(p) for p in params],
            [_local(p.grad) for p in params],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def materialise(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state before its first step, so that a checkpoint has both moments at any time."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device if p.is_cuda else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """AdamW's own count, the same for all parameters, which corrects the bias of its moments."""
    for state in optimizer.state.values():
        state["step"].fill_(float(num_updates))


def local_grads(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's shards of the gradients."""
    return [_local(p.grad) for p in params if p.grad is not None]


def global_grad_norm(grads: list[Tensor], dist: Dist) -> float:
    """2-norm of the whole gradient. The squares are summed in fp64 on each rank, then over the ranks."""
    num_copies = dist.mesh.size() // dist.mesh.size(dist.mesh.ndim - 1)
    square = 0.0
    if grads:
        norms = torch.stack(torch._foreach_norm(grads, 2)).double()
        square = float(norms.square().sum())
    return math.sqrt(dist.sum([square / num_copies])[0])
