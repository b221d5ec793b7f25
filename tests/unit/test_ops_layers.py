"""The layers' kernels and what they take the place of, against formulas in fp64 and transformers' own code.

Sizes: below, at and above 16 lanes, 8 and 128 keys, 32 lanes of queries times the heads that share keys (one
to three, seven, more than lanes), 32 tiles of a work item; windows that end inside a block of keys; sequences
of one token; prompts shared in part and whole.
"""

from __future__ import annotations

import math
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from strop.models import fused
from strop.ops import layers, native

pytestmark = pytest.mark.avx512
BF16, FP32 = torch.bfloat16, torch.float32


def random(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def gradients(function, inputs, d_out):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def error(found, wanted):
    """Largest difference, relative to the largest number."""
    return float(
        (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
    )


def compare(native_function, formula, inputs, d_out, tolerance):
    """Beside fp64, and in bf16 no worse than the same formula in torch's bf16."""
    found = gradients(native_function, inputs, d_out)
    truth = gradients(formula, [x.double() for x in inputs], d_out.double())
    plain = gradients(formula, inputs, d_out)
    for ours, right, theirs in zip(found, truth, plain):
        assert ours.shape == right.shape
        assert error(ours, right) <= max(tolerance, 1.5 * error(theirs, right))


TOLERANCE = {FP32: 2e-6, BF16: 1e-2}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (65, 15), (64, 16), (129, 33), (3, 576)])
def test_rms_norm(dtype, rows, size):
    x, weight = random(2, rows, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    compare(
        lambda x, w: layers.rms_norm(x, w, 1e-5),
        lambda x, w: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
        [x, weight],
        random(2, rows, size, dtype=dtype, seed=2),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("count", [1, 16, 4097])
def test_silu_mul(dtype, count):
    compare(
        layers.silu_mul,
        lambda gate, up: F.silu(gate) * up,
        [random(count, dtype=dtype, scale=4), random(count, dtype=dtype, seed=1)],
        random(count, dtype=dtype, seed=2),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_silu_of_numbers_without_bounds(dtype):
    gate = torch.tensor([-math.inf, -200.0, -1e30, 200.0, 1e30, 0.0, math.nan], dtype=dtype)
    found, wanted = layers.silu_mul(gate, torch.ones(7, dtype=dtype)), F.silu(gate)
    # -inf * 0 is NaN in torch too
    torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("frozen", [False, True])
def test_silu_mul_linear_is_both_to_the_bit_and_keeps_their_inputs_alone(dtype, frozen):
    def run(function):
        tensors = [
            random(1, 37, 50, dtype=dtype, scale=4), random(1, 37, 50, dtype=dtype, seed=1),
            random(20, 50, dtype=dtype, seed=2),
        ]  # fmt: skip
        for x in tensors[: 2 if frozen else 3]:
            x.requires_grad_()
        kept: dict[int, int] = {}

        def pack(x):
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = function(*tensors)
        y.backward(random(1, 37, 20, dtype=dtype, seed=3))
        own = {x.data_ptr() for x in tensors}
        return [y, *(x.grad for x in tensors if x.requires_grad)], sum(
            n for at, n in kept.items() if at not in own
        )

    found, beside = run(layers.silu_mul_linear)
    wanted, product = run(lambda gate, up, weight: F.linear(layers.silu_mul(gate, up), weight))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert beside == 0
    assert product == (0 if frozen else 37 * 50 * dtype.itemsize)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [2, 30, 64])
def test_rotate(dtype, size):
    angles = random(1, 7, size // 2, dtype=FP32).repeat(1, 1, 2)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)

    def formula(x):
        half = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
        return x * cosine.to(x.dtype) + half * sine.to(x.dtype)

    x = random(1, 7, 3, size, dtype=dtype).transpose(1, 2)  # strided as a model's
    d_out = random(1, 3, 7, size, dtype=dtype, seed=1)
    compare(lambda x: layers.rotate(x, cosine, sine), formula, [x], d_out, TOLERANCE[dtype])


def attention_formula(cu_queries, cu_keys, scale, window):
    def formula(q, k, v):
        per_group = q.shape[1] // k.shape[1]
        out = []
        for s in range(len(cu_queries) - 1):
            begin, end = cu_queries[s], cu_queries[s + 1]
            shared = cu_keys[s + 1] - cu_keys[s] - (end - begin)
            tokens = [*range(cu_queries[s - 1], cu_queries[s - 1] + shared), *range(begin, end)]
            keys, values = (x[0, :, tokens].repeat_interleave(per_group, dim=0) for x in (k, v))
            scores = q[0, :, begin:end] @ keys.transpose(1, 2) * scale
            behind = torch.arange(shared, len(tokens))[:, None] - torch.arange(len(tokens))[None, :]
            hidden = (behind < 0) | (behind >= (window or len(tokens)))
            out.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values)
        return torch.cat(out, dim=1).transpose(0, 1)[None]

    return formula


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "lengths", "shared", "window"),
    [
        (4, 2, 64, [1, 31, 32, 33, 161], None, None),
        (9, 3, 64, [130, 257, 70, 5], [0, 40, 0, 5], None),
        (2, 1, 16, [5, 300, 150], None, 50),
        (4, 4, 128, [129, 128, 1], [0, 129, 0], None),
        (6, 3, 32, [150, 1, 40], [0, 149, 1], 64),
        (7, 1, 32, [45, 90], [0, 30], None),
        (40, 1, 16, [3, 60], None, None),
        (6, 1, 16, [300, 200], [0, 210], 37),
        (1, 1, 48, [3, 0, 4], None, 1),  # a sequence without tokens, a window of the token itself
    ],
)
def test_attention(heads, kv_heads, size, lengths, shared, window):
    shared = shared or [0] * len(lengths)
    cu_queries = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    cu_keys = [sum(lengths[:i]) + sum(shared[:i]) for i in range(len(lengths) + 1)]
    total, scale = cu_queries[-1], 0.7 * size**-0.5
    inputs = [
        random(1, total, n, size, dtype=BF16, seed=i).transpose(1, 2)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    ]
    edges = torch.tensor(cu_queries), torch.tensor(cu_keys)
    compare(
        lambda q, k, v: layers.attention(q, k, v, *edges, scale, window),
        attention_formula(cu_queries, cu_keys, scale, window),
        inputs,
        random(1, total, heads, size, dtype=BF16, seed=9),
        1e-2,
    )


