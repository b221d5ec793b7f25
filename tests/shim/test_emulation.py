"""The shim itself: does it find what a GPU would punish? And do our kernels depend on who runs first?"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.shim import abi
from tests.shim.abi import BF16, HeadSettings, Matrix, Walk, copied
from tools import build_kernels

KERNELS = """
#include "shim.h"

// every thread's number is read by its neighbour: with and without the barrier between
template <bool BARRIER>
__global__ void neighbours(int* out) {
    __shared__ int shared[64];
    shared[threadIdx.x] = -1;
    __syncthreads();
    shared[threadIdx.x] = 64 * blockIdx.x + threadIdx.x;
    if (BARRIER) __syncthreads();
    out[64 * blockIdx.x + threadIdx.x] = shared[(threadIdx.x + 1) % 64];
    __syncthreads();
}

__global__ void half_a_barrier() { if (threadIdx.x < 32) __syncthreads(); }

__global__ void half_a_warp() { if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1, 1); }

__global__ void butterfly(int* out) {
    int sum = threadIdx.x;
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    out[threadIdx.x] = sum;
}

extern "C" void run(int what, int* out) {
    void* stream = nullptr;
    if (what == 0) { STROP_LAUNCH(neighbours<true>, 3, 64, stream, out); }
    if (what == 1) { STROP_LAUNCH(neighbours<false>, 3, 64, stream, out); }
    if (what == 2) { STROP_LAUNCH(half_a_barrier, 1, 64, stream); }
    if (what == 3) { STROP_LAUNCH(half_a_warp, 1, 64, stream); }
    if (what == 4) { STROP_LAUNCH(butterfly, 1, 64, stream, out); }
    if (what == 5) { STROP_LAUNCH(butterfly, 1, 48, stream, out); }
}

int main(int, char** words) { int out[192]; run(atoi(words[1]), out); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """run() as a library, and as a program that may die."""
    folder = tmp_path_factory.mktemp("shim")
    source, target = folder / "kernels.cu", folder / "kernels"
    source.write_text(KERNELS)
    flags = next(one for one in build_kernels.LIBRARIES if one.name == "shim").flags
    command = ["g++", *flags, f"-I{repo}/src/strop/ops/csrc", str(source), "-o"]
    subprocess.run([*command, f"{target}.so"], check=True)
    subprocess.run([word for word in command if word != "-shared"] + [str(target)], check=True)
    return target


def numbers_of(program: Path, what: int, reverse: int) -> np.ndarray:
    library = ctypes.CDLL(f"{program}.so")
    library.strop_shim_reverse(reverse)
    out = np.zeros(192, np.int32)
    library.run(what, ctypes.c_void_p(out.ctypes.data))
    return out


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_barrier_is_one(program, reverse):
    expected = np.roll(np.arange(192).reshape(3, 64), -1, axis=1).ravel()
    assert (numbers_of(program, 0, reverse) == expected).all()


def test_a_race_shows_when_the_order_changes(program):
    assert (numbers_of(program, 1, 0) != numbers_of(program, 1, 1)).any()


@pytest.mark.parametrize("reverse", [0, 1])
def test_shuffles_stay_within_a_warp(program, reverse):
    sums = numbers_of(program, 4, reverse)[:64]
    assert (sums == np.repeat([sum(range(32)), sum(range(32, 64))], 32)).all()


@pytest.mark.parametrize(
    ("what", "words"),
    [(2, "not reached by all threads"), (3, "not reached by all threads"), (5, "bad launch configuration")],
)
def test_what_would_hang_a_gpu_ends_with_a_message(program, what, words):
    done = subprocess.run([str(program), str(what)], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0
    assert words in done.stderr


@pytest.mark.parametrize("vocab", [33, 1000, 9001])
def test_our_kernels_give_the_same_bits_in_either_order(shim, vocab):
    generator = np.random.default_rng(vocab)
    values, bias = generator.normal(size=(3, vocab)), copied(generator.normal(size=vocab), np.float32)
    targets, lse = copied([0, vocab - 1, 5], np.int64), copied(np.full(3, 7.0), np.float32)
    grad, cu_seqlens = copied([1.0, 0.0, -3.0], np.float32), copied([0, 1, 1, vocab], np.int32)
    found = []
    for reverse in (0, 1):
        shim.c.strop_shim_reverse(reverse)
        x, walk, head = Matrix.of(values, BF16), Walk(3), HeadSettings(bias, 3.0, 0.5)
        sums, parts = copied(np.zeros(vocab), np.float32), abi.guarded(3, np.float32)
        assert shim.walk(x, targets, walk, head) == abi.OK
        assert shim.grad(x, x, targets, lse, grad, head, bias_grad=sums) == abi.OK
        assert shim.segment_sum(bias, cu_seqlens, parts) == abi.OK
        found.append([*walk.bits(), x.raw.tobytes(), sums.tobytes(), parts.tobytes()])
    shim.c.strop_shim_reverse(0)
    assert found[0] == found[1]
