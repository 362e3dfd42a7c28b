"""The paired difference of two arms on the same items, with one-sided bounds that hold under clustering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.clusters import Array, Grouping, groupings, jackknife_variance
from fourscore.stats.score import score_low, score_statistic

_PLANNED_POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Mean difference a - b over the same items. `low` and `high` are one-sided bounds, each at `confidence`."""

    difference: float
    low: float
    high: float
    confidence: float
    standard_error: float
    degrees_of_freedom: float
    items: int
    clusters: tuple[int, ...]
    discordant: tuple[int, int]
    smallest_effect: float
    method: str
    mean_a: float
    mean_b: float
    p_superiority: float
    gain: float  # mean of the positive parts of a - b: for 0/1 scores the share of items only a got right
    loss: float  # mean of the negative parts, likewise for b
    effective_items: float  # independent items that would be as informative

    def p_above(self, delta: float) -> float:
        """One-sided p-value against 'the true difference is at most `delta`'; at most 1 - confidence exactly when low >= delta."""
        t = float(score_statistic(self.gain, self.loss, self.effective_items, delta))
        return float(special.stdtr(self.degrees_of_freedom, -t)) if math.isfinite(self.degrees_of_freedom) else float(special.ndtr(-t))


@dataclass(frozen=True)
class Bounds:
    """The statistics of a batch of studies, each [studies]."""

    difference: Array
    gain: Array
    loss: Array
    low: Array
    high: Array
    standard_error: Array
    degrees_of_freedom: Array
    effective_items: Array


def paired_bounds(differences: Array, groups: tuple[Grouping, ...], confidence: float) -> Bounds:
    """Bounds for a batch of studies that share one layout. `differences` [studies, items], in [-1, 1]."""
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    gain = np.maximum(differences, 0).mean(axis=1)
    loss = np.maximum(-differences, 0).mean(axis=1)
    spread = gain + loss - (gain - loss) ** 2
    if groups:
        variances = [jackknife_variance(differences, g) for g in groups]
        variance = (
            variances[0] if len(groups) == 1 else np.max([variances[0], variances[1], variances[0] + variances[1] - variances[2]], axis=0)
        )
        df = float(min(g.count for g in groups) - 1)
        fallback = min(g.effective for g in groups)
    else:
        variance = differences.var(axis=1, ddof=1) / n if n > 1 else np.full(len(mean), np.nan)
        df, fallback = float(n - 1), float(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where((variance > 0) & (spread > 0), spread / variance, fallback)
    critical = special.stdtrit(df, confidence)
    low = score_low(gain, loss, effective, critical)
    high = -score_low(loss, gain, effective, critical)
    return Bounds(gain - loss, gain, loss, low, high, np.sqrt(variance), np.full(len(mean), df), effective)


def _scores(values: Sequence[float], name: str) -> Array:
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 1:
        raise FourscoreError(
            f"scores of arm {name} have {scores.ndim} dimensions", where="paired difference", todo="give one score an item"
        )
    bad = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(bad):
        raise FourscoreError(
            f"arm {name}, item {bad[0] + 1} of {len(scores)}: score {scores[bad[0]]}",
            where="paired difference",
            todo="scores must be numbers from 0 to 1",
        )
    return scores


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Sequence[Any]] | None = None, confidence: float = 0.95
) -> Paired:
    """The mean of a - b with a lower and an upper one-sided bound. See docs/statistics.md.

    a, b: [items] scores in [0, 1] of the same items; clusters: for each item a tuple of one or two labels, or None.
    """
    first, second = _scores(a, "a"), _scores(b, "b")
    if len(first) != len(second):
        raise FourscoreError(
            f"{len(first)} scores against {len(second)}", where="paired difference", todo="both arms must answer the same items"
        )
    if len(first) < 2:
        raise FourscoreError(f"{len(first)} items", where="paired difference", todo="a difference needs at least two items")
    if not 0.5 < confidence < 1:
        raise FourscoreError(f"confidence {confidence}", where="paired difference", todo="give a number between 0.5 and 1, such as 0.95")
    groups = groupings(clusters, len(first))
    d = first - second
    found = paired_bounds(d[None, :], groups, confidence)
    df, error = float(found.degrees_of_freedom[0]), float(found.standard_error[0])
    t = score_statistic(found.gain[0], found.loss[0], found.effective_items[0], 0.0)
    return Paired(
        difference=float(found.difference[0]),
        low=float(found.low[0]),
        high=float(found.high[0]),
        confidence=confidence,
        standard_error=error,
        degrees_of_freedom=df,
        items=len(d),
        clusters=tuple(g.count for g in groups[:2]),
        discordant=(int((d > 0).sum()), int((d < 0).sum())),
        smallest_effect=float((special.stdtrit(df, confidence) + special.stdtrit(df, _PLANNED_POWER)) * error),
        method="Tango score interval" if not groups else f"{'two' if len(groups) > 1 else 'one'}-way cluster score interval",
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        p_superiority=float(special.stdtr(df, -t)),
        gain=float(found.gain[0]),
        loss=float(found.loss[0]),
        effective_items=float(found.effective_items[0]),
    )
