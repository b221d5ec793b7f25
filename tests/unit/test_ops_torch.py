"""torch.ops.strop as PyTorch sees it: opcheck, torch.compile without a graph break, gradcheck in fp64;
and what happens where the library is missing, of another build, or refuses."""

from __future__ import annotations

import ctypes
import logging
import subprocess

import pytest
import torch

from strop import ops
from strop.ops import head, native, preference
from tests.unit.ops_engines import plain_and_compiled


def example(num_tokens=6, hidden=16, vocab=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    return x, w, torch.randint(vocab, (num_tokens,), generator=generator)


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(native, "is_loaded", lambda device: False)
    return request.param


@pytest.mark.parametrize("keep", [head.NOTHING, head.ALL, head.FROZEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_head(backend, dtype, keep):
    x, w, target = example(dtype=dtype)
    x.requires_grad_(), w.requires_grad_(keep != head.FROZEN)
    torch.library.opcheck(torch.ops.strop.head, (x, w, target, None, None, 1.3, keep))
    if keep == head.NOTHING:
        bias = torch.linspace(-1, 1, 50, requires_grad=True)
        torch.library.opcheck(torch.ops.strop.head, (x, w, target, bias, 2.0, 1.0, keep))


def test_opcheck_of_the_rest(backend):
    x, w, target = example()
    logits = (x @ w.T).requires_grad_()
    torch.library.opcheck(torch.ops.strop.logprob, (logits, target))
    values, edges = torch.rand(6, requires_grad=True), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.strop.segment_sum, (values, edges))
    ratio = torch.randn(4, 2, requires_grad=True)
    for kind in preference.KINDS if backend == "native" else ():  # the reference is no op, see dpo_loss
        torch.library.opcheck(torch.ops.strop.dpo_loss, (ratio, kind, 0.3, 0.1, 0.2))


def test_compile_finds_no_graph_break(backend):
    """One function with every op, forward and backward, the same as eager."""
    x, w, target = example(8)
    edges = torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32)

    def loss(x, w):
        logp, stats = ops.linear_logprob(x, w, target, None, 5.0, 0.9)
        more, _ = ops.logprob(x @ w.T, target)
        sums = ops.segment_sum(logp + more, edges)
        return ops.dpo_loss(sums.view(-1, 2), "apo_down", 0.2).sum() + 0 * stats.entropy.sum()

    results = plain_and_compiled(loss, x, w)
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_fp64(softcap):
    """fp64 has no kernels: this is the reference, and the autograd around both."""
    x, w, target = example(4, 5, 7, torch.float64)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in (x, w, bias)]
    logp = lambda x, w, b: ops.linear_logprob(x, w, target, b, softcap, 0.8)[0]  # noqa: E731
    assert torch.autograd.gradcheck(logp, leaves)
    frozen = lambda x: ops.linear_logprob(x, w.detach(), target, None, softcap)[0]  # noqa: E731
    assert torch.autograd.gradcheck(frozen, leaves[:1])
    assert torch.autograd.gradcheck(
        lambda z: ops.logprob(z, target)[0], [(x @ w.T).detach().requires_grad_()]
    )
    edges = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda v: ops.segment_sum(v, edges), [x[:, 0].detach().requires_grad_()])
    ratio = x[:, :2].detach().requires_grad_()
    for kind in preference.KINDS:
        assert torch.autograd.gradcheck(lambda r, kind=kind: ops.dpo_loss(r, kind, 0.3, 0.1, 0.2), [ratio])


@pytest.fixture
def fresh(monkeypatch, caplog):
    """As if nothing had been loaded yet."""
    caches = (native.library, native.identity, native.has_avx512, native.has_amx, native._note)
    for cache in caches:
        cache.cache_clear()
    caplog.set_level(logging.WARNING)
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_without_a_library_one_line_and_the_same_results(fresh, monkeypatch, tmp_path, caplog):
    x, w, target = example()
    expected = ops.linear_logprob(x, w, target)[0]
    native.library.cache_clear(), native.has_avx512.cache_clear(), native.identity.cache_clear()
    monkeypatch.setattr(native.libraries, "places", lambda package, name: [tmp_path / f"{name}.so"])
    for _ in range(2):
        assert torch.allclose(ops.linear_logprob(x, w, target)[0], expected, atol=1e-6)
    ops.segment_sum(torch.ones(2), torch.tensor([0, 2]))
    assert [r.message for r in caplog.records] == [
        "no native kernels for cpu (python -m tools.build_kernels makes them): "
        "PyTorch's own operations are used, with the same results"
    ]
    assert ops.backend(torch.device("cpu"), torch.float32) == "reference"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int strop_abi_version(void) { return 99; }", "its ABI version is 99, not 5: build it again"),
        ("int x;", "undefined symbol: strop_abi_version"),
        (None, "file too short"),
    ],
)
def test_a_library_of_another_build_is_not_used(fresh, monkeypatch, tmp_path, caplog, source, message):
    file = tmp_path / "libstrop_cpu.so"
    if source is None:
        file.write_bytes(b"")
    else:
        command = ["gcc", "-shared", "-x", "c", "-", "-o", str(file)]
        subprocess.run(command, input=source, text=True, check=True)
    monkeypatch.setattr(native.libraries, "places", lambda package, name: [file])
    x, w, target = example()
    assert ops.linear_logprob(x, w, target)[0].isfinite().all()
    why, what_then = (r.message for r in caplog.records)
    assert str(file) in why
    assert message in why
    assert what_then.startswith("no native kernels for cpu")


