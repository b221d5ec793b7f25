"""Where the figures of a benchmark go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, figures: Any) -> None:
    """As JSON. The folder is made: after hours of measuring its absence must not lose them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
