"""The linear layer's kernels against fp64, and in a model's own place.

Sizes: below, at and above a panel of 12 rows, a tile of 32 columns, a work item of 120 rows and of 9 tiles,
a strip of 96 or 128 columns and 512 rows of packing, a depth that L1 holds (320 pairs) and one that it does
not; odd numbers of tokens, which leave half a pair over.
"""

from __future__ import annotations

import ctypes
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from strop import parallel
from strop.models import fused
from strop.ops import native
from strop.ops.linear import linear, takes

pytestmark = pytest.mark.avx512
BF16 = torch.bfloat16
SHAPES = [  # tokens, inputs, outputs
    (1, 2, 2),
    (12, 32, 12),
    (13, 34, 38),
    (121, 30, 290),
    (515, 130, 98),
    (25, 1282, 322),
]


def random(*shape, seed=0, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape, seed=0):
    """Small whole numbers: their products and sums are exact in fp32, whatever the order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.fixture(autouse=True)
def _without_amx(monkeypatch):
    """A CPU with AMX computes the same; there they are only not chosen."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def run(function, inputs, dy):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "num_in", "num_out"), SHAPES)
def test_one_rounding_of_the_exact_sums(tokens, num_in, num_out, bias):
    inputs = [whole(tokens, num_in), whole(num_out, num_in, seed=1), *[whole(num_out, seed=2)] * bias]
    dy = whole(tokens, num_out, seed=3)
    wanted = run(F.linear, [t.double() for t in inputs], dy.double())
    for found, exact in zip(run(linear, inputs, dy), wanted, strict=True):
        assert torch.equal(found, exact.to(BF16))


@pytest.mark.parametrize(("tokens", "num_in", "num_out"), SHAPES)
def test_as_exact_as_torch(tokens, num_in, num_out):
    inputs, dy = [random(tokens, num_in), random(num_out, num_in, seed=1)], random(tokens, num_out, seed=2)
    exact = run(F.linear, [t.double() for t in inputs], dy.double())
    for ours, theirs, right in zip(run(linear, inputs, dy), run(F.linear, inputs, dy), exact, strict=True):
        error, of_torch = ((t.double() - right).square().mean().sqrt() for t in (ours, theirs))
        assert error <= 1.02 * of_torch + 1e-9


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("tokens", "num_in", "num_out"), [*SHAPES, (3, 7, 5)])
def test_a_wide_weight_is_rounded_as_it_is_read_and_its_gradient_never(
    tokens, num_in, num_out, kernels, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not kernels)
    x, dy = random(tokens, num_in), random(tokens, num_out, seed=3)
    weight, bias = (random(*s, seed=1, dtype=torch.float32) for s in ((num_out, num_in), (num_out,)))
    y, dx, d_weight, d_bias = run(linear, [x, weight, bias], dy)
    narrow = run(linear, [x, weight.to(BF16), bias.to(BF16)], dy)
    assert torch.equal(y, narrow[0])
    assert torch.equal(dx, narrow[1])
    assert d_weight.dtype == d_bias.dtype == torch.float32
    torch.testing.assert_close(d_bias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-5)
    if takes(x, weight, bias):
        torch.testing.assert_close(d_weight.double(), dy.double().t() @ x.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(d_weight.to(BF16), narrow[2])


def test_a_wide_weight_is_kept_as_it_is():
    x, weight = random(5, 7).requires_grad_(), random(3, 7, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        linear(x, weight)
    assert kept == [weight.data_ptr(), x.data_ptr()]


def test_no_tokens():
    y, dx, d_weight, d_bias = run(
        linear, [random(0, 6), random(4, 6, seed=1), random(4, seed=2)], random(0, 4)
    )
    assert (y.shape, dx.shape) == ((0, 4), (0, 6))
    assert torch.equal(d_weight, torch.zeros(4, 6, dtype=BF16))
    assert torch.equal(d_bias, torch.zeros(4, dtype=BF16))


def test_strides_and_more_dimensions():
    x, weight = random(2, 7, 40).transpose(0, 1)[..., 4:38], random(34, 26, seed=1).t()
    dy = random(7, 26, 2, seed=2).transpose(1, 2)
    found = run(linear, [x, weight], dy)
    wanted = run(linear, [x.reshape(14, 34), weight.contiguous()], dy.reshape(14, 26))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    assert found[0].shape == (7, 2, 26)
    assert found[1].shape == x.shape
    one = linear(x[0, 0], weight)
    assert torch.equal(one, found[0][0, 0])


def test_not_a_number_stays_where_it_is():
    x, weight = random(30, 34), random(38, 34, seed=1)
    clean = linear(x, weight)
    x[17, 5] = float("nan")
    dirty = linear(x, weight)
    assert dirty[17].isnan().all()
    x[17], weight[3, 0] = 0.0, float("inf")
    assert linear(x, weight)[17, 3].isnan()
    assert torch.equal(torch.cat((dirty[:17], dirty[18:])), torch.cat((clean[:17], clean[18:])))


def test_a_row_does_not_know_its_neighbours_nor_the_threads():
    """torch's own matmul gives the first row of 2 and of 600 other bits for some shapes."""
    x, weight, bias, dy = (
        random(600, 640),
        random(98, 640, seed=1),
        random(98, seed=2),
        random(600, 98, seed=3),
    )
    together = run(linear, [x, weight, bias], dy)
    threads = torch.get_num_threads()
    for num in (1, 3):
        torch.set_num_threads(num)
        again = run(linear, [x, weight, bias], dy)
        assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(5, 18), slice(119, 245), slice(597, 600)):
        y, dx, *_ = run(linear, [x[rows], weight, bias], dy[rows])
        assert torch.equal(y, together[0][rows])
        assert torch.equal(dx, together[1][rows])
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], weight, bias), together[0][order])


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_what_is_needed_is_computed_and_kept(needs, monkeypatch):
    inputs = [random(5, 8), random(6, 8, seed=1), random(6, seed=2)]
    wanted = run(linear, inputs, random(5, 6, seed=3))
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (called.append(name), call(name, *rest))[1])
    given = [t.clone().requires_grad_(bool(need)) for t, need in zip(inputs, needs, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        y = linear(*given)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(random(5, 6, seed=3))
    expected = ["strop_linear", *["strop_linear_d_input"] * needs[0], *["strop_linear_d_weight"] * needs[1]]
    assert called == expected
    assert set(kept) == {given[1 - i].data_ptr() for i in (0, 1) if needs[i]}
    for t, need, right in zip(given, needs, wanted[1:], strict=True):
        assert (t.grad is None) if not need else torch.equal(t.grad, right)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(3, 7), random(4, 7)),  # pairs of summands
        (random(3, 8), random(5, 8)),  # of the gradient by x
        (random(3, 8, dtype=torch.float32), random(4, 8, dtype=torch.float32)),
    ],
)
def test_what_has_no_kernel_goes_to_torch(x, weight):
    assert not takes(x, weight, None)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    bias = random(len(weight), dtype=torch.float16)
    assert not takes(random(3, 8), random(4, 8), bias)


