"""One finding, and how the findings of a section are collected."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    level: str
    """ok; warn: it will run, but look at it; FAIL: the job would end with an error."""
    name: str
    """What was looked at, in one or two words."""
    text: str
    """What was found."""
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""


@dataclass
class Checks:
    """Findings in the order in which they were made."""

    found: list[Check] = field(default_factory=list)

    def ok(self, name: str, text: str) -> None:
        self.found.append(Check("ok", name, text))

    def warn(self, name: str, text: str, advice: str = "") -> None:
        self.found.append(Check("warn", name, text, advice))

    def fail(self, name: str, text: str, advice: str = "") -> None:
        self.found.append(Check("FAIL", name, text, advice))


def gib(num_bytes: float) -> str:
    """ "1.50 GiB", "43.2 MiB"."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
