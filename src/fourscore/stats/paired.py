"""The paired difference of two arms on the same items, with one-sided bounds that hold under clustering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.clusters import Array, Grouping, groupings, information
from fourscore.stats.score import corrected_statistic, score_low, studentised_shift

POWER = 0.8  # the power that `smallest_effect` and `items_needed` speak of


@dataclass(frozen=True)
class Paired:
    """Mean difference a - b over the same items. `low` and `high` are one-sided bounds, each at `confidence`.

    `clusters`: how many clusters, one number a grouping, () where every item stands alone. `discordant`: items on which a,
    and on which b, scored higher. `gain`, `loss`: means of the positive and negative parts of a - b (for 0/1 scores the
    shares of discordant items). `effective_items`: independent 0/1 items that would be as informative. `shift`: what skewed
    clusters add to the lower bound's critical value.
    `p_superiority`: one-sided, against 'a is no better than b'.
    """

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
    gain: float
    loss: float
    effective_items: float
    shift: float

    def p_above(self, delta: float) -> float:
        """One-sided p-value against 'the true difference is at most `delta`': below 1 - confidence exactly when low > delta."""
        if not -1 <= delta <= 1:
            raise FourscoreError(f"difference {delta}", where="paired difference", todo="differences of scores lie between -1 and 1")
        t = float(corrected_statistic(self.gain, self.loss, self.effective_items, delta))
        return float(special.stdtr(self.degrees_of_freedom, self.shift - t))


@dataclass(frozen=True)
class Bounds:
    """The statistics of a batch of studies, each [studies] but the degrees of freedom, which the layout fixes."""

    gain: Array
    loss: Array
    low: Array
    high: Array
    standard_error: Array
    effective_items: Array
    degrees_of_freedom: float
    shift: Array


def paired_bounds(differences: Array, groups: tuple[Grouping, ...], confidence: float) -> Bounds:
    """Bounds for a batch of studies that share one layout. `differences` [studies, items], f64 in [-1, 1]."""
    gain = np.maximum(differences, 0).mean(axis=1)
    loss = np.maximum(-differences, 0).mean(axis=1)
    spread = np.maximum(gain + loss - (gain - loss) ** 2, 0)
    known = information(differences, groups, spread)
    n, critical = known.effective_items, special.stdtrit(known.degrees_of_freedom, confidence)
    down, up = np.zeros_like(n), np.zeros_like(n)
    if known.third is not None:
        down, up = studentised_shift(gain, loss, n, known.third, critical)
    return Bounds(
        gain=gain,
        loss=loss,
        low=score_low(gain, loss, n, critical + down, corrected=True),
        high=-score_low(loss, gain, n, critical + up, corrected=True),
        standard_error=np.sqrt(spread / n),
        effective_items=n,
        degrees_of_freedom=known.degrees_of_freedom,
        shift=down,
    )


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Sequence[Any]] | None = None, confidence: float = 0.95
) -> Paired:
    """The mean of a - b with a lower and an upper one-sided bound; docs/statistics.md has the method and its simulated coverage.

    a, b: [items] scores in [0, 1] (0/1 or graded) of the same items in the same order. clusters: for each item a tuple of
    one label (items of a passage) or of two (items that cross, a clause by a question), or None. Raises FourscoreError for
    lengths that differ, fewer than two items, scores that are no number from 0 to 1, a grouping of one cluster.
    """
    first, second = _scores(a, "a"), _scores(b, "b")
    n = len(first)
    if n != len(second):
        raise _refuse(f"{n} scores of arm a against {len(second)} of arm b", "both arms must answer the same items")
    if n < 2:
        raise _refuse("no items" if n == 0 else "one item", "a difference needs at least two items")
    if not 0.5 < confidence < 1:
        raise _refuse(f"confidence {confidence}", "give a number between 0.5 and 1, such as 0.95")
    groups = groupings(clusters, n)
    d = first - second
    found = paired_bounds(d[None, :], groups, confidence)
    low, high, error = float(found.low[0]), float(found.high[0]), float(found.standard_error[0])
    gain, loss, df = float(found.gain[0]), float(found.loss[0]), found.degrees_of_freedom
    effective, shift = float(found.effective_items[0]), float(found.shift[0])
    planned = float(special.stdtrit(df, confidence) + special.stdtrit(df, POWER)) * error
    return Paired(
        difference=gain - loss,
        low=low,
        high=high,
        confidence=confidence,
        standard_error=error,
        degrees_of_freedom=df,
        items=n,
        clusters=tuple(g.count for g in groups[:2]),
        discordant=(int((d > 0).sum()), int((d < 0).sum())),
        # Without a discordant pair the error is 0, yet an effect as small as the interval would not have shown.
        smallest_effect=min(1.0, max(planned, high - gain + loss, gain - loss - low)),
        method=("score interval", "one-way cluster score interval", "", "two-way cluster score interval")[len(groups)],
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        p_superiority=float(special.stdtr(df, shift - float(corrected_statistic(gain, loss, effective, 0.0)))),
        gain=gain,
        loss=loss,
        effective_items=effective,
        shift=shift,
    )


def _scores(values: Sequence[float], arm: str) -> Array:
    try:
        scores = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise _refuse(f"arm {arm} has scores that are not numbers", "scores must be numbers from 0 to 1") from None
    if scores.ndim != 1:
        raise _refuse(f"scores of arm {arm} have {scores.ndim} dimensions", "give one score an item")
    bad = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if len(bad):
        raise _refuse(f"arm {arm}, item {bad[0] + 1} of {len(scores)} has score {scores[bad[0]]}", "scores must be numbers from 0 to 1")
    return scores


def _refuse(what: str, todo: str) -> FourscoreError:
    return FourscoreError(what, where="paired difference", todo=todo)
