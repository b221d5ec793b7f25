"""Compile the native libraries: python -m tools.build_kernels [--cpu] [--cuda] [--log] [--crash] [--shim]

Each library is one compiler call on plain C++ or CUDA sources, and fits every torch: nothing of torch is
linked. Without options, what this machine has a compiler for is built; what has none is named in one line,
and strop computes the same results with PyTorch's own operations. An option asks for that library, and exits
with 78 where it cannot be built. A library is rebuilt when its sources, flags or compiler changed. Compute
nodes never compile: run this where you install (tools/setup_env.sh does), or build an image.

The libraries go to lib/ in the package that loads them (src/strop/ops/lib/), so they serve a checkout and
`pip install -e .`. --prefix puts them into the interpreter's environment instead, where strop looks next
(strop/libraries.py): for an image, over whose installed strop the job mounts a checkout. They are renamed
into place, so a job that starts meanwhile loads the old one or the new one, and any number may build at once.

g++ 9 or newer for the CPU; for CUDA nvcc 12.8 or newer: the first of PATH, /usr/local/cuda, and the packages
that `pip install -e .[nvcc]` brings. A library made by nvcc 13 needs a driver for CUDA 13 (580 or newer), one
made by nvcc 12 runs with older drivers too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from strop import libraries
from strop.errors import UserError
from tools import command_line

ROOT = Path(__file__).resolve().parents[1]
CUDA_HOME = Path("/usr/local/cuda")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "compute_100")
"""A100, H100 and B200 as machine code, and PTX, from which a driver makes code for what is newer."""
COMMON = ("-std=c++17", "-O3", "-shared")
HOST = ("-fPIC", "-Wall", "-Wextra")


@dataclass(frozen=True)
class Library:
    """One shared library, and how it is made."""

    name: str
    """libstrop_<name>.so, and the option that asks for it."""
    package: str
    """Who loads it."""
    sources: tuple[str, ...]
    """In the package's csrc/; the first one names what is compiled."""
    compiler: str
    """g++ or nvcc"""
    flags: tuple[str, ...]
    by_default: bool = True

    @property
    def folder(self) -> Path:
        return ROOT / "src" / self.package.replace(".", "/")

    @property
    def paths(self) -> list[Path]:
        return [self.folder / "csrc" / source for source in self.sources]

    def target(self, in_prefix: bool) -> Path:
        return libraries.places(self.folder, self.name)[1 if in_prefix else 0]


LIBRARIES = (
    Library("cpu", "strop.ops", ("cpu.cpp",), "g++", (*COMMON, *HOST, "-fopenmp")),
    Library("log", "strop.obs", ("merge.cpp", "log_text.cpp"), "g++", (*COMMON, *HOST)),
    Library("crash", "strop.obs", ("crash.cpp",), "g++", (*COMMON, *HOST)),
    Library(
        "cuda",
        "strop.ops",
        ("kernels.cu",),
        "nvcc",
        (*COMMON, f"-Xcompiler={','.join(HOST)}", "-Xptxas=-v", "--cudart=static"),
    ),
    Library(
        "shim",
        "strop.ops",
        ("kernels.cu",),
        "g++",
        # a longjmp to another fiber's stack is what _FORTIFY_SOURCE takes for an attack
        (*COMMON, *HOST, "-U_FORTIFY_SOURCE", "-x", "c++"),
        by_default=False,
    ),
)


class CannotBuildError(UserError):
    """The compiler fails; the message says at what."""


class NoCompilerError(CannotBuildError):
    """There is none."""


# ---- Compilers


def packaged_nvcc() -> list[Path]:
    """nvcc of NVIDIA's Python packages, in this interpreter's environment."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return [path for place in places for path in sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True)]


def find_compiler(kind: str) -> str:
    """Path of g++ or nvcc. Raises NoCompilerError."""
    found = shutil.which(kind)
    if found:
        return found
    if kind == "nvcc":
        for path in (CUDA_HOME / "bin/nvcc", *packaged_nvcc()):
            if os.access(path, os.X_OK):
                return str(path)
        raise NoCompilerError("no nvcc here (a CUDA toolkit, or `pip install -e .[nvcc]`)")
    raise NoCompilerError("no g++ here")


@functools.cache
def compiler_version(path: str) -> str:
    """What `--version` prints."""
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def cuda_version(text: str) -> Optional[tuple[int, int]]:
    """(13, 0) from nvcc's --version, or from torch's version.py."""
    found = re.search(r"(?:release |^cuda\b[^\n']*')(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def torch_cuda_version() -> Optional[tuple[int, int]]:
    """The CUDA that torch is built for, without importing it; None for none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return cuda_version((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))


def driver_note(nvcc: str) -> str:
    """What to know where nvcc is of a newer CUDA than torch: the driver may be too old for it."""
    ours, torchs = cuda_version(compiler_version(nvcc)), torch_cuda_version()
    if ours and torchs and ours[0] > torchs[0]:
        return f"; torch is for CUDA {torchs[0]}: this library needs a driver for CUDA {ours[0]}"
    return ""


def command(library: Library, architectures: tuple[str, ...], strict: bool = False) -> list[str]:
    """The compiler and its flags, without the output; strict: warnings are errors. Raises NoCompilerError."""
    find_compiler("g++")  # nvcc needs it too
    compiler = find_compiler(library.compiler)
    words = [compiler, *library.flags]
    if library.compiler == "nvcc":
        words += [f"-L{Path(compiler).resolve().parent.parent / 'lib'}", "--threads=0"]
        for name in architectures:
            virtual = name.replace("sm_", "compute_")
            words.append(f"-gencode=arch={virtual},code={name}")
    if strict:
        words += (
            ["--Werror=all-warnings", "-Xcompiler=-Werror"] if library.compiler == "nvcc" else ["-Werror"]
        )
    return [*words, *map(str, library.paths)]


