"""Memory that comes back: never while somebody still sees it, and no more of it than is said."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from strop.ops import workspace

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(workspace, "_allocator_keeps_memory", lambda: False)
    workspace._idle.clear()
    yield
    workspace._idle.clear()


def of(mib: int) -> torch.Tensor:
    return workspace.empty([mib, MIB // 2], torch.bfloat16, CPU)


def test_memory_comes_back_when_the_last_view_dies():
    x = of(32)
    address, part = x.data_ptr(), x[3:5]
    del x
    other = of(32)
    assert other.data_ptr() != address
    part.fill_(7.0)
    other.fill_(1.0)
    assert part.eq(7.0).all()
    del part
    assert of(31).data_ptr() == address


def test_a_graph_keeps_what_it_saved():
    x = of(16)
    address = x.data_ptr()
    x.fill_(2.0)
    w = torch.ones(MIB // 2, dtype=torch.bfloat16, requires_grad=True)
    y = (x * w).sum()
    del x
    other = of(16)
    other.fill_(5.0)
    y.backward()
    assert w.grad.eq(32.0).all()
    assert of(16).data_ptr() == address


def test_too_small_a_piece_gives_way():
    small = of(16)
    del small
    big = of(64)
    assert not workspace._idle
    del big
    assert [len(m) // MIB for m in workspace._idle] == [64]


def test_no_more_than_the_largest_pieces_lie_idle():
    pieces = [of(mib) for mib in (16, 80, 48, 32)]
    del pieces
    assert [len(m) // MIB for m in workspace._idle] == [32, 48, 80]


def test_the_smallest_piece_that_fits_is_taken():
    pieces = [of(mib) for mib in (16, 80, 48)]
    addresses = [p.data_ptr() for p in pieces]
    del pieces
    assert of(33).data_ptr() == addresses[2]


def test_small_tensors_are_the_allocators():
    x = workspace.empty([3, 5], torch.float32, CPU)
    assert x.shape == (3, 5)
    assert x.dtype == torch.float32
    del x
    assert not workspace._idle


def test_many_threads():
    wrong = []

    def work(number: int) -> None:
        for _ in range(30):
            x = of(16)
            x.fill_(float(number))
            if not x.eq(float(number)).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(workspace._idle) <= workspace.MOST_IDLE


def test_beside_tcmalloc_one_piece_is_kept_for_the_largest(monkeypatch):
    """All else is left to it."""
    monkeypatch.setattr(workspace, "_allocator_keeps_memory", lambda: True)
    x = of(16)
    del x
    assert not workspace._idle
    pieces = [workspace.empty([mib, MIB], torch.uint8, CPU, largest=True) for mib in (32, 48)]
    address = pieces[1].data_ptr()
    del pieces
    assert [len(m) // MIB for m in workspace._idle] == [48]
    assert workspace.empty([33, MIB], torch.uint8, CPU, largest=True).data_ptr() == address


def test_a_tensor_that_outlives_everything_is_no_trouble_at_exit():
    program = (
        "import torch; from strop.ops import workspace\n"
        "x = workspace.empty([32, 2**20], torch.float32, torch.device('cpu')); x.fill_(1.0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert not done.stderr


def test_one_tensor_ends_the_memory_that_another_begins():
    """The first is gone with that, once, and the memory comes back after both."""
    kept = workspace.at_end([3, MIB], torch.bfloat16, CPU, room=40 * MIB)
    kept.fill_(3.0)
    assert not workspace.is_gone(kept)
    other = workspace.at_end([3, MIB], torch.bfloat16, CPU, room=40 * MIB)
    start = kept.data_ptr() + kept.nbytes - 40 * MIB
    x = workspace.over(kept, [10, MIB], torch.float32)
    assert (x.data_ptr(), x.shape, x.dtype) == (start, (10, MIB), torch.float32)
    assert workspace.is_gone(kept)
    assert not workspace.is_gone(other)
    assert workspace.over(kept, [10, MIB], torch.float32) is None
    x.zero_()
    assert not kept.any()
    del x
    assert workspace.is_gone(kept)
    assert not workspace._idle
    del kept
    assert [len(m) // MIB for m in workspace._idle] == [48]
    assert of(20).data_ptr() == start
    again = workspace.at_end([24, MIB], torch.bfloat16, CPU, room=40 * MIB)  # larger than the room
    assert again.data_ptr() == start
    assert not workspace.is_gone(again)


def test_a_tensor_from_elsewhere_gives_no_memory():
    kept = workspace.at_end([3, MIB], torch.bfloat16, CPU, room=40 * MIB)
    small = workspace.at_end([3, 5], torch.bfloat16, CPU, room=100)
    nothing = workspace.at_end([7, 0], torch.bfloat16, CPU, room=40 * MIB)
    for x in (kept.clone(), small, nothing, of(16)):
        assert workspace.over(x, [3, 5], torch.float32) is None
        assert not workspace.is_gone(x)
    assert (small.shape, nothing.shape) == ((3, 5), (7, 0))
