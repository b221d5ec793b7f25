"""bench/kernels_gpu.py where there is no GPU: it says so, and its table never fills a gap with a number."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import kernels_gpu
from bench.kernels_gpu import Figure


def test_without_a_gpu_it_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels_gpu"])
    with pytest.raises(SystemExit) as ended:
        kernels_gpu.main()
    assert ended.value.code == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert "needs an NVIDIA GPU" in err


def test_the_table():
    figures = [
        Figure("strop one_pass", "H4096 V128256", 36.0, 32.0, 512.4),
        Figure("plain bf16 full", "H4096 V128256", None, 32.0, note="OutOfMemoryError: no room"),
    ]
    _, ours, plain = kernels_gpu.table(figures).splitlines()
    assert ours.split() == ["strop", "one_pass", "H4096", "V128256", "36.000", "32.000", "1.12", "512"]
    assert plain.split() == ["plain", "bf16", "full", "H4096", "V128256", "OutOfMemoryError:", "no", "room"]
    assert figures[1].ratio is None
