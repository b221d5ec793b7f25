"""The report of `agreement.report` as plain text for people."""

from __future__ import annotations

from typing import Any, Optional

from strop.data.ledger import columns

MOST_CATEGORIES = 30


def describe(report: dict[str, Any], by: Optional[str]) -> str:
    """Accuracy, margins, calibration, agreement with ratings, and a line for each category."""
    low, high = report["accuracy_95"]
    reward, margin, bins = report["reward"], report["margin"], report["calibration"]["bins"]
    lines = [
        f"accuracy     {report['accuracy']:.4f}  (95 %: {low:.4f} to {high:.4f}; {report['pairs']:,} pairs, "
        f"{report['ties']:,} ties, which are not right)",
        f"margin       mean {margin['mean']:+.4f}, median {margin['median']:+.4f}",
        f"reward       mean {reward['mean']:+.4f}, standard deviation {reward['std']:.4f}, "
        f"{reward['min']:+.4f} to {reward['max']:+.4f}",
        *_human(report["human"]),
        f"calibration  error {report['calibration']['error']:.4f}",
        "",
        columns([("confidence", "pairs", "mean", "right"), *map(_bin, bins)]),
    ]
    categories = report["categories"]
    if by is not None:
        shown = list(categories.items())[:MOST_CATEGORIES]
        rows = [
            (
                name,
                f"{c['pairs']:,}",
                f"{c['accuracy']:.3f}",
                f"{c['accuracy_95'][0]:.3f} to {c['accuracy_95'][1]:.3f}",
                f"{c['ties']:,}",
                f"{c['margin']['mean']:+.3f}",
            )
            for name, c in shown
        ]
        lines += ["", columns([(by, "pairs", "accuracy", "95 %", "ties", "margin"), *rows])]
        if len(categories) > len(shown):
            lines.append(f"and {len(categories) - len(shown)} more (--json has them all)")
    return "\n".join(lines)


def _bin(b: dict[str, Any]) -> tuple[str, ...]:
    edges = f"{b['from']:.2f} to {b['to']:.2f}"
    return edges, f"{b['pairs']:,}", f"{b['confidence']:.3f}", f"{b['right']:.3f}"


def _human(human: dict[str, Any]) -> list[str]:
    names = (("margins", "margins with people's"), ("ratings", "rewards with people's ratings"))
    lines = []
    for key, what in names:
        if found := human[key]:
            values = ", ".join(
                f"{name.capitalize()} {'undefined' if found[name] is None else format(found[name], '+.4f')}"
                for name in ("pearson", "spearman")
            )
            lines.append(f"correlation  of {what}: {values} ({found['number']:,})")
    return lines
