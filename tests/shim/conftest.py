"""The libraries that these tests run over: kernels.cu through the shim, and the CPU's own;
and where there is a GPU, kernels.cu on that."""

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
    recipe = next(one for one in build_kernels.LIBRARIES if one.name == name)
    target = recipe.target(in_prefix=False)
    build_kernels.build(recipe, target, build_kernels.ARCHITECTURES)
    return target


def sources_exist(name: str) -> bool:
    return next(one for one in build_kernels.LIBRARIES if one.name == name).paths[0].exists()


def library(name: str) -> abi.Library:
    kind = abi.GpuLibrary if name == "cuda" else abi.Library
    return kind(name, built(name))


PARAMETERS = [name for name in NAMES if sources_exist(name)]


@pytest.fixture(scope="session", params=[*PARAMETERS, pytest.param("cuda", marks=pytest.mark.gpu)])
def lib(request: pytest.FixtureRequest) -> abi.Library:
    return library(request.param)


@pytest.fixture(scope="session")
def shim() -> abi.Library:
    return library("shim")
