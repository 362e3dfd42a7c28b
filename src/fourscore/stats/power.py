"""What a study can show before any data exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.paired import POWER


def smallest_effect_before(
    items: int,
    clusters: int | Sequence[int] | None = None,
    discordance: float = 0.2,
    correlation: float | Sequence[float] = 0.1,
    confidence: float = 0.95,
) -> float:
    """Smallest true difference that would be shown with 80% power, guessed before any data exists.

    clusters: how many; two numbers where items cross; None where every item stands alone. discordance: the guessed share
    of items on which the arms differ. correlation: the guessed correlation of two items' differences within a cluster, one
    number for all groupings or one each. Design effect 1 + sum (items / clusters - 1) correlation, Student's t on the
    fewest clusters minus one; never below what a study without a discordant pair could show (3 / effective items).
    """
    counts = [items] if clusters is None else [clusters] if isinstance(clusters, int) else list(clusters)
    alike = [float(correlation)] * len(counts) if isinstance(correlation, int | float) else [float(c) for c in correlation]
    if (
        items < 2
        or len(alike) != len(counts)
        or not counts
        or not all(2 <= c <= items for c in counts)
        or not 0 < discordance <= 1
        or not all(0 <= c <= 1 for c in alike)
        or not 0.5 < confidence < 1
    ):
        raise FourscoreError(
            f"{items} items, clusters {clusters}, discordance {discordance}, correlation {correlation}, confidence {confidence}",
            where="smallest effect",
            todo="give at least two items, from two clusters to as many as items, shares from 0 to 1, a confidence above 0.5",
        )
    effective = items / (1 + sum((items / c - 1) * r for c, r in zip(counts, alike, strict=True)))
    df = min(counts) - 1
    planned = float(special.stdtrit(df, confidence) + special.stdtrit(df, POWER)) * math.sqrt(discordance / effective)
    return min(1.0, max(planned, -math.log(1 - confidence) / effective))