# ---- One library


def dependencies(path: Path) -> set[Path]:
    """The source and what it includes by a quoted name, directly or not."""
    found = {path}
    for name in re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        if (path.parent / name).exists():
            found |= dependencies(path.parent / name)
    return found


def digest(library: Library, words: list[str]) -> str:
    """What the library depends on: its sources, the command and the compiler."""
    hashed = hashlib.sha256()
    for path in sorted(set().union(*map(dependencies, library.paths))):
        hashed.update(f"{path.name}\0".encode() + path.read_bytes())
    here = [word.replace(str(ROOT), "") for word in words]
    hashed.update("\0".join([*here, compiler_version(words[0])]).encode())
    return hashed.hexdigest()


def trailer(wanted: str) -> bytes:
    """Ends a library's file, where loaders don't look: content and digest are renamed into place as one."""
    return f"\nstrop digest {wanted}\n".encode()


def is_current(target: Path, wanted: str) -> bool:
    return target.exists() and target.read_bytes().endswith(trailer(wanted))


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture."""

    name: str
    architecture: str
    spilled_bytes: int
    registers: int


def read_ptxas(log: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    pattern = (
        r"Compiling entry function '([^']+)' for '([^']+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(name, architecture, int(stores) + int(loads), int(registers))
        for name, architecture, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    ]


@dataclass(frozen=True)
class Built:
    """A library that was compiled."""

    num_bytes: int
    seconds: float
    kernels: list[Kernel]
    note: str

    @property
    def spilling(self) -> list[str]:
        """Kernels that keep registers in memory: their loads no longer set their speed."""
        return [
            f"{k.name} on {k.architecture} ({k.spilled_bytes} bytes)" for k in self.kernels if k.spilled_bytes
        ]

    def __str__(self) -> str:
        line = f"{self.num_bytes / 2**20:.2f} MiB in {self.seconds:.1f} s"
        if self.kernels:
            spills = f"spills in {', '.join(self.spilling)}" if self.spilling else "no spills"
            most = max(k.registers for k in self.kernels)
            line += f"; {len(self.kernels)} kernels, {spills}, at most {most} registers"
        return line + self.note


def build(
    library: Library,
    target: Path,
    architectures: tuple[str, ...],
    force: bool = False,
    strict: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> Optional[Built]:
    """Compile `library` to `target`; None where it is there already. `on_start` is called before the wait.

    Raises CannotBuildError, with the compiler's output.
    """
    words = command(library, architectures, strict)
    wanted = digest(library, words)
    if not force and is_current(target, wanted):
        return None
    on_start()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    start = time.monotonic()
    done = subprocess.run(
        [*words, "-o", str(aside)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        aside.unlink(missing_ok=True)
        raise CannotBuildError(
            f"{Path(words[0]).name} fails on {library.sources[0]}:\n{done.stdout.rstrip()}"
        )
    with open(aside, "ab") as file:
        file.write(trailer(wanted))
        os.fsync(file.fileno())
    num_bytes = aside.stat().st_size
    os.replace(aside, target)
    note = driver_note(words[0]) if library.compiler == "nvcc" else ""
    return Built(num_bytes, time.monotonic() - start, read_ptxas(done.stdout), note)


# ---- The command


def parse_arguments() -> argparse.Namespace:
    parser = command_line.command_parser(__doc__)
    for library in LIBRARIES:
        what = (
            "the CUDA kernels for tests on the CPU"
            if library.name == "shim"
            else f"from {library.sources[0]}"
        )
        parser.add_argument(
            f"--{library.name}", action="store_true", help=f"libstrop_{library.name}.so, {what}"
        )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="NAME",
        help=f"sm_.. for machine code, compute_.. for PTX; repeatable (default: {ARCHITECTURES})",
    )
    parser.add_argument("--prefix", action="store_true", help="into the interpreter's environment")
    parser.add_argument("--force", action="store_true", help="rebuild what is up to date")
    parser.add_argument(
        "--strict", action="store_true", help="fail on a compiler's warning, and if a kernel spills registers"
    )
    parser.add_argument("--quiet", action="store_true", help="print only what was built or failed to compile")
    args = parser.parse_args()
    for name in args.arch or ():
        if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
            raise UserError(f"--arch {name}: architectures are named like sm_90a or compute_100")
    return args


def main() -> None:
    args = parse_arguments()
    asked = [library for library in LIBRARIES if getattr(args, library.name)]
    usual = [library for library in LIBRARIES if library.by_default]
    architectures = tuple(args.arch or ARCHITECTURES)
    problems: dict[str, list[str]] = {}
    for library in asked or usual:
        label = f"libstrop_{library.name}.so"
        try:
            built = build(
                library,
                library.target(args.prefix),
                architectures,
                args.force,
                args.strict,
                functools.partial(print, f"compiling {library.sources[0]}: ", end="", flush=True),
            )
        except CannotBuildError as error:
            if not isinstance(error, NoCompilerError):
                print("failed", flush=True)
            if asked or not (args.quiet and isinstance(error, NoCompilerError)):
                problems.setdefault(str(error), []).append(label)
            continue
        if built or not args.quiet:
            print(f"{label}, {built}" if built else f"{label} is up to date", flush=True)
        if built and built.spilling and args.strict:
            problems.setdefault("registers spill to memory", []).append(label)
    lines = [f"not built: {', '.join(labels)}: {problem}" for problem, labels in problems.items()]
    if asked and lines:
        raise CannotBuildError("\n".join(lines))
    for line in lines:
        print(f"{line}; strop does the same without, more slowly")


if __name__ == "__main__":
    command_line.run(main)