def test_a_sequence_does_not_know_its_neighbours_nor_the_threads():
    """Bit for bit: alone, behind others, and by another number of threads."""
    lengths = [70, 45, 133]
    edges = torch.tensor([0, 70, 115, 248], dtype=torch.int32)
    q, k, v, d_out = (random(1, 248, 4, 32, dtype=BF16, seed=i).transpose(1, 2) for i in range(4))

    def run(part, cu):
        inputs = [x[:, :, part] for x in (q, k, v)]
        return gradients(
            lambda *x: layers.attention(*x, cu, cu, 0.2), inputs, d_out[:, :, part].transpose(1, 2)
        )

    together = run(slice(0, 248), edges)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = run(slice(0, 248), edges)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, again))
    alone = run(slice(115, 248), torch.tensor([0, lengths[2]], dtype=torch.int32))
    assert torch.equal(together[0][:, 115:], alone[0])
    assert all(torch.equal(a[:, :, 115:], b) for a, b in zip(together[1:], alone[1:]))


@pytest.mark.parametrize(
    ("cu_queries", "cu_keys"),
    [
        ([0, 5], [0, 5]),  # of 6 tokens
        ([0, 4, 2, 6], [0, 4, 2, 6]),
        ([0, 3, 6], [0, 3, 12]),  # shares more than the one before has
        ([0, 6], [0, 8]),  # nothing before it
        ([0, 3, 6], [0, 3, 5]),  # fewer keys than queries
    ],
)
def test_offsets_that_do_not_fit(cu_queries, cu_keys):
    q = random(1, 2, 6, 16, dtype=BF16)
    with pytest.raises(ValueError, match="does not fit"):
        layers.attention(q, q, q, torch.tensor(cu_queries), torch.tensor(cu_keys), 1.0)