def test_a_library_for_other_gpus_is_not_used(monkeypatch, tmp_path):
    """Its file loads anywhere; that no launch will succeed is found out at once."""
    file = tmp_path / "libstrop_cuda.so"
    functions = " ".join(f"int {name}(void) {{ return 0; }}" for name in native.SIGNATURES)
    source = (
        f"int strop_abi_version(void) {{ return {native.ABI}; }} {functions}"
        'const char* strop_error(int status) { return ""; }'
        'const char* strop_problem(void) { return "no kernel image is available"; }'
    )
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", str(file)], input=source, text=True, check=True)
    native._checked(file, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OSError, match="no kernel image is available"):
        native._checked(file, "cuda")


def test_what_no_kernel_takes_is_said_once(fresh, caplog):
    x, w, target = example(dtype=torch.float16)
    for _ in range(2):
        ops.linear_logprob(x, w, target)
    assert [r.message for r in caplog.records] == [
        "linear_logprob: no native kernel for torch.float16 on cpu, the reference is used"
    ]


@pytest.mark.avx512
def test_the_fused_heads_c_functions_refuse_what_does_not_fit():
    """Through the C interface: a status, and nothing written."""
    lib = native.library("cpu")
    n, h, v = 5, 16, 50
    x, w, target = example(n, h, v, torch.bfloat16)
    packed = torch.empty(32 * h, dtype=torch.bfloat16)
    rows = [torch.full((n,), 7.0) for _ in range(5)]
    walk, head_ = native.Walk(*(r.data_ptr() for r in rows)), native.Head(None, 0.0, 1.0)
    scratch, lse = torch.empty(4 * 32), torch.zeros(n)
    out = torch.full((v, 32), 7.0, dtype=torch.bfloat16)

    def walked(
        dtype=1,
        num=n,
        size=h,
        stride=h,
        first=0,
        words=v,
        vocab=v,
        at=target,
        cap=0.0,
        packed=packed,
        of_weight=1,
    ):
        own = native.Head(None, cap, 1.0)
        return lib.strop_head_walk(
            None if packed is None else packed.data_ptr(), w.data_ptr(), dtype, of_weight, num, size, stride,
            first, words, vocab, at.data_ptr(), ctypes.byref(own), ctypes.byref(walk), None, None,
            scratch.data_ptr(),
        )  # fmt: skip

    dtype_, shape_, target_, null_ = 1, 2, 3, 5
    assert walked(dtype=2) == walked(dtype=9) == walked(of_weight=2) == walked(dtype=0) == dtype_
    assert walked(num=-1) == walked(size=0) == walked(stride=h - 1) == walked(size=15) == shape_
    assert walked(first=-12) == walked(first=5, words=12) == walked(words=v + 1) == walked(words=0) == shape_
    assert walked(cap=float("nan")) == walked(cap=-1.0) == shape_
    assert walked(at=target + v) == walked(at=target - v) == target_
    assert walked(packed=None) == null_
    assert all(bool((r == 7.0).all()) for r in rows)
    assert walked(num=0) == 0
    grad = lambda at: lib.strop_head_grad(  # noqa: E731
        packed.data_ptr(), w.data_ptr(), 1, 1, n, h, h, 0, v, v, at.data_ptr(), ctypes.byref(head_),
        lse.data_ptr(), lse.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    assert grad(target + v) == target_
    assert lib.strop_head_pack(x.data_ptr(), 1, n, h, h, None) == null_
    assert bool((out == 7.0).all())
    assert lib.strop_head_pack(x.data_ptr(), 1, n, h, h, packed.data_ptr()) == 0
    assert grad(target) == 0  # a gradient of 0 gives exactly 0
    assert not out.any()
