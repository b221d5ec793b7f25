"""tools/build_kernels.py with a compiler that only copies: what is built when, and what is said if not.

The real compilers run in tests/shim (g++) and in .ci/run's step "kernels" (nvcc).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from strop import libraries
from tools import build_kernels

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake VERSION"; exit; fi
echo x >>{count}
for word; do last=$previous; previous=$word; done
echo "library of $*" >"$previous"
"""
PTXAS = """\
ptxas info    : Compiling entry function '_Z4walki' for 'sm_80'
ptxas info    : Function properties for _Z4walki
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes smem, 472 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4gradi' for 'sm_90a'
ptxas info    : Function properties for _Z4gradi
    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


class Bench:
    """A checkout with one source, one header, and the fake g++."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, folder / "count"
        self.csrc = folder / "src/strop/ops/csrc"
        self.csrc.mkdir(parents=True)
        (self.csrc / "cpu.cpp").write_text('#include <math.h>\n#include "strop_ops.h"\n')
        (self.csrc / "strop_ops.h").write_text("// one\n")
        (self.csrc / "other.cpp").write_text("")
        self.compiler("1")
        self.library = next(one for one in build_kernels.LIBRARIES if one.name == "cpu")

    def compiler(self, version: str) -> None:
        path = self.folder / "bin/g++"
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER.replace("VERSION", version).replace("{count}", str(self.count)))
        path.chmod(0o755)
        build_kernels.compiler_version.cache_clear()

    def build(self, force: bool = False):
        return build_kernels.build(self.library, self.library.target(False), (), force)

    @property
    def num_calls(self) -> int:
        return len(self.count.read_text().split()) if self.count.exists() else 0


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(build_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(build_kernels, "CUDA_HOME", tmp_path / "no-cuda")
    monkeypatch.setattr(build_kernels, "packaged_nvcc", lambda: [])
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return Bench(tmp_path)


def test_built_once_and_again_when_something_changed(bench):
    assert bench.build()
    assert bench.build() is None
    (bench.csrc / "other.cpp").write_text("// not ours")
    assert bench.build() is None
    (bench.csrc / "strop_ops.h").write_text("// two\n")
    assert bench.build()
    bench.library = replace(bench.library, flags=("-O0",))
    assert bench.build()
    bench.compiler("2")
    assert bench.build()
    assert bench.build(force=True)
    bench.library.target(False).write_text("somebody else's")
    assert bench.build()
    assert bench.num_calls == 6


def test_a_failing_compiler_leaves_the_old_library(bench):
    bench.build()
    before = bench.library.target(False).read_bytes()
    compiler = bench.folder / "bin/g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho half >"$7"; echo "no such thing" >&2; exit 1\n'
    )
    with pytest.raises(build_kernels.CannotBuildError, match="no such thing"):
        bench.build(force=True)
    assert bench.library.target(False).read_bytes() == before
    assert os.listdir(bench.library.target(False).parent) == ["libstrop_cpu.so"]


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["build_kernels", *words])
    status = 0
    try:
        build_kernels.command_line.run(build_kernels.main)
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_without_a_compiler(bench, monkeypatch, capsys):
    """One line and success by itself; 78 for who asked for it; nothing where only news are wanted."""
    monkeypatch.setenv("PATH", f"{bench.folder}/nothing")
    status, out, err = run(monkeypatch, capsys)
    assert (status, err) == (0, "")
    names = ", ".join(f"libstrop_{name}.so" for name in ("cpu", "log", "crash", "cuda"))
    assert out == f"not built: {names}: no g++ here; strop does the same without, more slowly\n"
    for option in ("--cpu", "--cuda"):
        status, out, err = run(monkeypatch, capsys, option)
        assert (status, out) == (78, "")
        assert "no g++ here" in err
    assert run(monkeypatch, capsys, "--quiet") == (0, "", "")


def test_nvcc_is_asked_for_every_architecture(bench, monkeypatch, capsys):
    (bench.csrc / "kernels.cu").write_text("")
    status, _, err = run(monkeypatch, capsys, "--cuda")
    assert status == 78
    assert "no nvcc here" in err
    nvcc = bench.folder / "no-cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text((bench.folder / "bin/g++").read_text())
    nvcc.chmod(0o755)
    for words, targets in (
        ((), ["80,code=sm_80", "90a,code=sm_90a", "100,code=sm_100", "100,code=compute_100"]),
        (("--arch", "sm_90a"), ["90a,code=sm_90a"]),
    ):
        assert run(monkeypatch, capsys, "--cuda", *words)[0] == 0
        text = (bench.csrc.parent / "lib/libstrop_cuda.so").read_text()
        assert [word for word in text.split() if "gencode" in word] == [
            f"-gencode=arch=compute_{target}" for target in targets
        ]
    status, _, err = run(monkeypatch, capsys, "--cuda", "--arch", "hopper")
    assert status == 78
    assert "hopper" in err


def test_the_interpreters_environment(bench, monkeypatch, capsys, tmp_path):
    """--prefix puts the library where strop looks after its own lib/."""
    monkeypatch.setattr(libraries.sys, "prefix", str(tmp_path / "environment"))
    assert run(monkeypatch, capsys, "--cpu", "--prefix")[0] == 0
    own, environment = libraries.places(bench.csrc.parent, "cpu")
    assert not own.exists()
    assert environment == tmp_path / "environment/lib/strop/libstrop_cpu.so"
    assert environment.exists()


def test_several_at_once(repo, tmp_path):
    """Four processes, one target: the library is whole and current."""
    code = (
        "import sys; from pathlib import Path; from tools import build_kernels as b\n"
        "shim = next(one for one in b.LIBRARIES if one.name == 'shim')\n"
        "b.build(shim, Path(sys.argv[1]), ())\n"
        "assert b.is_current(Path(sys.argv[1]), b.digest(shim, b.command(shim, ())))"
    )
    compiler = tmp_path / "bin/g++"
    compiler.parent.mkdir()
    slow = COMPILER.replace('echo "lib', 'sleep 0.3; echo "lib')
    compiler.write_text(slow.replace("{count}", str(tmp_path / "count")))
    compiler.chmod(0o755)
    environment = {**os.environ, "PATH": f"{compiler.parent}:/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(tmp_path / "lib/libstrop_shim.so")]
    running = [subprocess.Popen(command, cwd=repo, env=environment) for _ in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0, 0]
    assert os.listdir(tmp_path / "lib") == ["libstrop_shim.so"]


def test_what_ptxas_says():
    kernels = build_kernels.read_ptxas(PTXAS)
    assert [(k.name, k.architecture, k.spilled_bytes, k.registers) for k in kernels] == [
        ("_Z4walki", "sm_80", 0, 32),
        ("_Z4gradi", "sm_90a", 32, 255),
    ]
    built = build_kernels.Built(2**20, 1.0, kernels, "")
    assert built.spilling == ["_Z4gradi on sm_90a (32 bytes)"]
    assert "spills in _Z4gradi" in str(built)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", (13, 0)),
        ("__version__ = '2.13.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", (12, 8)),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.2'\n", None),
    ],
)
def test_cuda_versions(text, version):
    assert build_kernels.cuda_version(text) == version


def test_a_newer_nvcc_than_torchs_cuda_is_said(monkeypatch):
    monkeypatch.setattr(build_kernels, "compiler_version", lambda path: "release 13.0, V13.0.88")
    for torchs, words in (((12, 8), "driver for CUDA 13"), ((13, 0), ""), (None, "")):
        monkeypatch.setattr(build_kernels, "torch_cuda_version", lambda torchs=torchs: torchs)
        assert words in build_kernels.driver_note("nvcc")
