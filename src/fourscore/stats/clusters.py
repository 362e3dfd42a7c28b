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

# Clusters with a difference in them from which the data, no longer caution, say how alike a cluster's items are.
# Chosen by simulation: 3 leaves rare discordance in clusters at 89% where 95% is promised, 8 widens 300 items by a tenth.
CAUTION_CLUSTERS = 5.0


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
    """What the clusters leave of the items, [studies]: `effective_items`; and the degrees of freedom of that estimate."""

    effective_items: Array
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
        worst, df = 1.0, float(n - 1)
        effect = _ratio(differences.var(axis=1, ddof=1), spread, worst)
        seen = np.count_nonzero(differences, axis=1).astype(float)
    else:
        ways = groups[:2]
        worst, df = max(n / g.effective for g in ways), float(min(g.count for g in ways) - 1)
        parts = [_design_effect(differences, g, spread) for g in ways]
        effect, seen = parts[0]
        if len(ways) == 2:
            crossing = _jackknife_effect(differences, groups[2], spread, n / groups[2].effective)
            effect = np.maximum(parts[0][0] + parts[1][0] - crossing, np.minimum(parts[0][0], parts[1][0]))
            seen = np.minimum(parts[0][1], parts[1][1])
    caution = np.exp(-seen / CAUTION_CLUSTERS) * np.maximum(worst - effect, 0)
    return Information(n / (effect + caution), df)


def _ratio(variance: Array, spread: Array, otherwise: float) -> Array:
    """variance / spread, or `otherwise` where no item differs (there is nothing to learn from then)."""
    known = (spread > 0) & (variance > 0)
    return np.where(known, variance / np.where(known, spread, 1.0), otherwise)


def _sums(values: Array, group: Grouping) -> Array:
    """Sum of `values` [studies, items] within each cluster: [studies, clusters]."""
    in_order = bool(np.all(group.code[:-1] <= group.code[1:]))
    ordered = values if in_order else values[:, np.argsort(group.code, kind="stable")]
    return np.add.reduceat(ordered, np.concatenate([[0], np.cumsum(group.sizes)[:-1]]), axis=1)


def _jackknife_effect(differences: Array, group: Grouping, spread: Array, otherwise: float) -> Array:
    """Design effect [studies]: the cluster jackknife's variance of the mean (CR3; Bell and McCaffrey 2002) over the independent one."""
    n = differences.shape[1]
    residual = _sums(differences, group) - group.sizes * differences.mean(axis=1, keepdims=True)
    leave_out = residual / (n - group.sizes)
    return _ratio((leave_out**2).sum(axis=1) * (group.count - 1) / group.count * n, spread, otherwise)


def _design_effect(differences: Array, group: Grouping, spread: Array) -> tuple[Array, Array]:
    """Design effect of one grouping, and the number of clusters in which the arms differ at all; each [studies].

    The jackknife's, raised by half of what the intra-cluster correlation says beyond it. With clusters of unequal sizes
    the jackknife rests on the few large ones and comes out low whenever they happen to agree (coverage 86% where 95% is
    promised); the correlation, averaged with every cluster's pairs weighing alike, is steadier but trusts that large and
    small clusters correlate alike. Their mean, never below the jackknife, held in both kinds of simulation.
    """
    n, m = differences.shape[1], group.sizes.astype(float)
    jackknife = _jackknife_effect(differences, group, spread, n / group.effective)
    sums, squares = _sums(differences, group), _sums(differences**2, group)
    seen = np.count_nonzero(squares, axis=1).astype(float)
    several = m > 1
    if not several.any():
        return jackknife, seen
    mean = differences.mean(axis=1, keepdims=True)
    products = (sums - m * mean) ** 2 - (squares - 2 * mean * sums + m * mean**2)
    weight = np.where(several, 1 / np.maximum(m - 1, 1) ** 2, 0.0)
    covariance = (weight * products).sum(axis=1) / (weight * m * (m - 1)).sum()
    # The estimated mean pulls each product down by about its own variance; give that back.
    correlation = np.clip(_ratio(np.maximum(covariance, 0), spread, 0.0) + jackknife / n, 0, 1)
    modelled = np.where(spread > 0, 1 + correlation * ((m**2).sum() / n - 1), jackknife)
    return jackknife + np.maximum(modelled - jackknife, 0) / 2, seen
