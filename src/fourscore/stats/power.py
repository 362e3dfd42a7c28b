"""What a study can show before any data exists."""

from __future__ import annotations

import math

from scipy import special

from fourscore.files import FourscoreError

POWER = 0.8


def smallest_effect_before(
    items: int, clusters: int | None = None, discordance: float = 0.2, correlation: float = 0.1, confidence: float = 0.95
) -> float:
    """Smallest true difference that `items` items in `clusters` clusters would show with 80% power.

    `discordance` is the guessed share of items on which the arms differ, `correlation` the guessed intra-cluster correlation.
    """
    groups = items if clusters is None else clusters
    if items < 2 or not 2 <= groups <= items or not 0 < discordance <= 1 or not 0 <= correlation <= 1:
        raise FourscoreError(
            f"{items} items, {groups} clusters, discordance {discordance}, correlation {correlation}",
            where="smallest effect",
            todo="give at least two items in at least two clusters and shares from 0 to 1",
        )
    spread = discordance * (1 + (items / groups - 1) * correlation)
    df = groups - 1
    return min(1.0, float(special.stdtrit(df, confidence) + special.stdtrit(df, POWER)) * math.sqrt(spread / items))
