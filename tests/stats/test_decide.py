"""Verdicts, their p-values, and what a study needs or can show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fourscore.files import FourscoreError
from fourscore.stats import (
    Decision,
    holm,
    intersection_union,
    non_inferiority,
    paired_difference,
    seeds_interval,
    smallest_effect_before,
    superiority,
)
from fourscore.stats.paired import paired_bounds


def _paired(low: float, difference: float, high: float):
    some = paired_difference([1, 0] * 100, [0, 0] * 100)
    return replace(some, low=low, difference=difference, high=high, standard_error=(high - low) / 3.29)


@pytest.mark.parametrize(
    ("low", "difference", "high", "keep", "gain"),
    [
        (0.01, 0.05, 0.09, "PASS", "PASS"),
        (-0.04, 0.00, 0.04, "PASS", "INCONCLUSIVE"),
        (-0.04, -0.02, 0.0, "PASS", "FAIL"),  # no gain of any size is left
        (-0.05, -0.01, 0.03, "INCONCLUSIVE", "INCONCLUSIVE"),  # a bound on the margin is not above it
        (-0.09, -0.05, -0.01, "INCONCLUSIVE", "FAIL"),
        (-0.09, -0.07, -0.05, "INCONCLUSIVE", "FAIL"),
        (-0.12, -0.09, -0.06, "FAIL", "FAIL"),
        (-0.30, 0.00, 0.30, "INCONCLUSIVE", "INCONCLUSIVE"),
    ],
)
def test_verdicts_read_the_bounds(low: float, difference: float, high: float, keep: str, gain: str) -> None:
    p = _paired(low, difference, high)
    assert non_inferiority(p, 0.05).verdict == keep
    assert superiority(p).verdict == gain


def test_items_needed_would_have_decided_it() -> None:
    # 300 items, 4 points of difference, a quarter discordant; 80% of studies with the items it asks for must pass.
    a = [1] * 40 + [0] * 260
    b = [0] * 40 + [1] * 29 + [0] * 231
    p = paired_difference(a, b)
    decision = superiority(p)
    assert decision.verdict == "INCONCLUSIVE"
    n = decision.items_needed
    assert n is not None
    assert n > 300
    rng = np.random.default_rng(8)
    u = rng.random((1000, n))
    d = (u < p.gain) * 1.0 - ((u >= p.gain) & (u < p.gain + p.loss))
    assert 0.75 < (paired_bounds(d, (), 0.95).low > 0).mean() < 0.85


def test_items_needed_without_a_discordant_pair_shrinks_like_one_over_n() -> None:
    decision = non_inferiority(paired_difference([1] * 20, [1] * 20), 0.05)
    assert decision.verdict == "INCONCLUSIVE"
    assert decision.items_needed is not None
    n = decision.items_needed
    assert non_inferiority(paired_difference([1] * n, [1] * n), 0.05).verdict == "PASS"
    assert n < 80


def test_items_needed_is_unknown_on_the_threshold() -> None:
    assert superiority(paired_difference([1, 0, 1, 0], [0, 1, 0, 1])).items_needed is None


def test_a_decided_gate_needs_no_items() -> None:
    p = paired_difference([1] * 200 + [0] * 100, [0] * 200 + [0] * 100)
    assert superiority(p) == Decision("PASS", p.p_superiority, None, 0.0)


@pytest.mark.parametrize("margin", [0.0, -0.05, 1.0, math.nan])
def test_a_margin_is_a_loss_one_would_accept(margin: float) -> None:
    with pytest.raises(FourscoreError, match="margin"):
        non_inferiority(paired_difference([1, 0], [0, 1]), margin)


def test_a_study_passes_when_every_gate_does() -> None:
    assert intersection_union(["PASS"] * 3, [1.0] * 3) == "PASS"
    assert intersection_union(["PASS", "INCONCLUSIVE"], [1.0, 0.5]) == "INCONCLUSIVE"
    assert intersection_union(["PASS", "INCONCLUSIVE", "FAIL"], [1.0, 0.5, 0.001]) == "FAIL"
    # Holm: 0.04 is under 5% alone, but not among three.
    assert intersection_union(["PASS", "INCONCLUSIVE", "FAIL"], [1.0, 0.5, 0.04]) == "INCONCLUSIVE"
    with pytest.raises(FourscoreError, match="no gate"):
        intersection_union([], [])


def test_holm_by_hand() -> None:
    # 4 x .005, then 3 x .01 = .03, then 2 x .03 = .06, then 1 x .04 raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(FourscoreError, match="p-values"):
        holm([0.1, math.nan])


def test_seeds_are_students_t_or_unknown() -> None:
    d = [0.02, 0.05, 0.03, 0.04, 0.06]
    found = seeds_interval(d)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 4, np.mean(d), stats.sem(d)))
    few = seeds_interval([0.02, 0.05])
    assert (few.low, few.high) == (None, None)
    assert "2 seeds" in few.note
    assert few.mean == pytest.approx(0.035)
    assert "1 seed:" in seeds_interval([0.02]).note
    with pytest.raises(FourscoreError, match="seeds"):
        seeds_interval([])


def test_the_smallest_effect_before_data() -> None:
    # (1.6496 + 0.8425) sqrt(.2 / 600), by hand from Student's t on 599 degrees of freedom.
    plain = smallest_effect_before(600, discordance=0.2)
    assert plain == pytest.approx((stats.t.ppf(0.95, 599) + stats.t.ppf(0.8, 599)) * math.sqrt(0.2 / 600))
    assert smallest_effect_before(600, 60, 0.2, 0.1) > plain
    assert smallest_effect_before(600, 60, 0.2, 0.0) == pytest.approx(plain, rel=0.02)
    assert smallest_effect_before(600, (60, 120), 0.2, (0.1, 0.1)) > smallest_effect_before(600, 60, 0.2, 0.1)
    assert smallest_effect_before(600, 600) == smallest_effect_before(600)
    assert smallest_effect_before(20, discordance=0.001) == pytest.approx(-math.log(0.05) / 20)
    assert smallest_effect_before(2) <= 1.0
    for wrong in (
        (1, None, 0.2, 0.1),
        (10, 11, 0.2, 0.1),
        (10, 1, 0.2, 0.1),
        (10, 5, 0.0, 0.1),
        (10, 5, 0.2, 1.1),
        (10, (5, 5), 0.2, (0.1,)),
    ):
        with pytest.raises(FourscoreError, match="smallest effect"):
            smallest_effect_before(*wrong)
