"""An installation whose torch or transformers is too old, as its metadata says it."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys

import pytest

from strop import packages
from strop.errors import EXIT_USER

COMMANDS = (("strop.train", "sft", "run.dir={}/runs"), ("tools.doctor", "--algo", "dpo"))


def test_the_bounds_are_those_of_the_installation(repo):
    parser = configparser.ConfigParser()
    parser.read(repo / "setup.cfg")
    asked = dict(line.split(">=") for line in parser["options"]["install_requires"].split())
    assert {name: tuple(map(int, asked[name].split("."))) for name in packages.OLDEST} == packages.OLDEST
    readme = (repo / "README.md").read_text()
    assert f"PyTorch {asked['torch']} or newer, transformers {asked['transformers']} or newer" in readme


@pytest.mark.parametrize("command", COMMANDS, ids=[c[0] for c in COMMANDS])
@pytest.mark.parametrize(
    ("name", "version", "is_refused"),
    [
        ("torch", "2.8.1+cu126", True),
        ("transformers", "4.57.6", True),
        ("torch", "2.9.0a0+145a3a7bda.nv25.10", False),  # NVIDIA's image, an alpha by its name
        ("torch", "2.10.0", False),  # less than 2.9 as text
    ],
)
def test_an_old_package_is_named_before_it_is_imported(repo, tmp_path, command, name, version, is_refused):
    info = tmp_path / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    words = [word.format(tmp_path) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{repo / 'src'}"},
        capture_output=True,
        text=True,
    )
    if is_refused:
        assert done.returncode == EXIT_USER
        needed = ".".join(map(str, packages.OLDEST[name]))
        assert f"error: {name} {version} of {sys.executable} is too old: strop needs {needed}" in done.stderr
        assert not list(tmp_path.glob("runs/*"))
    else:
        assert "too old" not in done.stderr
        assert "imported" in done.stderr


def test_a_missing_package_is_named(repo, tmp_path):
    """Another interpreter than the environment's, say."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", "from strop import packages; packages.check()"],
        env={"PYTHONPATH": str(repo / "src"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert f"UserError: torch is not installed for {sys.executable}: strop needs 2.9 or newer" in done.stderr
