"""The optimiser's step on shards against AdamW as its paper states it (Loshchilov and Hutter 2019, algorithm
2), in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from strop import optim

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def model_with_gradients(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    model = nn.Linear(5, 3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_three_steps(factor):
    model = model_with_gradients(0)
    config = SimpleNamespace(lr=1.0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer = optim.build(config, model)
    optim.materialise(optimizer)
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in exact.items()}
    second = {name: torch.zeros_like(p) for name, p in exact.items()}
    for t, lr in enumerate([0.1, 0.05, 0.01], start=1):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double() * factor
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g * g
            if p.ndim >= 2:
                exact[name] *= 1 - lr * DECAY
            root = second[name].sqrt() / math.sqrt(1 - BETAS[1] ** t) + EPS
            exact[name] -= lr * first[name] / (1 - BETAS[0] ** t) / root
        optim.step(optimizer, lr, factor)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.double(), exact[name], rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = model_with_gradients(1)
    optimizer = optim.build(SimpleNamespace(lr=1.0, betas=BETAS, eps=EPS, weight_decay=DECAY), model)
    optim.materialise(optimizer)
    before, model.bias.grad = model.bias.detach().clone(), None
    optim.step(optimizer, 0.1, 1.0)
    assert torch.equal(model.bias, before)
    assert float(optimizer.state[model.bias]["step"]) == 0
