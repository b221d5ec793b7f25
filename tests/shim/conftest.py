"""The libraries that these tests run over: kernels.cu through the shim, and the CPU's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.shim import abi
from tools import build_kernels

NAMES = ("shim", "cpu")
# thousands of small calls: threads that spin between them would take each other's processor
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def built(name: str) -> Path:
    """The library, compiled now if it is not up to date."""
    library = next(library for library in build_kernels.LIBRARIES if library.name == name)
    target = library.target(in_prefix=False)
    build_kernels.build(library, target, ())
    return target


def sources_exist(name: str) -> bool:
    return next(one for one in build_kernels.LIBRARIES if one.name == name).paths[0].exists()


@pytest.fixture(scope="session", params=[name for name in NAMES if sources_exist(name)])
def lib(request: pytest.FixtureRequest) -> abi.Library:
    return abi.Library(request.param, built(request.param))


@pytest.fixture(scope="session")
def shim() -> abi.Library:
    return abi.Library("shim", built("shim"))
