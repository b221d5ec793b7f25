"""Whether the packages that strop stands on are new enough, before any of them is imported: an old one fails
with the name of something inside that nobody knows. What else is asked of them is in setup.cfg."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from strop.errors import UserError

OLDEST = {"torch": (2, 9), "transformers": (5, 0)}
"""As in setup.cfg, which a checkout that is not installed cannot ask."""


def check() -> None:
    """Raises UserError naming a package that is missing or too old, and the interpreter."""
    for name, oldest in OLDEST.items():
        needed = f"strop needs {'.'.join(map(str, oldest))} or newer"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed for {sys.executable}: {needed}") from None
        # 2.9.0a0+nv25.10, as NVIDIA's images have it, is a 2.9
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < oldest:
            raise UserError(f"{name} {found} of {sys.executable} is too old: {needed}")
