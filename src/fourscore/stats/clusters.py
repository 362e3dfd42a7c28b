"""How many independent items a clustered study is worth.

Knows differences and cluster labels; knows nothing about models, tasks or verdicts. Everything takes a batch of studies
at once (`differences` is [studies, items]), so that the simulation in bench/statistics.py runs this very code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourscore.files import FourscoreError

Array = np.ndarray[Any, np.dtype[Any]]

# After how many clusters with a difference in them the data, no longer caution, say how alike a cluster's items are.
# Chosen by simulation of rare, one-sided discordance in clusters: lowest coverage 90% at 2, 92% at 3, 93.8% at 5.
CAUTION_CLUSTERS = 6.0


@dataclass(frozen=True)
class Grouping:
    """One way of grouping items: `code` [items] is each item's cluster, 0 to `count` - 1; `sizes` [count] are items a cluster."""

    code: Array
    sizes: Array

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def effective(self) -> float:
        """Kish's effective number of clusters, (sum m)^2 / sum m^2: how many clusters of equal size would weigh as much."""
        m = self.sizes.astype(float)
        return float(m.sum() ** 2 / (m**2).sum())


@dataclass(frozen=True)
class Information:
    """What the clusters leave of the items. `effective_items` [studies]; `third` [studies]: third central moment of the mean
    difference as the clusters show it (None without clusters); the degrees of freedom of it all."""

    effective_items: Array
    third: Array | None
    degrees_of_freedom: float


def grouping(labels: Sequence[Any]) -> Grouping:
    """Items grouped by equal labels; codes in order of first appearance."""
    seen: dict[Any, int] = {}
    code = np.fromiter((seen.setdefault(label, len(seen)) for label in labels), dtype=np.int64, count=len(labels))
    return Grouping(code, np.bincount(code, minlength=len(seen)))


def groupings(clusters: Sequence[Sequence[Any]] | None, items: int) -> tuple[Grouping, ...]:
    """The groupings of a study: none; one; or two and their crossing. A grouping of fewer than two clusters is a FourscoreError.

    One-way clusters of one item each are no clusters: they come back as none.
    """
    if clusters is None:
        return ()
    if len(clusters) != items:
        raise FourscoreError(f"{len(clusters)} cluster labels for {items} items", where="clusters", todo="give one tuple of labels an item")
    rows = [(c,) if isinstance(c, str) or not isinstance(c, Sequence) else tuple(c) for c in clusters]
    ways = sorted({len(row) for row in rows})
    if ways not in ([1], [2]):
        raise FourscoreError(
            f"items carry {' or '.join(str(w) for w in ways)} cluster labels",
            where="clusters",
            todo="give every item one label, or every item two",
        )
    result = [grouping([row[way] for row in rows]) for way in range(ways[0])]
    for number, found in enumerate(result, 1):
        if found.count < 2:
            which = "the grouping" if len(result) == 1 else f"grouping {number} of {len(result)}"
            raise FourscoreError(
                f"{which} puts all {items} items into one cluster ({rows[0][number - 1]!r}), so nothing shows how clusters differ",
                where="clusters",
                todo="group by a column with two values or more (40 for a sharp answer), or leave that grouping out",
            )
    # A way whose clusters hold one item each adds nothing to the other way, nor to none.
    result = [g for g in result if g.count < items]
    if len(result) == 2:
        result.append(grouping(rows))
    return tuple(result)


def information(differences: Array, groups: tuple[Grouping, ...], spread: Array) -> Information:
    """Effective items of each study: items / design effect. `spread` [studies]: variance of one 0/1 pair's difference.

    No groups: the plain variance. One: see `_design_effect`. Two that cross: first plus second minus their crossing
    (Cameron, Gelbach and Miller 2011), never below the smaller of the two. Then caution: with few clusters in which the
    arms differ at all, nothing shows yet that differences come alone, so the design effect is drawn towards its worst
    (clusters all alike) with weight exp(-those clusters / CAUTION_CLUSTERS).
    """
    n = differences.shape[1]
    if not groups:
        effect = _ratio(differences.var(axis=1, ddof=1), spread, 1.0)
        seen = np.count_nonzero(differences, axis=1)
        return Information(n / (effect + _caution(seen, 1.0 - effect)), None, float(n - 1))
    ways = groups[:2]
    parts = [_one_way(differences, g, spread) for g in ways]
    effect, third, seen = parts[0]
    if len(ways) == 2:
        crossing = _one_way(differences, groups[2], spread, raised=False)
        effect = np.maximum(effect + parts[1][0] - crossing[0], np.minimum(effect, parts[1][0]))
        third = third + parts[1][1] - crossing[1]
        seen = np.minimum(seen, parts[1][2])
    worst = max(n / g.effective for g in ways)
    return Information(n / (effect + _caution(seen, worst - effect)), third, float(min(g.count for g in ways) - 1))


def _caution(seen: Array, room: Array) -> Array:
    return np.exp(-seen / CAUTION_CLUSTERS) * np.maximum(room, 0)


def _ratio(variance: Array, spread: Array, otherwise: float) -> Array:
    """variance / spread, or `otherwise` where no item differs (there is nothing to learn from then)."""
    known = (spread > 0) & (variance > 0)
    return np.where(known, variance / np.where(known, spread, 1.0), otherwise)


def _sums(values: Array, group: Grouping) -> Array:
    """Sum of `values` [studies, items] within each cluster: [studies, clusters]."""
    in_order = bool(np.all(group.code[:-1] <= group.code[1:]))
    ordered = values if in_order else values[:, np.argsort(group.code, kind="stable")]
    return np.add.reduceat(ordered, np.concatenate([[0], np.cumsum(group.sizes)[:-1]]), axis=1)


def _one_way(differences: Array, group: Grouping, spread: Array, *, raised: bool = True) -> tuple[Array, Array, Array]:
    """Of one grouping, each [studies]: the design effect, the mean's third moment, the clusters in which the arms differ at all.

    The design effect is the cluster jackknife's (CR3; Bell and McCaffrey 2002), and where `raised` half of what the
    intra-cluster correlation says beyond it. With clusters of unequal sizes the jackknife rests on the few large ones and
    comes out low whenever they happen to agree (coverage 88% where 95% is promised); the correlation, every cluster's pairs
    weighing alike, is steadier but trusts that large and small clusters correlate alike. Their mean, never below the
    jackknife, held in both kinds of simulation.
    """
    n, m = differences.shape[1], group.sizes.astype(float)
    mean = differences.mean(axis=1, keepdims=True)
    sums, squares = _sums(differences, group), _sums(differences**2, group)
    seen = np.count_nonzero(squares, axis=1)
    residual = sums - m * mean
    leave_out = residual / (n - m)
    effect = _ratio((leave_out**2).sum(axis=1) * (group.count - 1) / group.count * n, spread, n / group.effective)
    third = (leave_out**3).sum(axis=1)
    several = m > 1
    if raised and several.any():
        within = squares - 2 * mean * sums + m * mean**2
        weight = np.where(several, 1 / np.maximum(m - 1, 1) ** 2, 0.0)
        covariance = (weight * (residual**2 - within)).sum(axis=1) / (weight * m * (m - 1)).sum()
        own = _ratio(within.sum(axis=1) / n, spread, 1.0)  # 1 for 0/1 scores
        # The estimated mean pulls each product down by about its own variance; give that back.
        shared = np.minimum(_ratio(np.maximum(covariance, 0), spread, 0.0) + effect / n, own)
        effect = effect + np.maximum(own + shared * ((m**2).sum() / n - 1) - effect, 0) / 2
    return effect, third, seen
