"""linear_logprob of a weight in fp32 beside hidden states in bf16: the values of the rounded weight, bit for
bit, a gradient in fp32, and its memory where the forward kept exponentials.

The truth: the same engine given `weight.to(bfloat16)`, and fp64 of that for the gradient.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from strop import ops
from strop.ops import functional, head, registered, workspace
from tests.unit.ops_engines import ENGINES, FUSED, HEADS, example, options, plain_and_compiled, truth

BF16 = torch.bfloat16
FUSED_HERE = [name for name in ENGINES[BF16] if name in FUSED]


def mixture(num_tokens, hidden, vocab):
    """x in bf16, w in fp32 with ties of the rounding up and down, subnormal numbers and -0."""
    x, _, target = example(num_tokens, hidden, vocab, BF16)
    w = torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(vocab)) * 0.3
    odd = torch.tensor([0x3F808000, 0x3F818000, -0x407E8000, 0x00008000, 0x00000001, -0x80000000])
    first = w.view(-1)[: len(odd)]
    first.copy_(odd.int()[: len(first)].view(torch.float32))
    return x, w, target


def run(x, w, target, needs=(True, True, True), bias=None, **how):
    """Log-probs and statistics; the gradients of their weighted sum."""
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, bias), needs) if t is not None]
    logp, stats = ops.linear_logprob(*leaves[:2], target, *leaves[2:], **how)
    if any(needs):
        (logp * torch.linspace(-2, 3, len(x))).sum().backward()
    return [logp.detach(), *stats], [leaf.grad for leaf in leaves]


def error(grad, right):
    return float((grad.double() - right).norm() / right.norm().clamp_min(1e-30))


# N: none, one, just below and above a tile of 32 tokens. V: one word, no multiple of a panel of 12 or of the
# narrow chunk of 24, and beyond a segment of 3,072. H: less than a line of 32 elements, one and a rest.
@pytest.mark.parametrize("keep", ["all", "nothing", "frozen"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("engine", ENGINES[BF16])
def test_the_rounded_weight_bit_for_bit(use, engine, kind, keep):
    use(engine, keep)
    needs = (True, keep != "frozen", keep != "frozen")
    for num_tokens, hidden, vocab in [(0, 16, 5), (1, 2, 1), (31, 50, 13), (33, 16, 257), (5, 16, 3100)]:
        x, w, target = mixture(num_tokens, hidden, vocab)
        how = options(kind, vocab)
        values, grads = run(x, w, target, needs, **how)
        if (engine, keep) == ("chunked", "all"):
            # a weight in bf16 is multiplied as a whole here, by sums in another order
            assert all(torch.equal(a, b) for a, b in zip(values, run(x, w, target, [False] * 3, **how)[0]))
            use(engine, "nothing")
        right, right_grads = run(x, w.to(BF16), target, needs, **how)
        use(engine, keep)
        assert all(torch.equal(a, b) for a, b in zip(values, right)), (num_tokens, vocab)
        assert torch.equal(grads[0], right_grads[0])
        if keep == "frozen":
            assert grads[1] is None
            continue
        assert all(torch.equal(a, b) for a, b in zip(grads[2:], right_grads[2:]))
        assert grads[1].dtype == torch.float32
        # the same sums, which a weight in bf16 has rounded
        assert torch.equal(grads[1].to(BF16), right_grads[1])


@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("engine", FUSED_HERE)
def test_the_gradient_is_nearer_to_the_truth_than_one_in_bf16(use, engine, keep):
    use(engine, keep)
    x, w, target = mixture(96, 128, 2000)
    wide = [t.to(BF16).double().requires_grad_() for t in (x, w)]
    (truth(*wide, target)[0] * torch.linspace(-2, 3, 96).double()).sum().backward()
    own, in_bf16 = (error(run(x, given, target)[1][1], wide[1].grad) for given in (w, w.to(BF16)))
    assert own < 0.8 * in_bf16


def test_log_probs_alone_and_layouts(use):
    """Rows with gaps, and without any gradient."""
    for engine in ENGINES[BF16]:
        use(engine)
        x, w, target = mixture(20, 32, 90)
        gaps = torch.full((90, 50), torch.nan)
        gaps[:, 10:42] = w
        right = ops.linear_logprob(x, w.to(BF16), target)[0]
        assert torch.equal(ops.linear_logprob(x, gaps[:, 10:42], target)[0], right)


def test_a_turned_weight_goes_to_the_reference():
    x, w, target = mixture(20, 32, 90)
    values, grads = run(x, w.T.contiguous().T, target)
    right, right_grads = run(x, w.to(BF16).T.contiguous().T, target)
    assert all(torch.equal(a, b) for a, b in zip(values + grads[:1], right + right_grads[:1]))
    assert torch.equal(grads[1].to(BF16), right_grads[1])


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_threads_change_no_bit(use, engine):
    use(engine)
    x, w, target = mixture(300, 96, 7000)
    before, both = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            values, grads = run(x, w, target)
            both.append([*values, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*both))


@pytest.mark.parametrize("engine", [name for name in ENGINES[BF16] if name in (*FUSED, "chunked")])
@pytest.mark.parametrize("keep", ["all", "nothing", "frozen"])
def test_nowhere_is_there_a_copy_of_the_weight(use, engine, keep):
    use(engine, keep)
    x, w, target = mixture(40, 16, 300)
    with torch.profiler.profile(record_shapes=True) as profile:
        run(x, w, target, (True, keep != "frozen", False))
    copies = [list(e.input_shapes[0]) for e in profile.events() if e.name == "aten::_to_copy"]
    assert copies
    assert [300, 16] not in copies


# ---- the gradient's memory


@pytest.fixture
def shared(monkeypatch):
    """Small tensors have memory of the kind too; gives how often a gradient took what a head had kept."""
    monkeypatch.setattr(workspace, "_allocator_keeps_memory", lambda: False)
    monkeypatch.setattr(workspace, "GRAIN", 4096)
    workspace._idle.clear()
    taken = []

    def noted(kept, shape, dtype):
        x = over(kept, shape, dtype)
        taken.append(x is not None and x.data_ptr() <= kept.data_ptr() < x.data_ptr() + max(x.nbytes, 1))
        return x

    over = workspace.over
    monkeypatch.setattr(workspace, "over", noted)
    monkeypatch.setattr(workspace, "LEAST", 1)
    yield taken
    workspace._idle.clear()


def apart(monkeypatch, function):
    """Its result without memory that is shared."""
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "LEAST", 2**40)
        return function()


# A row of exponentials, 2 bytes for each of N tokens padded to 32, is shorter than one of the gradient of 4H
# bytes, as long, longer; the words kept are one segment of 3,072, two, all 7,000.
@pytest.mark.parametrize("words", [3072, 6144, 7000])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(5, 64), (64, 32), (70, 48), (200, 16), (33, 34)])
@pytest.mark.parametrize("engine", FUSED_HERE)
def test_the_gradient_lies_where_the_exponentials_were(
    use, shared, monkeypatch, engine, num_tokens, hidden, words
):
    use(engine)
    monkeypatch.setattr(head, "KEPT_BYTES", words * num_tokens * 2)
    x, w, target = mixture(num_tokens, hidden, 7000)
    assert head.words_kept(x, w, None) == words
    bias = torch.linspace(-1, 1, 7000)
    right, right_grads = apart(monkeypatch, lambda: run(x, w, target, bias=bias))
    assert shared == [False]
    values, grads = run(x, w, target, bias=bias)
    assert shared == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(values + grads, right + right_grads))
    padded = -num_tokens // 32 * -32
    piece = max(7000 * hidden * 4, words * padded * 2)
    del values, grads
    assert -piece // 4096 * -4096 in [len(memory) for memory in workspace._idle]


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_a_second_backward_computes_again_what_is_gone(use, shared, monkeypatch, engine):
    use(engine)
    x, w, target = mixture(70, 16, 3100)
    factors = torch.linspace(-2, 3, 70)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    loss = (ops.linear_logprob(*leaves, target)[0] * factors).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    before = [g.clone() for g in first]
    kept = run(x, w, target)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, kept))
    again = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    del first
    again.append((*torch.autograd.grad(loss, leaves[0], retain_graph=True), again[0][1]))
    again.append(torch.autograd.grad(loss, leaves))
    monkeypatch.setattr(head, "KEPT_BYTES", -1)
    right = run(x, w, target)[1]
    for grads in again:
        assert all(torch.equal(a, b) for a, b in zip(grads, right))
    assert not torch.equal(before[1], right[1])  # or this would not tell the two ways apart
    assert shared == [True, True]


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_graphs_that_are_alive_at_once_share_nothing(use, shared, engine):
    use(engine)
    examples = [mixture(num_tokens, 16, 1000) for num_tokens in (70, 5, 70)]
    right = [run(*given)[1] for given in examples]
    right = [[g.clone() for g in grads] for grads in right]
    leaves = [[t.clone().requires_grad_() for t in given[:2]] for given in examples]
    losses = [
        (ops.linear_logprob(*own, given[2])[0] * torch.linspace(-2, 3, len(own[0]))).sum()
        for own, given in zip(leaves, examples)
    ]
    for i in (1, 0, 2):
        losses[i].backward()
        del losses[i:i]
    for own, grads in zip(leaves, right):
        assert all(torch.equal(leaf.grad, g) for leaf, g in zip(own, grads))
    assert shared == [True] * 6


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_one_weight_sums_up_the_gradients_of_micro_batches(use, shared, engine):
    """The first one's stays where it is, and what the next head keeps lies elsewhere."""
    use(engine)
    x, w, target = mixture(70, 16, 1000)
    single = run(x, w, target)[1][1].clone()
    weight = w.clone().requires_grad_()
    for times in (1, 2, 3):
        logp, _ = ops.linear_logprob(x.clone().requires_grad_(), weight, target)
        (logp * torch.linspace(-2, 3, 70)).sum().backward()
        assert torch.equal(weight.grad, sum([single] * times))


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_a_copy_of_what_was_kept_is_read_where_it_is(use, shared, engine):
    """As hooks on saved tensors make one: the gradient has other memory."""
    use(engine)
    x, w, target = mixture(70, 16, 1000)
    right = run(x, w, target)[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        grads = run(x, w, target)[1]
    assert all(torch.equal(a, b) for a, b in zip(grads, right))
    assert shared == [True, False]


@pytest.mark.parametrize("engine", FUSED_HERE)
def test_the_operation_itself_shares_no_memory(use, shared, engine):
    """What torch.library and torch.compile see does not touch what it is given."""
    use(engine)
    x, w, target = mixture(70, 16, 1000)
    how = (x, w, target, None, None, 1.0)
    _, lse, _, _, _, kept, tops = torch.ops.strop.head(*how, head.ALL)
    assert kept.shape == (1000, 96)
    before, grad = kept.clone(), torch.linspace(-2, 3, 70)
    found = torch.ops.strop.head_backward(grad, *how, lse, kept, tops, [True, True, False])
    assert torch.equal(kept, before)
    assert not workspace.is_gone(kept)
    again = registered.head_gradients(grad, *how, lse, kept, tops, [True, True, False])
    assert workspace.is_gone(kept)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


def test_the_limit_is_the_weights_own_size(monkeypatch):
    """That of its gradient, as for a weight in bf16: the same words are kept."""
    monkeypatch.setattr(head, "engine", lambda hidden, weight: "fused")
    w = torch.empty(49152, 576, device="meta")
    for num_tokens in (3, 1152, 1352, 2304):
        x = torch.empty(num_tokens, 576, dtype=BF16)
        assert head.most_kept(x, w) == w.nbytes
        assert head.words_kept(x, w, None) == head.words_kept(x, w.to(BF16), None)


# ---- linear_loss, torch.compile, and what is refused


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("budget", [0, 200_000, 2**40])
@pytest.mark.parametrize("engine", ENGINES[BF16])
def test_linear_loss_in_parts(use, shared, monkeypatch, engine, budget, softcap):
    """Nothing kept, some groups at a time, all at once."""
    use(engine)
    monkeypatch.setattr(head, "KEPT_BYTES", budget)
    x, w, target = mixture(240, 32, 1000)
    bias, edges = torch.linspace(-1, 1, 1000), [0, 1, 1, 93, 94, 150, 240]
    parts = len(functional._row_chunks(edges, x, w, softcap))
    assert parts == len(functional._row_chunks(edges, x, w.to(BF16), softcap))
    assert parts == (3 if budget == 200_000 and head.words_kept(x[:1], w, softcap) else 1)

    def of_groups(logp, rows):
        inside = [e - rows.start for e in edges if rows.start <= e <= rows.stop]
        return sum((logp[a:b].sum() / 100).sin() for a, b in zip(inside[:-1], inside[1:]))

    found = []
    for given in (w, w.to(BF16)):
        leaves = [t.clone().requires_grad_() for t in (x, given, bias)]
        loss, logp, stats = ops.linear_loss(*leaves[:2], target, of_groups, edges, leaves[2], softcap)
        (3 * loss).backward()
        found.append([loss.detach(), logp, *stats, *(leaf.grad for leaf in leaves)])
    own, right = found
    of_weight, right_of_weight = own.pop(-2), right.pop(-2)
    for a, b in zip(own, right):
        assert torch.allclose(a, b, rtol=0.02, atol=0.05) if engine == "chunked" else torch.equal(a, b)
    assert of_weight.dtype == torch.float32
    assert error(of_weight, right_of_weight.double()) < 2**-8


@pytest.mark.parametrize("engine", ["own", "reference"])
def test_compile_finds_no_graph_break(monkeypatch, shared, engine):
    if engine == "reference":
        monkeypatch.setattr(head, "engine", lambda hidden, weight: "reference")
    x, w, target = mixture(40, 16, 90)

    def loss(x, w):
        logp, stats = ops.linear_logprob(x, w, target, None, None, 0.9)
        part = ops.linear_logprob(x, w.detach(), target, None, 5.0)[0]
        return (logp * part.detach()).sum() + part.sum() + 0 * stats.entropy.sum()

    results = plain_and_compiled(loss, x, w)
    assert results[1][2].dtype == torch.float32
    for a, b in zip(*results):
        assert torch.allclose(a.float(), b.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("keep", [head.NOTHING, head.ALL, head.FROZEN])
@pytest.mark.parametrize("engine", ["own", "reference"])
def test_opcheck(monkeypatch, shared, engine, keep):
    if engine == "reference":
        monkeypatch.setattr(head, "engine", lambda hidden, weight: "reference")
    x, w, target = mixture(6, 16, 50)
    x.requires_grad_(), w.requires_grad_(keep != head.FROZEN)
    torch.library.opcheck(torch.ops.strop.head, (x, w, target, None, None, 1.3, keep))
    with torch.no_grad():
        _, lse, *_, kept, tops = torch.ops.strop.head(x, w, target, None, None, 1.3, keep)
    if keep == head.ALL:
        has_kept = kept.numel() > 0
        given = (kept, tops) if has_kept else (None, None)
        arguments = (torch.rand(6), x.detach(), w.detach(), target, None, None, 1.3, lse, *given)
        torch.library.opcheck(torch.ops.strop.head_backward, (*arguments, [True, True, False]))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("of_hidden", "of_weight"), list(itertools.product(DTYPES, DTYPES)))
def test_any_other_mixture_is_refused_by_name(of_hidden, of_weight):
    x, w, target = (t.to(d) for t, d in zip(example(4, 16, 20), (of_hidden, of_weight, torch.int64)))
    ways = (
        lambda: ops.linear_logprob(x, w, target)[0],
        lambda: ops.linear_loss(x, w, target, lambda logp, rows: logp.sum())[1],
    )
    for way in ways:
        if of_hidden == of_weight or (of_weight == torch.float32 and of_hidden.itemsize == 2):
            right = truth(x.double(), w.to(of_hidden).double(), target)[0]
            assert torch.allclose(way().double(), right, atol=0.1 if of_hidden.itemsize == 2 else 1e-5)
        else:
            with pytest.raises(ValueError, match=f"hidden is {of_hidden} but weight is {of_weight}"):
                way()
