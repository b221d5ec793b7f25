"""strop.ops against fp64 formulas written out, in every engine that this machine has.

The engines: "fused" and "chunked" native kernels, "amx" (fused, with AMX's tiles emulated), "wide" (chunked
with fp32 logits of 16-bit matrices, as on a GPU; here an fp32 matmul stands for its matmul), and "reference";
all must agree with the same truth.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop import ops
from strop.ops import functional, head, native, reference
from strop.ops.head_products import Products
from tests import amx

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "softcap": 2.0, "temperature": 0.7},
    "temperature": {"temperature": 8.0},
}
ENGINES = {
    torch.float32: ["reference", "chunked"],
    torch.bfloat16: ["reference", "chunked", "wide"],
}
for _dtype, _names in ENGINES.items():
    if native.head_kernel(_dtype):
        _names.append("fused")
if native.head_kernel(torch.bfloat16):
    ENGINES[torch.bfloat16].append("amx")
FUSED = ("fused", "amx")
CASES = [(dtype, name) for dtype, names in ENGINES.items() for name in names]


@pytest.fixture
def use(monkeypatch):
    """use(engine, keep): from now on linear_logprob computes like that, in the narrowest chunks."""

    def choose(engine, keep="all"):
        if engine == "wide":
            monkeypatch.setattr(head, "_is_wide", lambda hidden: True)
            monkeypatch.setattr(head, "_multiply", lambda hidden, words: hidden.float() @ words.float().t())
        if engine == "amx":
            monkeypatch.setattr(native, "library", lambda device: amx.emulated())
        name = {"wide": "chunked", "amx": "fused"}.get(engine, engine)
        monkeypatch.setattr(head, "engine", lambda hidden, weight: name)
        monkeypatch.setattr(head, "KEPT_BYTES", 2**40 if keep == "all" else -1)
        monkeypatch.setattr(head, "CPU_WORDS", 24)
        monkeypatch.setattr(reference, "CHUNK_BYTES", 1024)

    return choose


def test_this_machines_library_is_built():
    """Without it the tests below would try the reference alone."""
    assert native.library("cpu") is not None, "python -m tools.build_kernels"


def example(num_tokens, hidden, vocab, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens + 7 * vocab)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    w = (torch.randn(vocab, hidden, generator=generator) * scale).to(dtype)
    target = torch.randint(vocab, (num_tokens,), generator=generator)
    return x, w, target


def truth(x, w, target, bias=None, softcap=None, temperature=1.0):
    """fp64 (log-probs with gradient, entropy, correct, mean logit)."""
    z = x @ w.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    logp = torch.log_softmax(z, dim=1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, target[:, None])[:, 0], entropy, (z.argmax(1) == target).double(), z.mean(1)


def options(kind, vocab):
    given = dict(HEADS[kind])
    if given.pop("bias", False):
        given["bias"] = torch.linspace(-1, 1, vocab)
    return given


# N: none, one, just below, at and above a tile of 32 tokens.
# V: one word, around a panel of 12, around the narrow chunk of 24, and beyond a segment of 3072.
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("engine", ENGINES[torch.float32])
def test_linear_logprob_and_its_gradient(use, engine, kind, keep):
    use(engine, keep)
    for num_tokens, vocab in [(0, 5), (1, 1), (1, 25), (31, 11), (32, 12), (33, 13), (13, 257), (5, 3100)]:
        x, w, target = example(num_tokens, 16, vocab)
        given = options(kind, vocab)
        bias = given.pop("bias", None)
        own = [v.clone().requires_grad_() if v is not None else None for v in (x, w, bias)]
        wide = [v.double().requires_grad_() if v is not None else None for v in (x, w, bias)]
        logp, stats = ops.linear_logprob(own[0], own[1], target, own[2], **given)
        expected, *expected_stats = truth(wide[0], wide[1], target, wide[2], **given)
        assert logp.dtype == torch.float32
        assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-5), (num_tokens, vocab)
        for value, right in zip(stats, expected_stats):
            assert torch.allclose(value.double(), right, rtol=1e-5, atol=2e-5), (num_tokens, vocab)
            assert not value.requires_grad
        coefficients = torch.linspace(-2, 3, num_tokens)
        (logp * coefficients).sum().backward()
        (expected * coefficients.double()).sum().backward()
        for a, b in zip(own, wide):
            if a is not None:
                assert torch.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=2e-5), (num_tokens, vocab)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("engine", ENGINES[torch.float32])
def test_a_frozen_head_gives_the_same_gradient_of_the_hidden_states(use, engine, kind):
    """LoRA: u = (e_y - p) W is formed in the forward, and no gradient of the weight."""
    use(engine)
    for num_tokens, vocab in [(0, 5), (1, 1), (5, 300)]:
        x, w, target = example(num_tokens, 16, vocab)
        given = options(kind, vocab)
        own, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        coefficients = torch.linspace(-2, 3, num_tokens)
        (ops.linear_logprob(own, w, target, **given)[0] * coefficients).sum().backward()
        bias = given.pop("bias", None)
        bias = None if bias is None else bias.double()
        (truth(wide, w.double(), target, bias, **given)[0] * coefficients.double()).sum().backward()
        assert torch.allclose(own.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
        assert w.grad is None
        weight = w.clone().requires_grad_()
        ops.linear_logprob(x, weight, target)[0].sum().backward()  # frozen the other way round
        assert weight.grad.shape == w.shape


@pytest.mark.parametrize(("dtype", "engine"), [*CASES, (torch.float16, "reference")])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_linear_logprob_is_never_above_0(use, dtype, engine, scale):
    """Large logits whose target dominates: where an exact numerator would stand above a rounded sum."""
    use(engine)
    x, w, _ = example(64, 64, 1000, dtype, scale)
    target = (x.float() @ w.float().T).argmax(1)  # certain tokens are where it happens
    logp, stats = ops.linear_logprob(x, w, target)
    assert float(logp.max()) <= 0.0
    assert float(stats.entropy.min()) > -1e-3
    rounded = truth(x.double(), w.double(), target)[0]
    # A logit of size z is rounded by z / 2^8 (bf16) unless it is fp32: two of them stand in a log-prob.
    largest = float((x.double() @ w.double().T).abs().max())
    unrounded = engine in (*FUSED, "wide") or dtype == torch.float32
    band = 2e-6 * (1 + largest) if unrounded else 2 * largest / 2**8
    assert torch.allclose(logp.double(), rounded, rtol=0, atol=band)


@pytest.mark.parametrize("engine", [name for name in ENGINES[torch.bfloat16] if name in (*FUSED, "wide")])
@pytest.mark.parametrize("keep", ["all", "nothing"])
def test_bf16_log_probs_err_by_less_than_a_thousandth(use, engine, keep):
    """Of a nat, and the sum over 1,024 tokens by less than a hundredth: logits up to 20 and more."""
    use(engine, keep)
    x, w, target = example(1024, 64, 3100, torch.bfloat16, scale=0.6)
    logp, _ = ops.linear_logprob(x, w.requires_grad_(), target)
    error = (logp.double() - truth(x.double(), w.double(), target)[0]).detach()
    assert float(error.abs().max()) <= 1e-3
    assert float(error.sum().abs()) <= 1e-2


# H: below, at and above the columns of a tile (32), and no multiple of a panel (12). Words: below and above
# what is summed in registers (1,024; 480 by AMX), an odd number among them. N: one, odd, more than a work
# item (128).
@pytest.mark.parametrize("engine", [name for name in ENGINES[torch.bfloat16] if name in (*FUSED, "chunked")])
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "vocab"), [(1, 2, 1), (33, 30, 13), (161, 34, 1037), (7, 96, 3100)]
)
def test_the_products_of_the_backward(use, monkeypatch, engine, num_tokens, hidden, vocab):
    """Given the gradient by the logits, against the same products in fp64: only the results are rounded."""
    use(engine)
    monkeypatch.setattr(head, "CPU_WORDS", native.SEGMENT)
    x, w, _ = example(num_tokens, hidden, vocab, torch.bfloat16)
    padded = -num_tokens // head.TILE * -head.TILE
    d_words = torch.zeros(vocab, padded, dtype=torch.bfloat16)
    d_words[:, :num_tokens] = torch.randn(vocab, num_tokens, generator=torch.Generator().manual_seed(1))
    fused = head.engine(x, w) == "fused"
    products = Products(x, w, True, True, fused, head.chunk_words(x, vocab))
    for start, end in head.chunks(x, vocab):
        products.add(d_words[start:end, :num_tokens], start)
    wide = d_words[:, :num_tokens].double()
    for found, right, rounding in (
        (products.by_hidden(), wide.T @ w.double(), 1e-5 if products.own else 2**-7),
        (products.by_weight, wide @ x.double(), 2**-8),
    ):
        scale = right.abs().max()
        assert float((found.double() - right).abs().max() / scale) <= rounding
    before = products.by_hidden().double()
    products.shrink(torch.full((num_tokens,), 0.5))
    assert torch.allclose(products.by_hidden().double(), 0.5 * before)


@pytest.mark.parametrize("engine", ENGINES[torch.bfloat16])
@pytest.mark.parametrize("keep", ["all", "nothing", "frozen"])
def test_bf16_gradients_err_at_most_twice_as_much_as_plain_ones(use, engine, keep):
    use(engine, keep)
    x, w, target = example(96, 128, 2000, torch.bfloat16, scale=0.2)
    leaves = {}
    for name, dtype in (("own", torch.bfloat16), ("plain", torch.bfloat16), ("right", torch.float64)):
        leaves[name] = (
            x.clone().to(dtype).requires_grad_(),
            w.clone().to(dtype).requires_grad_(keep != "frozen"),
        )
    ops.linear_logprob(*leaves["own"], target)[0].sum().backward()
    for name in ("plain", "right"):
        z = leaves[name][0] @ leaves[name][1].T
        z = z.float() if name == "plain" else z
        torch.log_softmax(z, 1).gather(1, target[:, None]).sum().backward()
    for i in (0, 1) if keep != "frozen" else (0,):
        right = leaves["right"][i].grad
        error = {
            name: float((leaves[name][i].grad - right).norm() / right.norm()) for name in ("own", "plain")
        }
        assert error["own"] <= 2 * error["plain"]


@pytest.mark.parametrize("engine", ENGINES[torch.float32])
def test_linear_logprob_of_huge_logits_is_finite(use, engine):
    use(engine)
    x, w, target = example(4, 16, 600, scale=1e4)
    logp, stats = ops.linear_logprob(x, w, target)
    expected = truth(x.double(), w.double(), target)
    assert torch.allclose(logp.double(), expected[0], rtol=1e-5)
    assert torch.allclose(stats.entropy.double(), expected[1], atol=2e-2)


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_damaged_weights_give_nan_not_a_number(use, dtype, engine):
    """A run whose weights are damaged must be seen as diverged."""
    use(engine)
    for bad in (torch.nan, torch.inf):
        x, w, target = example(40, 16, 100, dtype)
        w[57, 3] = bad
        target[target == 57] = 0
        logp = ops.linear_logprob(x, w, target)[0]
        # infinity times a negative number is a word that never comes
        expected = torch.ones(40, dtype=torch.bool) if bad != bad else x[:, 3] > 0
        assert logp.isnan().tolist() == expected.tolist()


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_the_same_bits_on_repeat(use, dtype, engine):
    use(engine)

    def run():
        x, w, target = example(70, 64, 4000, dtype)
        x.requires_grad_(), w.requires_grad_()
        logp, stats = ops.linear_logprob(x, w, target)
        (logp * torch.linspace(-1, 1, 70)).sum().backward()
        return [logp, *stats, x.grad, w.grad]

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "engine"), [case for case in CASES if case[1] in FUSED])
def test_a_row_knows_nothing_of_its_neighbours_or_of_threads(use, dtype, engine):
    """The fused kernel's promise: the same bits alone, in another place, and with one thread."""
    use(engine)
    x, w, target = example(300, 96, 7000, dtype)
    logp, stats = ops.linear_logprob(x, w, target)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again, more = ops.linear_logprob(x[order], w, target[order])
        alone = ops.linear_logprob(x[7:8], w, target[7:8])[0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again, logp[order])
    assert torch.equal(alone, logp[7:8])
    for a, b in zip(more, stats):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize(("dtype", "engine"), CASES)
