"""Where the native libraries are that tools/build_kernels.py makes. Standard library only.

First lib/ in the package that loads it: a checkout's own build. Then the interpreter's environment: a
container image brings its libraries there, since the job mounts a checkout over the image's strop, which
often has none for CUDA, or was built against another C library.
"""

from __future__ import annotations

import sys
from pathlib import Path


def places(package: Path, name: str) -> list[Path]:
    """Paths of libstrop_<name>.so in the order to try them; `package` is the loading package's folder."""
    file = f"libstrop_{name}.so"
    return [package / "lib" / file, Path(sys.prefix) / "lib" / "strop" / file]
