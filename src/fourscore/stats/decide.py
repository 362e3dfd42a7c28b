"""From an interval to a verdict: PASS, FAIL or INCONCLUSIVE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.paired import Paired

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Decision:
    """`p` is one-sided, against the claim being false. `items_needed`: see `_items_needed`."""

    verdict: Verdict
    p: float
    items_needed: int | None
    margin: float


def _items_needed(paired: Paired, threshold: float) -> int | None:
    """Items that would have decided the gate with 80% power, cluster sizes held; None if the estimate lies on the threshold."""
    distance = abs(paired.difference - threshold)
    if distance < 1e-12 or not paired.standard_error > 0:
        return None
    z = float(special.ndtri(paired.confidence) + special.ndtri(0.8))
    return max(paired.items + 1, math.ceil(paired.items * (z * paired.standard_error / distance) ** 2))


def non_inferiority(paired: Paired, margin: float) -> Decision:
    """PASS when low > -margin, FAIL when high < -margin, else INCONCLUSIVE."""
    if not 0 < margin < 1:
        raise FourscoreError(f"margin {margin}", where="non-inferiority", todo="give the largest acceptable loss, between 0 and 1")
    p = paired.p_above(-margin)
    if paired.low > -margin:
        return Decision("PASS", p, None, margin)
    if paired.high < -margin:
        return Decision("FAIL", p, None, margin)
    return Decision("INCONCLUSIVE", p, _items_needed(paired, -margin), margin)


def superiority(paired: Paired) -> Decision:
    """PASS when low > 0, FAIL when high <= 0, else INCONCLUSIVE."""
    if paired.low > 0:
        return Decision("PASS", paired.p_superiority, None, 0.0)
    if paired.high <= 0:
        return Decision("FAIL", paired.p_superiority, None, 0.0)
    return Decision("INCONCLUSIVE", paired.p_superiority, _items_needed(paired, 0.0), 0.0)


def intersection_union(decisions: Sequence[Decision]) -> Verdict:
    """All must pass, each at its own level (Berger 1982): FAIL if any fails, PASS if all pass, else INCONCLUSIVE."""
    if not decisions:
        raise FourscoreError("no gate to decide", where="verdict", todo="name at least one gate")
    verdicts = {d.verdict for d in decisions}
    return "FAIL" if "FAIL" in verdicts else "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given. Holm 1979."""
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise FourscoreError(f"p-values {list(p_values)}", where="Holm", todo="give numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(x) for x in adjusted]