def test_layouts(use, dtype, engine):
    """Rows with gaps between them, and every second row, are the values that they are."""
    use(engine)
    x, w, target = example(20, 32, 90, dtype)
    expected = ops.linear_logprob(x, w, target)[0]
    wide = torch.zeros(90, 50, dtype=dtype)
    wide[:, 10:42] = w
    twice = x.repeat_interleave(2, 0)
    spread = target.repeat_interleave(2)
    got = ops.linear_logprob(twice[::2], wide[:, 10:42], spread[::2])[0]
    assert torch.equal(got, expected)


def test_a_transposed_weight_goes_to_the_reference(caplog):
    x, w, target = example(5, 32, 90)
    native._note.cache_clear()
    logp = ops.linear_logprob(x, w.T.contiguous().T, target)[0]
    ops.linear_logprob(x, w.T.contiguous().T, target)
    assert torch.allclose(logp.double(), truth(x.double(), w.double(), target)[0], atol=1e-5)
    lines = [r.message for r in caplog.records]
    assert lines == ["linear_logprob: the weight's rows are not contiguous, the reference is used"]


@pytest.mark.parametrize("num_tokens", [1, 5, 4096, 10**7])
def test_chunks_cover_the_vocabulary_once(num_tokens):
    rows = torch.empty(1, 1).expand(num_tokens, 1)
    for vocab in (1, 255, 256, 257, 128256):
        for chunks in (reference._chunks(num_tokens, vocab), head.chunks(rows, vocab)):
            assert [start for start, _ in chunks] == [0, *[end for _, end in chunks[:-1]]]
            assert chunks[-1][1] == vocab
            assert all(start < end for start, end in chunks)
        assert all(start % native.PANEL == 0 for start, _ in chunks)


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


