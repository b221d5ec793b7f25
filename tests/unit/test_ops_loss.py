"""strop.ops.linear_loss, the loss and its gradient in one, against the same by autograd."""

from __future__ import annotations

import pytest
import torch

from strop import ops
from strop.ops import functional, head
from tests.unit.ops_engines import CASES, FUSED, example


@pytest.mark.parametrize(("dtype", "engine"), CASES)
@pytest.mark.parametrize("budget", [0, 200_000, 2**40])
def test_linear_loss_is_the_loss_of_all_groups(use, monkeypatch, dtype, engine, budget):
    """Nothing kept, some groups at a time, all at once: one loss, one gradient."""
    use(engine)
    monkeypatch.setattr(head, "KEPT_BYTES", budget)
    x, w, target = example(40, 32, 1000, dtype, scale=0.3)
    edges = [0, 1, 1, 13, 14, 40]  # a group of one row, an empty one

    def of_groups(logp, rows):
        inside = [e - rows.start for e in edges if rows.start <= e <= rows.stop]
        return sum((logp[a:b].sum() ** 2).sin() for a, b in zip(inside[:-1], inside[1:]))

    leaves = [(x.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    loss, logp, stats = ops.linear_loss(*leaves[0], target, of_groups, edges)
    expected_logp, expected_stats = ops.linear_logprob(*leaves[1], target)
    expected = of_groups(expected_logp, slice(0, 40))
    assert torch.allclose(loss, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        logp, expected_logp, atol=1e-5 if engine in FUSED or dtype == torch.float32 else 0.1
    )
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(*leaves):
        close = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < close

    for own, right in zip(stats, expected_stats):
        assert not own.requires_grad
        assert torch.allclose(own, right, atol=1e-4 if engine == "fused" or dtype == torch.float32 else 0.1)


def flops(function):
    """Of the matmuls that torch is asked for."""
    with torch.profiler.profile(with_flops=True) as profile:
        function()
    return sum(event.flops for event in profile.events() if event.name == "aten::mm")


def test_parts_read_the_logits_once(use, monkeypatch):
    """6NHV where the ordinary way takes 8; a group that does not fit is computed again: 2nHV more."""
    use("chunked")
    x, w, target = example(48, 32, 1000)
    leaves = [t.requires_grad_() for t in (x, w)]
    monkeypatch.setattr(head, "KEPT_BYTES", 16 * 1000 * 4)
    product = 2 * 48 * 32 * 1000

    def parted(groups):
        ops.linear_loss(*leaves, target, lambda logp, rows: logp.sum(), groups)[0].backward()

    assert flops(lambda: ops.linear_logprob(*leaves, target)[0].sum().backward()) == 4 * product
    assert flops(lambda: parted(range(49))) == 3 * product
    assert flops(lambda: parted([0, 16, 32, 48])) == 3 * product
    assert flops(lambda: parted([0, 24, 36, 48])) == 3.5 * product
    assert flops(lambda: parted([0, 24, 48])) == 4 * product


def test_rows_are_taken_in_as_few_parts_as_fit(monkeypatch):
    monkeypatch.setattr(head, "KEPT_BYTES", 10 * 100 * 4)
    w = torch.empty(100, 8)

    def parts(edges):
        rows = functional._row_chunks(edges, torch.empty(edges[-1], 8), w, None)
        return [(r.start, r.stop) for r in rows]

    assert parts(range(26)) == [(0, 10), (10, 20), (20, 25)]
    assert parts([0, 4, 9, 11, 20]) == [(0, 9), (9, 11), (11, 20)]
    # those that do not fit are one part as long as they follow each other, whatever lies empty between
    assert parts([0, 11, 22, 22, 34, 36, 50, 50]) == [(0, 34), (34, 36), (36, 50)]
    assert parts([0, 0]) == []
    monkeypatch.setattr(head, "KEPT_BYTES", -1)
    assert parts(range(26)) == [(0, 25)]


def test_a_factor_keeps_its_digits_in_16_bit():
    """The gradient is multiplied in its own type, but by the factor itself; and only once."""
    x, w, target = example(6, 32, 90, torch.bfloat16)
    w.requires_grad_()
    grads = []
    for factor in (1.0, 1 / 3):
        w.grad = None
        loss = ops.linear_loss(x, w, target, lambda logp, rows: logp.sum())[0] * factor
        loss.backward(retain_graph=True)
        grads.append(w.grad)
    assert torch.equal(grads[1], (grads[0].float() * torch.tensor(1 / 3)).bfloat16())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_loss_of_no_rows_and_bad_groups():
    x, w, target = example(0, 16, 50)
    x.requires_grad_(), w.requires_grad_()
    loss, logp, stats = ops.linear_loss(x, w, target, lambda logp, rows: logp.sum())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert {x.shape for x in (logp, *stats)} == {(0,)}
    assert not w.grad.any()
    for groups in ([], [0, 1], [1, 0], [0, 3, 2, 0]):
        with pytest.raises(ValueError, match="groups must rise from 0 to 0"):
            ops.linear_loss(x, w, target, lambda logp, rows: logp.sum(), groups)
