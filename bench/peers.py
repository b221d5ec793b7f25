"""What benchmarks are compared with, in environments of their own that borrow this interpreter's packages, so
that all sides use the same torch and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

TRL, LIGER = "1.16.0", "0.8.5"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "strop/bench"
ENV = CACHE / f"trl-{TRL}-liger-{LIGER}"


def interpreter(folder: Path = ENV) -> Path:
    """Python with TRL and Liger-Kernel; of the latter's dependencies triton is left out, which its losses do
    not need on a CPU."""
    return environment(folder, [f"trl=={TRL}", "accelerate"], [f"liger-kernel=={LIGER}"])


def environment(folder: Path, packages: Sequence[str], alone: Sequence[str]) -> Path:
    """Python of an environment, made at its first use, with `packages` and, without what they depend on,
    `alone`. CalledProcessError if they cannot be installed."""
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    print(f"installing {', '.join([*packages, *alone])} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet"]
    for names in (packages, ["--no-deps", *alone]):
        if any(not name.startswith("-") for name in names):
            subprocess.run([*install, *names], check=True)
    (folder / "ready").touch()
    return python
