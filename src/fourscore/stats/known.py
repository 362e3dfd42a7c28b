"""Known methods for paired proportions: McNemar's test, Newcombe's and Tango's intervals. Two-sided, for counts.

The paired 2x2 table: `both` right, only the first right (`b`), only the second right (`c`), `neither`. The difference is
P(first right) - P(second right) = (b - c) / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special

from fourscore.files import FourscoreError
from fourscore.stats.score import score_low


@dataclass(frozen=True)
class McNemar:
    """`z` is (b - c) / sqrt(b + c) (nan without a discordant pair); the p-values are two-sided."""

    z: float
    p_exact: float
    p_mid: float


def _check(confidence: float, *counts: int) -> None:
    if any(count < 0 or count != int(count) for count in counts):
        raise FourscoreError(
            f"counts of pairs {counts}", where="paired table", todo="give whole numbers from 0 that fit the number of pairs"
        )
    if sum(counts) == 0:
        raise FourscoreError("no pairs", where="paired table", todo="give at least one pair")
    if not 0 < confidence < 1:
        raise FourscoreError(f"confidence {confidence}", where="paired table", todo="give a number between 0 and 1, such as 0.95")


def mcnemar(b: int, c: int) -> McNemar:
    """McNemar's test from the discordant counts: exact (binomial) and mid-p (Fagerland, Lydersen and Laake 2013)."""
    _check(0.95, b, c, 1)
    m, low = b + c, min(b, c)
    if m == 0:
        return McNemar(math.nan, 1.0, 1.0)
    tail = float(special.bdtr(low, m, 0.5))
    point = math.exp(math.lgamma(m + 1) - math.lgamma(low + 1) - math.lgamma(m - low + 1) - m * math.log(2))
    return McNemar((b - c) / math.sqrt(m), min(1.0, 2 * tail), 1.0 if b == c else min(1.0, 2 * tail - point))


def tango(b: int, c: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided asymptotic score interval for (b - c) / n. Tango 1998, Statistics in Medicine 17:891-908."""
    _check(confidence, b, c, n - b - c)
    z = float(special.ndtri(0.5 + confidence / 2))
    return float(score_low(b / n, c / n, n, z, corrected=False)), -float(score_low(c / n, b / n, n, z, corrected=False))


def wilson(x: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval for x / n. Wilson 1927."""
    _check(confidence, x, n - x)
    z = float(special.ndtri(0.5 + confidence / 2))
    middle, half = x + z * z / 2, z * math.sqrt(x * (n - x) / n + z * z / 4)
    return max(0.0, (middle - half) / (n + z * z)), min(1.0, (middle + half) / (n + z * z))


def newcombe(both: int, b: int, c: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided square-and-add interval, method 10 of Newcombe 1998, Statistics in Medicine 17:2635-2650."""
    _check(confidence, both, b, c, neither)
    n = both + b + c + neither
    p1, p2 = (both + b) / n, (both + c) / n
    (l1, u1), (l2, u2) = wilson(both + b, n, confidence), wilson(both + c, n, confidence)
    margins = (both + b) * (c + neither) * (both + c) * (b + neither)
    phi = 0.0
    if margins > 0:
        cross = both * neither - b * c
        # Newcombe's continuity correction of phi, for positive association only.
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)
    down = (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2
    up = (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2
    return p1 - p2 - math.sqrt(max(down, 0.0)), p1 - p2 + math.sqrt(max(up, 0.0))