def test_shapes_that_do_not_fit():
    q = random(1, 3, 6, 16, dtype=BF16)
    edges = torch.tensor([0, 6])
    with pytest.raises(ValueError, match="does not fit"):  # 3 heads on 2
        layers.attention(q, q[:, :2], q[:, :2], edges, edges, 1.0)
    for other in (q[:, :, :5], q.float(), q.to(torch.float8_e4m3fn), q[..., :8], q[0], q.to("meta")):
        for key, value in ((other, other), (other, q), (q, other)):
            with pytest.raises(ValueError, match=r"key|value"):
                layers.attention(q, key, value, edges, edges, 1.0)
    for cu_queries, cu_keys in ((edges.to("meta"), edges), (edges, edges.to("meta"))):
        with pytest.raises(ValueError, match="cu_keys on"):
            layers.attention(q, q, q, cu_queries, cu_keys, 1.0)
    with pytest.raises(ValueError, match="query"):
        layers.attention(q.float(), q.float(), q.float(), edges, edges, 1.0)
    with pytest.raises(ValueError, match="weight"):
        layers.rms_norm(q, torch.ones(16, dtype=torch.float64), 1e-5)
    with pytest.raises(ValueError, match="weight"):
        layers.rms_norm(q.float(), torch.ones(16, dtype=BF16), 1e-5)
    with pytest.raises(ValueError, match="gate"):
        layers.silu_mul(q, q[:, :2])
    with pytest.raises(ValueError, match="gate"):
        layers.silu_mul_linear(q, q[:, :2], q)
    with pytest.raises(ValueError, match="weight"):
        layers.silu_mul_linear(q, q, q[0, 0, :, :5])
    with pytest.raises(ValueError, match="weight"):
        layers.silu_mul_linear(q[0, 0, 0], q[0, 0, 0], q[0, 0, 0])
    with pytest.raises(ValueError, match="cosine"):
        layers.rotate(q, q[0], q[0])


def test_wide_weights_are_rounded_as_they_are_read():
    x, dy = random(5, 16, dtype=BF16), random(5, 16, seed=2, dtype=BF16)
    norm, down = random(16, seed=3, dtype=FP32), random(8, 16, seed=4, dtype=FP32)
    found = {}
    for dtype in (FP32, BF16):
        leaves = [x.clone(), norm.to(dtype, copy=True), down.to(dtype, copy=True)]
        x_own, norm_own, down_own = (leaf.requires_grad_() for leaf in leaves)
        out = layers.silu_mul_linear(layers.rms_norm(x_own, norm_own, 1e-5), dy, down_own)
        out.backward(dy[:, :8])
        assert [leaf.grad.dtype for leaf in leaves] == [BF16, dtype, dtype]
        found[dtype] = [out, *(leaf.grad.to(BF16) for leaf in leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found[FP32], found[BF16], strict=True))