def test_bad_arguments_are_named():
    x, w, target = example(3, 16, 50)
    meta = torch.empty(50, 16, device="meta")
    for bad, message in (
        ((x[0], w, target), r"hidden \(16,\) and weight \(50, 16\) must be \[N,H\] and \[V,H\]"),
        ((x, w[:, :8], target), r"hidden \(3, 16\) and weight \(50, 8\) must be"),
        ((x, w[:0], target), r"weight \(0, 16\) has no words"),
        ((x, w, target[:2]), r"target \(2,\) must be \[3\]"),
        ((x, w, target.int()), "target must be torch.int64, not torch.int32"),
        ((x.double(), w, target), "hidden is torch.float64 but weight is torch.float32"),
        ((x.long(), w.long(), target), "must be floating-point, not torch.int64"),
        ((x, meta, target), "all tensors must be on one device: hidden on cpu, weight on meta"),
        ((x, w, target, torch.zeros(49)), r"bias \(49,\) of torch.float32 must be floating-point \[50\]"),
        ((x, w, target - 50), r"targets must be in \[0, 50\), not -"),
        ((x, w, target + 50), r"targets must be in \[0, 50\), not "),
        ((x, w, target, None, 0.0), "softcap must be above 0, not 0"),
        ((x, w, target, None, None, 0.0), "temperature must be above 0, not 0"),
        ((x, w, target, None, None, float("nan")), "temperature must be above 0, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_logprob(*bad)
    with pytest.raises(ValueError, match=r"logits \(3,\) must be \[N,V\]"):
        ops.logprob(torch.zeros(3), target)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 2\)"):
        ops.logprob(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"x must be \[T\], not \(2, 2\)"):
        ops.segment_sum(torch.zeros(2, 2), torch.tensor([0, 2]))
    for edges in ([0, 2], [1, 3], [0, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 3, not"):
            ops.segment_sum(torch.zeros(3), torch.tensor(edges))
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        ops.segment_sum(torch.zeros(3), torch.tensor([0, 2, 1, 3]))
    for edges in (torch.zeros(0, dtype=torch.int32), torch.tensor([0.0, 3.0])):
        with pytest.raises(ValueError, match="cu_seqlens must be integers"):
            ops.segment_sum(torch.zeros(3), edges)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_of_given_logits(monkeypatch, backend, dtype):
    """V: one column, and around the block of 512 that a kernel works on."""
    if backend == "reference":
        monkeypatch.setattr(native, "takes", lambda x, what: False)
    for num_tokens, vocab in [(0, 7), (1, 1), (9, 77), (3, 511), (3, 512), (4, 1300)]:
        x, w, target = example(num_tokens, 16, vocab)
        logits = (x @ w.T).to(dtype).requires_grad_()
        wide = logits.detach().double().requires_grad_()
        logp, stats = ops.logprob(logits, target)
        right = torch.log_softmax(wide, 1)
        expected = right.gather(1, target[:, None])[:, 0]
        assert not (logp > 0).any()
        assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(stats.entropy.double(), -(right.exp() * right).sum(1), rtol=1e-5, atol=1e-5)
        assert torch.allclose(stats.mean_logit.double(), wide.mean(1), atol=1e-5)
        highest = wide.gather(1, target[:, None])[:, 0] >= wide.amax(1)  # in bf16 there are ties
        if dtype == torch.float32 or backend == "native":
            assert stats.correct.tolist() == highest.double().tolist()
        coefficients = torch.linspace(-1, 1, num_tokens)
        (logp * coefficients).sum().backward()
        (expected * coefficients).sum().backward()
        assert torch.allclose(logits.grad.double(), wide.grad, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_logprob_of_columns_that_are_not_contiguous():
    x, w, target = example(9, 16, 77)
    logits = (w @ x.T).T
    expected = torch.log_softmax(logits.double(), 1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ops.logprob(logits, target)[0].double(), expected, atol=1e-5)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_segment_sum(lengths):
    """Empty segments too; each element's gradient is what comes from above to its sum."""
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.arange(sum(lengths), dtype=torch.float32).mul(0.37).requires_grad_()
    sums = ops.segment_sum(x, edges)
    parts = [x.detach()[a:b].double().sum() for a, b in zip(edges[:-1], edges[1:])]
    assert torch.allclose(sums.double(), torch.stack(parts), rtol=1e-6)
    assert torch.allclose(reference.segment_sum(x.detach(), edges), sums, rtol=1e-6)
    above = torch.arange(1.0, len(lengths) + 1)
    sums.backward(above)
    assert x.grad.tolist() == above.repeat_interleave(torch.tensor(lengths)).tolist()


def test_what_computes_is_named():
    """The name goes into the key of cached reference log-probs."""
    name = functional.backend(torch.device("cpu"), torch.float32)
    assert name.startswith("native-")
    assert functional.backend(torch.device("cpu"), torch.float16) == "reference"
    assert functional.backend(torch.device("meta"), torch.float32) == "reference"