def test_a_cpu_with_amx_keeps_torchs(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not takes(random(3, 8), random(4, 8), None)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight \(4, 8\) and bias None for x \(3, 6\)"):
        linear(random(3, 6), random(4, 8))
    with pytest.raises(ValueError, match=r"bias \(6,\)"):
        linear(random(3, 8), random(4, 8), random(6))


def raw(name, *arguments):
    lib = native.library("cpu")
    return lib.strop_error(getattr(lib, name)(*arguments)).decode()


def calls_of_c(pointer, sizes=(1, 2, 2), dtype=native.DTYPES["cpu"][BF16]):
    """What C says of each product, called so; pointer: of each of its tensors by name, but the bias."""
    x, y, weight, scratch = (pointer(name) for name in ("x", "y", "weight", "scratch"))
    return [
        raw("strop_linear", x, weight, dtype, None, *sizes, scratch, y),
        raw("strop_linear_d_input", y, weight, dtype, *sizes, scratch, x),
        raw("strop_linear_d_weight", y, x, *sizes, scratch, weight, dtype),
    ]


def test_what_c_refuses():
    ok = (ctypes.c_uint16 * 64)()
    for sizes in ((-1, 2, 2), (1, 0, 2), (1, 2, -2), (1, 3, 2), (1, 2, 3)):
        assert all("does not fit" in said for said in calls_of_c(lambda _: ok, sizes))
    for missing in ("x", "y", "weight", "scratch"):
        pointers = dict.fromkeys(("x", "y", "weight", "scratch"), ok) | {missing: None}
        assert all("null" in said for said in calls_of_c(pointers.get))
    for dtype in (-1, 2):
        assert all("no kernel" in said for said in calls_of_c(lambda _: ok, dtype=dtype))


def test_the_heads_gradient_of_no_rows_needs_a_place_for_its_zeros():
    assert "null" in raw("strop_head_d_weight", None, None, 0, 64, 12, 1, None)
    zeros = torch.ones(12, 64, dtype=BF16)
    assert raw("strop_head_d_weight", None, None, 0, 64, 12, 1, zeros.data_ptr()) == "no error"
    assert not zeros.any()
    assert raw("strop_head_d_weight", None, None, 0, 64, 0, 1, None) == "no error"


def test_one_token_without_dims_before_it():
    inputs, dy = [whole(8), whole(4, 8, seed=1), whole(4, seed=2)], whole(4, seed=3)
    wanted = run(F.linear, [t.double() for t in inputs], dy.double())
    for found, exact in zip(run(linear, inputs, dy), wanted, strict=True):
        assert torch.equal(found, exact.to(BF16))


def test_opcheck():
    inputs = [t.requires_grad_() for t in (random(3, 8), random(4, 8, seed=1), random(4, seed=2))]
    torch.library.opcheck(torch.ops.strop.linear.default, inputs)
    torch.library.opcheck(torch.ops.strop.linear.default, (inputs[0], inputs[1], None))
    frozen = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.strop.linear_d_input.default, (random(3, 4), frozen[1]))
    for dtype in (BF16, torch.float32):
        torch.library.opcheck(torch.ops.strop.linear_d_weight.default, (random(3, 4), frozen[0], dtype))
    wide = [inputs[0], *(t.detach().float().requires_grad_() for t in inputs[1:])]
    torch.library.opcheck(torch.ops.strop.linear.default, wide)
    turned = [random(2, 8, 3).transpose(1, 2), random(8, 4, seed=1).t(), random(4, seed=2)]
    torch.library.opcheck(torch.ops.strop.linear.default, [t.requires_grad_() for t in turned])


