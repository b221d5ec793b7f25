"""Loss curves of SFT and DPO on the toy, bit for bit. Those of the others stand beside their own tests."""

from __future__ import annotations

import pytest

from tests import toy as t

GOLDEN = {
    "sft": [
        7.434172346785262,
        7.287745443622717,
        7.068128458658854,
        7.464938077059659,
        7.150570616430166,
        7.1965212140764505,
    ],
    "dpo": [
        0.6931471824645996,
        0.6890340646107992,
        0.6919116179148356,
        0.6845037539800009,
        0.5922014911969503,
        0.5421629945437113,
    ],
}
"""fp32 on an x86 CPU; other kernels round the last digits otherwise."""


@pytest.mark.parametrize("algo", GOLDEN)
def test_golden_loss_curve(ranks, toy, tmp_path, algo):
    """The same model, rows and seed give these losses; twice on one machine to the last bit."""
    runs = []
    for name in ("a", "b"):
        sections = {"data": {"train": str(toy / t.FOLDERS[algo]), "cache_dir": str(tmp_path / name)}}
        file = t.config(toy, algo, tmp_path / f"{name}.yaml", optim={"lr": 1e-4}, **sections)
        runs.append(ranks.run(algo, file, f"{tmp_path.name}-{name}", world_size=2).run_dir)
    first, second = runs
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert [line["loss"] for line in t.metrics(first)] == pytest.approx(GOLDEN[algo], rel=1e-6)
