"""The score interval at the heart of every gate: Tango's, on an effective number of items."""

from __future__ import annotations

from typing import Any

import numpy as np


def restricted_variance(gain: Any, loss: Any, delta: Any) -> Any:
    """Variance of one paired difference if its mean were `delta`, the rest fitted by maximum likelihood.

    `gain` and `loss` are the observed shares of pairs in which the first, the second, is better. Tango 1998, equation (7).
    """
    linear = -(gain + loss) + (2 - gain + loss) * delta
    q = (np.sqrt(np.maximum(linear**2 + 8 * loss * delta * (1 - delta), 0)) - linear) / 4
    return np.maximum(2 * np.maximum(q, np.maximum(-delta, 0)) + delta * (1 - delta), 0)


def score_statistic(gain: Any, loss: Any, n: Any, delta: Any) -> Any:
    """How many standard errors the observed difference lies above `delta`, the error taken as if `delta` were true."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (gain - loss - delta) * np.sqrt(n) / np.sqrt(restricted_variance(gain, loss, delta))
    return np.where(gain - loss == delta, 0.0, t)


def score_low(gain: Any, loss: Any, n: Any, critical: Any) -> Any:
    """Lower bound of gain - loss: the smallest delta that lies within `critical` standard errors below."""
    gain, loss, n, critical = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (gain, loss, n, critical)))
    inside, outside = gain - loss, np.full(gain.shape, -1.0)
    for _ in range(52):
        middle = (inside + outside) / 2
        far = score_statistic(gain, loss, n, middle) > critical
        inside, outside = np.where(far, inside, middle), np.where(far, middle, outside)
    return outside
