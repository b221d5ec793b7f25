"""strop.ops.linear_logprob against fp64 formulas written out, in every engine that this machine has."""

from __future__ import annotations

import pytest
import torch

from strop import ops
from strop.ops import head, native, reference
from strop.ops.head_products import Products
from tests.unit.ops_engines import CASES, ENGINES, FUSED, HEADS, example, options, truth


def test_this_machines_library_is_built():
    """Without it the tests below would try the reference alone."""
    assert native.library("cpu") is not None, "python -m tools.build_kernels"


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


# V: two segments of 3,072 words and a rest of 856. Kept: less than a segment, one, less than two, two, all.
@pytest.mark.parametrize("engine", [name for name in ENGINES[torch.bfloat16] if name in FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_words_are_kept_as_fit(use, monkeypatch, dtype, engine):
    """The log-probs are the same bits, the gradients right, and what is kept is below the limit."""
    use(engine)
    num_tokens, vocab = 70, 7000
    x, w, target = example(num_tokens, 64, vocab, dtype, scale=0.2)
    target[:4] = torch.tensor([0, 3071, 3072, 6999])
    bias, factors = torch.linspace(-1, 1, vocab), torch.linspace(-2, 3, num_tokens)
    leaves = [t.double().requires_grad_() for t in (x, w, bias)]
    (truth(*leaves[:2], target, leaves[2])[0] * factors.double()).sum().backward()
    word = num_tokens * x.element_size()
    plain, found = None, {}
    for most, words in ((3071, 0), (3072, 3072), (6143, 3072), (6999, 6144), (7000, 7000)):
        monkeypatch.setattr(head, "KEPT_BYTES", most * word)
        own = [t.clone().requires_grad_() for t in (x, w, bias)]
        logp, stats = ops.linear_logprob(own[0], own[1], target, own[2])
        assert head.words_kept(x, w, None) == words
        keep = head.what_fits(head.ALL, x, w, None)
        assert head.kept_shape(x, w, keep)[0] == ([words, 96] if words else [0])
        assert head.words_kept(x, w, 5.0) == 0
        plain = plain or (logp, *stats)
        assert all(torch.equal(a, b) for a, b in zip(plain, (logp, *stats)))
        (logp * factors).sum().backward()
        found[words] = [t.grad for t in own]
        for grad, leaf in zip(found[words], leaves):
            error = float((grad.double() - leaf.grad).norm() / leaf.grad.norm())
            assert error < (1e-5 if dtype == torch.float32 else 4e-3), (words, error)
    kept_all, kept_none, kept_some = (found[n][1] for n in (7000, 0, 3072))
    assert torch.equal(kept_some[:3072], kept_all[:3072])
    assert torch.equal(kept_some[3072:], kept_none[3072:])


def test_the_limit_is_the_weights_gradient_in_fp32(monkeypatch):
    """On the CPU: all words of up to 2H tokens; in the engine that keeps all or nothing, 512 MiB."""
    w = torch.empty(49152, 576, dtype=torch.bfloat16, device="meta")

    def kept(num_tokens):
        return head.words_kept(torch.empty(num_tokens, 576, dtype=torch.bfloat16), w, None)

    monkeypatch.setattr(head, "engine", lambda hidden, weight: "fused")
    assert head.most_kept(torch.empty(3, 576, dtype=torch.bfloat16), w) == 4 * 49152 * 576
    assert (kept(0), kept(1152), kept(1352), kept(2304)) == (49152, 49152, 39936, 24576)
    assert kept(10**6) == 0
    tiny = torch.empty(420, 16, dtype=torch.bfloat16)
    assert head.most_kept(torch.empty(3, 16), tiny) == 64 * 2**20
    monkeypatch.setattr(head, "engine", lambda hidden, weight: "chunked")
    assert (kept(5461), kept(5462)) == (49152, 0)


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
    products = Products(x, w, True, torch.empty_like(w), fused, head.chunk_words(x, vocab))
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
