"""From an interval to a verdict: PASS, FAIL or INCONCLUSIVE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.paired import POWER, Paired
from fourscore.stats.score import corrected_statistic

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
_MOST_ITEMS = 10_000_000


@dataclass(frozen=True)
class Decision:
    """`p` is one-sided, against the claim being false (below 1 - confidence exactly when PASS).

    `items_needed`, for INCONCLUSIVE only: the items that would have decided the gate, one way or the other, with 80% power if the
    estimate were the truth, cluster sizes held; None where none would (the estimate lies on the threshold).
    """

    verdict: Verdict
    p: float
    items_needed: int | None
    margin: float


def non_inferiority(paired: Paired, margin: float) -> Decision:
    """'No worse than by `margin`': PASS when low > -margin, FAIL when high < -margin, else INCONCLUSIVE."""
    if not 0 < margin < 1:
        raise FourscoreError(f"margin {margin}", where="non-inferiority", todo="give the largest acceptable loss, between 0 and 1")
    return _decide(paired, -margin, fails=paired.high < -margin, margin=margin)


def superiority(paired: Paired) -> Decision:
    """'Better': PASS when low > 0, FAIL when high <= 0 (a gain of any size is ruled out), else INCONCLUSIVE."""
    return _decide(paired, 0.0, fails=paired.high <= 0, margin=0.0)


def _decide(paired: Paired, threshold: float, *, fails: bool, margin: float) -> Decision:
    p = paired.p_above(threshold)
    if paired.low > threshold:
        return Decision("PASS", p, None, margin)
    if fails:
        return Decision("FAIL", p, None, margin)
    return Decision("INCONCLUSIVE", p, _items_needed(paired, threshold), margin)


def _items_needed(paired: Paired, threshold: float) -> int | None:
    distance = abs(paired.difference - threshold)
    if distance < 1e-9:
        return None
    if paired.standard_error > 0:
        z = float(special.ndtri(paired.confidence) + special.ndtri(POWER))
        needed = paired.items * (z * paired.standard_error / distance) ** 2
        return None if needed > _MOST_ITEMS else max(paired.items + 1, math.ceil(needed))
    # All pairs alike: no error to scale. Ask instead how many more of them would move the bound past the threshold.
    gain, loss, threshold = (
        (paired.gain, paired.loss, threshold) if paired.difference > threshold else (paired.loss, paired.gain, -threshold)
    )
    critical = float(special.stdtrit(paired.degrees_of_freedom, paired.confidence))
    too_few, enough = paired.items, _MOST_ITEMS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        passed = float(corrected_statistic(gain, loss, paired.effective_items * middle / paired.items, threshold)) > critical
        too_few, enough = (too_few, middle) if passed else (middle, enough)
    return enough if enough < _MOST_ITEMS else None


def intersection_union(verdicts: Sequence[Verdict], p_fail: Sequence[float], level: float = 0.05) -> Verdict:
    """The study's verdict from its gates' verdicts. `p_fail`: one-sided p-values against failing wrongly, one a gate.

    PASS if all gates pass, each at its own level (Berger 1982). FAIL if a failed gate still fails at `level` once Holm has
    corrected for the number of gates. Else INCONCLUSIVE.
    """
    if not verdicts or len(verdicts) != len(p_fail):
        raise FourscoreError("no gate to decide", where="verdict", todo="name at least one gate, each with its p-value")
    if all(verdict == "PASS" for verdict in verdicts):
        return "PASS"
    failed = any(v == "FAIL" and p <= level for v, p in zip(verdicts, holm(p_fail), strict=True))
    return "FAIL" if failed else "INCONCLUSIVE"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given. Holm 1979, Scandinavian Journal of Statistics 6:65-70."""
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise FourscoreError(f"p-values {list(p_values)}", where="Holm", todo="give numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(x) for x in adjusted]
