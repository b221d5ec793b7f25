"""How many rows of an unpaired set (KTO) are desirable, and what to say where that is out of balance."""

from __future__ import annotations

from strop.config import KtoConfig

LOW, HIGH = 1.0, 4 / 3
"""Between these λ_D n_D / (λ_U n_U) should lie; Ethayarajh et al. 2024 (KTO), equation 8."""
ROUNDING = 0.005
"""Weights are given with two digits."""


def imbalance(num_good: int, num_bad: int, config: KtoConfig) -> str | None:
    """What to say about desirable and undesirable rows; None where their weights balance them."""
    if not (num_good and num_bad):
        only = "desirable" if num_good else "undesirable"
        rows = f"all {num_good + num_bad:,} rows are" if num_good + num_bad > 1 else "the only row is"
        return f"{rows} {only}: nothing shows the model the other kind"
    good, bad = config.desirable_weight * num_good, config.undesirable_weight * num_bad
    if LOW - ROUNDING <= good / bad <= HIGH + ROUNDING:
        return None
    return (
        f"{num_good:,} desirable and {num_bad:,} undesirable rows, weighted {good / bad:.2f} to 1, which "
        f"should be 1 to {HIGH:.2f}: set kto.desirable_weight between {LOW * bad / num_good:.2f} and "
        f"{HIGH * bad / num_good:.2f}, or kto.undesirable_weight between {good / HIGH / num_bad:.2f} and "
        f"{good / LOW / num_bad:.2f}"
    )