# ---- In place of a model's own code

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 97}
HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}
MODELS = {"llama": LlamaConfig(**SMALL, **HEADS), "qwen2": Qwen2Config(**SMALL, **HEADS)}  # qwen: biases


@pytest.fixture
def untouched(monkeypatch):
    """The rotary function is a module's: other tests get it back as it was."""
    for name in MODELS:
        module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
        own = module.apply_rotary_pos_emb
        monkeypatch.setattr(module, "apply_rotary_pos_emb", getattr(own, "__wrapped__", own))


def build(kind, dtype=BF16):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model.to(dtype)


def exchanged(model):
    """Only the linear layers, so that nothing else differs."""
    for module in model.modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            module.forward = types.MethodType(fused._linear, module)
    return model


def step(model):
    tokens = torch.randint(0, 97, (1, 31), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, use_cache=False).logits
    F.cross_entropy(logits[0].float(), tokens[0]).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_it_computed(kind):
    exact = step(build(kind, torch.float64))
    plain, ours = step(build(kind)), step(exchanged(build(kind)))
    for a, b, right in zip(ours, plain, exact, strict=True):
        scale = right.norm()
        assert (a.double() - right).norm() <= 1.15 * (b.double() - right).norm() + 1e-3 * scale


def test_install_exchanges_every_layer_but_the_head(untouched, monkeypatch):
    model = build("llama")
    fused.install(model)
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (called.append(name), call(name, *rest))[1])
    step(model)
    assert [called.count(f"strop_linear{what}") for what in ("", "_d_input", "_d_weight")] == [14, 14, 14]
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(("mode", "forwards"), [("none", 14), ("selective", 14), ("full", 28)])
def test_checkpointing_keeps_what_it_says(mode, forwards, monkeypatch):
    """selective: the outputs of matmuls are kept, not computed again. Full: all but what nothing needs."""
    wanted = step(exchanged(build("qwen2")))
    model = exchanged(build("qwen2"))
    if mode != "none":
        for parent, name, block in parallel.transformer_blocks(model):
            setattr(parent, name, parallel._checkpointed(block, mode))
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (called.append(name), call(name, *rest))[1])
    assert all(torch.equal(a, b) for a, b in zip(wanted, step(model), strict=True))
    assert called.count("strop_linear") == forwards


def test_compiled(untouched):
    models = [build("qwen2") for _ in range(2)]
    for model in models:
        fused.install(model)
    wanted = step(models[0])
    torch._dynamo.reset()
    for layer in models[1].model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="aot_eager")
        layer.self_attn.q_proj.compile(fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(wanted, step(models[1]), strict=True))
