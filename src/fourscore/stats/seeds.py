"""What the recipe would do again: an interval over training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from fourscore.files import FourscoreError

FEWEST_SEEDS = 5


@dataclass(frozen=True)
class SeedInterval:
    """Mean difference over seeds, with one-sided bounds at the confidence asked; None where too few seeds say anything."""

    mean: float
    low: float | None
    high: float | None
    note: str


def seeds_interval(differences: Sequence[float], confidence: float = 0.95) -> SeedInterval:
    """Student's t on seeds - 1 degrees of freedom; under five seeds the bounds are unknown (None) and the note says so."""
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or len(d) == 0 or not np.all(np.isfinite(d)):
        raise FourscoreError(f"differences over seeds {list(differences)}", where="seeds", todo="give one finite difference a seed")
    mean = float(d.mean())
    if len(d) < FEWEST_SEEDS:
        return SeedInterval(
            mean,
            None,
            None,
            f"{len(d)} seed{'s' if len(d) > 1 else ''}: how the recipe would do again is unknown under {FEWEST_SEEDS} seeds",
        )
    half = float(special.stdtrit(len(d) - 1, confidence)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    return SeedInterval(mean, mean - half, mean + half, f"Student's t over {len(d)} seeds")