@pytest.mark.parametrize("other", [random(16, dtype=torch.float64), random(16, dtype=BF16).to("meta")])
def test_another_dtype_or_device_does_not_reach_c(other):
    """A device without memory stands for a GPU, whose addresses C would read."""
    x, packed = random(16, dtype=BF16), random(1, 3, 1, 16, dtype=BF16)
    calls = [
        lambda: layers.rms_norm(x[None], other, 1e-5),
        lambda: layers.silu_mul(x, other),
        lambda: layers.silu_mul_linear(x[None], x[None], other[None]),
        lambda: layers.silu_mul_linear(x[None], other[None], x[None]),
        lambda: layers.rotate(packed, x.view(1, 1, 16), other.view(1, 1, 16)),
        lambda: layers.rotate(packed, other.view(1, 1, 16), x.view(1, 1, 16)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=str(other.device) + " beside|beside .* on " + str(other.device)):
            call()
    with pytest.raises(ValueError, match="of the CPU"):
        layers.silu_mul(x.to("meta"), x.to("meta"))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_token_without_dims_before_it(dtype):
    inputs = [random(8, dtype=dtype), random(8, dtype=dtype, seed=1), random(4, 8, dtype=dtype, seed=2)]
    compare(
        layers.silu_mul_linear,
        lambda gate, up, weight: F.linear(F.silu(gate) * up, weight),
        inputs,
        random(4, dtype=dtype, seed=3),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_opcheck_of_transposed_inputs(dtype):
    """Strides of the results are what torch.compile takes them to be."""
    x, y, z = (random(1, 6, 20, dtype=dtype, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    for product in (False, True):
        frozen = (z.detach(), x.detach(), y.detach())
        torch.library.opcheck(torch.ops.strop.silu_mul_backward.default, (*frozen, product))
    torch.library.opcheck(torch.ops.strop.silu_mul.default, (x, y))
    weight = random(6, 4, dtype=dtype).t().requires_grad_()
    torch.library.opcheck(torch.ops.strop.silu_mul_linear.default, (x, y, weight))
    torch.library.opcheck(torch.ops.strop.rms_norm.default, (x, z[0, 0].detach().requires_grad_(), 1e-5))
    q = random(1, 16, 2, 6, dtype=dtype).transpose(1, 3).transpose(1, 2).requires_grad_()
    cosine = random(1, 16, 6, dtype=dtype).transpose(1, 2)
    torch.library.opcheck(torch.ops.strop.rotate.default, (q, cosine, cosine, False))


def test_opcheck():
    q = random(1, 6, 2, 16, dtype=BF16).transpose(1, 2).requires_grad_()
    edges = torch.tensor([0, 2, 6], dtype=torch.int32)
    x, weight = random(3, 20, dtype=FP32).requires_grad_(), random(20, dtype=FP32).requires_grad_()
    torch.library.opcheck(torch.ops.strop.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.strop.silu_mul.default, (x, x.detach().clone().requires_grad_()))
    both = (x, x.detach().clone().requires_grad_(), random(7, 20, dtype=FP32).requires_grad_())
    torch.library.opcheck(torch.ops.strop.silu_mul_linear.default, both)
    cosine = random(1, 6, 16, dtype=BF16)
    torch.library.opcheck(torch.ops.strop.rotate.default, (q, cosine, cosine, False))
    arguments = (q, q.detach().clone().requires_grad_(), q.detach(), edges, edges, 0.5, 0)
    torch.library.opcheck(torch.ops.strop.attention.default, arguments)


# ---- In place of a model's own code

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 16}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}
MODELS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=5),
    "qwen3": Qwen3Config(**SMALL, **HEADS),
    "gemma3": Gemma3TextConfig(**SMALL, **HEADS, sliding_window=5, layer_types=["sliding_attention"] * 2),
}
EXCHANGED = {"llama": (5, 2), "mistral": (5, 2), "qwen3": (9, 2), "gemma3": (0, 0)}
"""Norms and MLPs. Gemma counts norm weights from 1 and gates by GELU."""


@pytest.fixture
def untouched(monkeypatch):
    """The rotary function is a module's: other tests get it back as it was."""
    for name in ("llama", "mistral", "qwen3", "gemma3"):
        module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
        own = module.apply_rotary_pos_emb
        monkeypatch.setattr(module, "apply_rotary_pos_emb", getattr(own, "__wrapped__", own))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_it_computed(kind, untouched):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind], dtype=FP32)
    tokens = torch.randint(0, 97, (1, 11))

    def run():
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    before = run()
    fused.install(model)
    names = [
        m.forward.__func__.__name__
        for m in model.modules()
        if isinstance(vars(m).get("forward"), types.MethodType)
    ]
    assert (names.count("_norm"), names.count("_mlp")) == EXCHANGED[kind]
    for a, b in zip(before, run()):
        assert error(b, a) < 1e-4


def test_the_kernels_are_what_runs(untouched, monkeypatch):
    model = AutoModelForCausalLM.from_config(MODELS["llama"], dtype=FP32)
    fused.install(model)
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (called.append(name), call(name, *rest))[1])
    model(torch.arange(5)[None])
    assert (called.count("strop_norm"), called.count("strop_gate"), called.count("strop_turn")) == (5, 2, 4)
    called.clear()
    monkeypatch.setattr(layers, "supports", lambda x: False)  # a GPU, or a CPU without AVX-512
    model(torch.arange(5)[None])
    assert called == []
