"""How well rewards agree with people: pure functions of the scores of P pairs, in fp64.

A pair is right where the chosen completion scores higher; a tie is not, and ties are counted. By the model's
own word (Bradley-Terry), the one with the higher score is the better with probability σ(|margin|): pairs are
sorted into bins of that confidence, and the calibration error is how far in each bin the share of right ones
is from it, on average over the pairs (Guo et al. 2017). A tie has confidence 1/2, and is half right there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

NUM_BINS = 10
"""Of equal width between confidence 1/2 and 1."""
Z_95 = 1.959963984540054
"""Quantile of the normal distribution for a 95 % interval."""


def report(
    scores_P2: np.ndarray,
    ratings_P2: np.ndarray,
    human_margins_P: np.ndarray,
    categories_P: Sequence[str],
) -> dict[str, Any]:
    """Everything that `tools.eval_rm` tells of the pairs. fp64; NaN where a row has no rating or margin.

    scores_P2, ratings_P2: chosen, rejected. human_margins_P: by how much people prefer the chosen one.
    """
    margins_P = scores_P2[:, 0] - scores_P2[:, 1]
    by_size = sorted(_members(categories_P).items(), key=lambda item: -len(item[1]))
    return {
        **of_margins(margins_P),
        "reward": {
            "mean": float(scores_P2.mean()),
            "std": float(scores_P2.std()),
            "min": float(scores_P2.min()),
            "max": float(scores_P2.max()),
        },
        "calibration": calibration(margins_P),
        "human": {
            "margins": correlations(margins_P, human_margins_P),
            "ratings": correlations(scores_P2.flatten(), ratings_P2.flatten()),
        },
        "categories": {name: of_margins(margins_P[members]) for name, members in by_size},
    }


def _members(categories_P: Sequence[str]) -> dict[str, np.ndarray]:
    """category -> its pairs in their order, int64; categories in the order of their first pairs."""
    numbers: dict[str, int] = {}
    number_P = np.array([numbers.setdefault(name, len(numbers)) for name in categories_P])
    ends = np.cumsum(np.bincount(number_P))[:-1]
    return dict(zip(numbers, np.split(np.argsort(number_P, kind="stable"), ends)))


def of_margins(margins_P: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95 % interval, ties, mean and median margin."""
    right, num = int((margins_P > 0).sum()), len(margins_P)
    return {
        "pairs": num,
        "accuracy": right / num,
        "accuracy_95": list(wilson(right, num)),
        "ties": int((margins_P == 0).sum()),
        "margin": {"mean": float(margins_P.mean()), "median": float(np.median(margins_P))},
    }


def wilson(successes: int, num: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays within [0, 1] and holds for few pairs too."""
    share, z2 = successes / num, Z_95**2
    middle = share + z2 / (2 * num)
    half = Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    return max(0.0, (middle - half) / (1 + z2 / num)), min(1.0, (middle + half) / (1 + z2 / num))


def calibration(margins_P: np.ndarray) -> dict[str, Any]:
    """{"error": expected calibration error, "bins": [{"from", "to", "pairs", "confidence", "right"}]}: the
    bins that have pairs, with their mean confidence and the share of right ones."""
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    right_P = np.where(margins_P == 0, 0.5, margins_P > 0)
    width = 0.5 / NUM_BINS
    bin_P = np.minimum(((confidence_P - 0.5) / width).astype(np.int64), NUM_BINS - 1)
    bins, error = [], 0.0
    for b in np.unique(bin_P).tolist():
        mask_P = bin_P == b
        mean, right = float(confidence_P[mask_P].mean()), float(right_P[mask_P].mean())
        error += float(mask_P.mean()) * abs(right - mean)
        edges = {"from": round(0.5 + b * width, 6), "to": round(0.5 + (b + 1) * width, 6)}
        bins.append({**edges, "pairs": int(mask_P.sum()), "confidence": mean, "right": right})
    return {"error": error, "bins": bins}


def correlations(ours_N: np.ndarray, theirs_N: np.ndarray) -> Optional[dict[str, Any]]:
    """{"number", "pearson", "spearman"} over the entries that people have rated; None where none are."""
    rated_N = ~np.isnan(theirs_N)
    a_N, b_N = ours_N[rated_N], theirs_N[rated_N]
    if not len(a_N):
        return None
    return {"number": len(a_N), "pearson": pearson(a_N, b_N), "spearman": pearson(ranks(a_N), ranks(b_N))}


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> Optional[float]:
    """None where one of them is the same everywhere."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    size = math.sqrt(float((a_N**2).sum()) * float((b_N**2).sum()))
    return float((a_N * b_N).sum()) / size if size > 0 else None


def ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks from 1 as fp64; equal values share the mean of theirs."""
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group_N]
