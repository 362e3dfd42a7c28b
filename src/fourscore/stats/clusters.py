"""How far a mean of paired differences can be trusted when items come in clusters.

Knows differences and cluster labels; knows nothing about models, tasks or verdicts. Everything takes a batch of studies
at once (`differences` is [studies, items]), so the simulation in bench/statistics.py runs this very code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourscore.files import FourscoreError

Array = np.ndarray[Any, np.dtype[Any]]


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
        """Kish's effective number of clusters, (sum m)^2 / sum m^2: how many equal clusters would weigh as much."""
        m = self.sizes.astype(float)
        return float(m.sum() ** 2 / (m**2).sum())


def grouping(labels: Sequence[Any]) -> Grouping:
    """Items grouped by equal labels; codes in order of first appearance."""
    seen: dict[Any, int] = {}
    code = np.fromiter((seen.setdefault(label, len(seen)) for label in labels), dtype=np.int64, count=len(labels))
    return Grouping(code, np.bincount(code, minlength=len(seen)))


def groupings(clusters: Sequence[Sequence[Any]] | None, items: int) -> tuple[Grouping, ...]:
    """The groupings of a study: none, one, or two and their crossing. Refuses fewer than two clusters in a grouping."""
    if clusters is None:
        return ()
    if len(clusters) != items:
        raise FourscoreError(f"{len(clusters)} cluster labels for {items} items", where="clusters", todo="give one tuple of labels an item")
    rows = [(c,) if isinstance(c, str) or not isinstance(c, Sequence) else tuple(c) for c in clusters]
    ways = {len(row) for row in rows}
    if ways - {1, 2} or len(ways) != 1:
        raise FourscoreError(
            f"items carry {' or '.join(str(w) for w in sorted(ways))} cluster labels",
            where="clusters",
            todo="give every item one label, or every item two",
        )
    result = [grouping([row[way] for row in rows]) for way in range(ways.pop())]
    for number, found in enumerate(result, 1):
        if found.count < 2:
            raise FourscoreError(
                f"grouping {number} of {len(result)} puts all {items} items into one cluster, so nothing says how clusters differ",
                where="clusters",
                todo="group by a column with at least two values (40 or more for a sharp answer), or leave that grouping out",
            )
    if len(result) == 2:
        result.append(grouping(rows))
    return tuple(result)


def cluster_sums(values: Array, group: Grouping) -> Array:
    """Sum of `values` [studies, items] within each cluster: [studies, clusters]."""
    if np.all(group.code[:-1] <= group.code[1:]):
        ordered = values
    else:
        ordered = values[:, np.argsort(group.code, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(group.sizes)[:-1]])
    return np.add.reduceat(ordered, starts, axis=1)


def jackknife_variance(differences: Array, group: Grouping) -> Array:
    """Variance of the mean difference [studies] by the cluster jackknife (CR3), Bell and McCaffrey 2002."""
    n = differences.shape[1]
    residual = cluster_sums(differences, group) - group.sizes * differences.mean(axis=1, keepdims=True)
    return ((residual / (1 - group.sizes / n)) ** 2).sum(axis=1) * (group.count - 1) / group.count / n**2
