"""The paired interval: what its bounds are, what changes them, what must not, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fourscore.files import FourscoreError
from fourscore.stats import Paired, mcnemar, paired_difference, tango

CLOSE = 1e-6


@st.composite
def studies(draw: st.DrawFn, graded: bool = True) -> tuple[list[float], list[float], list[tuple[int, ...]] | None]:
    """Scores of two arms, and one label, two labels or none for each item; every grouping has at least two clusters."""
    n = draw(st.integers(4, 40))
    score = st.sampled_from([0.0, 1.0]) if not graded or draw(st.booleans()) else st.floats(0, 1, allow_subnormal=False)
    a, b = (draw(st.lists(score, min_size=n, max_size=n)) for _ in "ab")
    ways = draw(st.integers(0, 2))
    if ways == 0:
        return a, b, None
    labels = [[0, 1, *draw(st.lists(st.integers(0, 6), min_size=n - 2, max_size=n - 2))] for _ in range(ways)]
    return a, b, list(zip(*labels, strict=True))


def _bounds(p: Paired) -> tuple[float, float]:
    return p.low, p.high


@settings(deadline=None, max_examples=60)
@given(studies())
def test_the_difference_lies_between_its_bounds(study: tuple) -> None:
    p = paired_difference(*study)
    assert -1 <= p.low <= p.difference <= p.high <= 1
    assert p.difference == pytest.approx(p.mean_a - p.mean_b)
    assert p.low < p.high


@settings(deadline=None, max_examples=50)
@given(studies())
def test_swapping_the_arms_mirrors_the_interval(study: tuple) -> None:
    a, b, clusters = study
    p, q = paired_difference(a, b, clusters), paired_difference(b, a, clusters)
    assert (-q.high, -q.low, -q.difference) == pytest.approx((p.low, p.high, p.difference), abs=CLOSE)
    assert q.discordant == p.discordant[::-1]


@settings(deadline=None, max_examples=50)
@given(studies(), st.randoms(use_true_random=False))
def test_order_of_items_and_names_of_clusters_do_not_matter(study: tuple, random: object) -> None:
    a, b, clusters = study
    order = list(range(len(a)))
    random.shuffle(order)  # type: ignore[attr-defined]
    names = clusters and [tuple(f"cluster {7 - label}" for label in clusters[i]) for i in order]
    again = paired_difference([a[i] for i in order], [b[i] for i in order], names)
    assert _bounds(again) == pytest.approx(_bounds(paired_difference(a, b, clusters)), abs=CLOSE)


@settings(deadline=None, max_examples=50)
@given(studies())
def test_asking_every_item_twice_in_its_cluster_is_no_news(study: tuple) -> None:
    a, b, clusters = study
    labels = clusters or [(i,) for i in range(len(a))]
    once, twice = paired_difference(a, b, labels), paired_difference(a + a, b + b, labels + labels)
    # Not exactly none: clusters of one item, silent about correlation before, speak up when doubled (11% at most in 2,500 studies).
    assert twice.high - twice.low >= 0.85 * (once.high - once.low)


@settings(deadline=None, max_examples=40)
@given(studies(), st.floats(-0.99, 0.99))
def test_a_p_value_under_five_per_cent_is_a_bound_above_the_threshold(study: tuple, threshold: float) -> None:
    p = paired_difference(*study)
    if abs(p.low - threshold) > CLOSE and threshold < p.difference:
        assert (p.p_above(threshold) < 0.05) == (p.low > threshold)


@settings(deadline=None, max_examples=40)
@given(studies(), st.floats(0.6, 0.98))
def test_more_confidence_is_a_wider_interval(study: tuple, confidence: float) -> None:
    p, q = paired_difference(*study, confidence=confidence), paired_difference(*study, confidence=confidence + 0.015)
    assert q.low <= p.low + CLOSE
    assert q.high >= p.high - CLOSE


def test_no_discordant_pair_is_a_rule_of_three() -> None:
    p = paired_difference([1] * 300, [1] * 300)
    assert p.high == -p.low
    assert p.high == pytest.approx(1 - 0.05 ** (1 / 300), rel=0.06)  # what 0 of 300 rules out exactly, one-sided
    assert p.smallest_effect >= p.high


def test_no_discordant_pair_in_clusters_counts_clusters() -> None:
    alone, clustered = paired_difference([1] * 300, [1] * 300), paired_difference([1] * 300, [1] * 300, [(i % 30,) for i in range(300)])
    assert clustered.high > 8 * alone.high  # 30 clusters, not 300 items
    two = paired_difference([1] * 300, [1] * 300, [(i % 30, i // 20) for i in range(300)])
    assert two.high > clustered.high  # the second grouping has 15


def test_many_pairs_agree_with_tango_and_with_student() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(4000) < 0.6, rng.random(4000) < 0.5
    p = paired_difference(a, b)
    assert _bounds(p) == pytest.approx(tango(*p.discordant, 4000, confidence=0.9), abs=2e-4)
    graded_a, graded_b = rng.beta(4, 3, 2000), rng.beta(4, 4, 2000)
    q, d = paired_difference(graded_a, graded_b), graded_a - graded_b
    half = stats.t.ppf(0.95, 1999) * d.std(ddof=1) / math.sqrt(2000)
    assert _bounds(q) == pytest.approx((d.mean() - half, d.mean() + half), abs=6e-4)


def test_balanced_clusters_agree_with_a_t_interval_over_cluster_means() -> None:
    # Equal clusters: the jackknife is the variance of the cluster means over their number, a textbook result.
    rng = np.random.default_rng(4)
    d = np.clip(rng.normal(0.05, 0.15, (60, 1)) + rng.normal(0, 0.1, (60, 10)), -0.9, 0.9)
    p = paired_difference((0.5 + d / 2).ravel(), (0.5 - d / 2).ravel(), [(g,) for g in range(60) for _ in range(10)])
    assert p.standard_error == pytest.approx(d.mean(axis=1).std(ddof=1) / math.sqrt(60), rel=0.02)
    assert p.degrees_of_freedom == 59


def test_a_shift_of_three_pairs_is_not_a_gain() -> None:
    p = paired_difference([1, 1, 1] + [0] * 97, [0] * 100)
    assert p.low < 0
    assert 0.05 < p.p_superiority < mcnemar(3, 0).p_exact / 2  # the sign test says 1/8


def test_a_column_that_names_every_item_is_no_clustering() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    plain = paired_difference(a, b)
    assert paired_difference(a, b, [(i,) for i in range(50)]) == plain
    assert paired_difference(a, b, [(i % 5, i) for i in range(50)]) == paired_difference(a, b, [(i % 5,) for i in range(50)])


@pytest.mark.parametrize(
    ("a", "b", "clusters", "line"),
    [
        ([1, 0], [1], None, "2 scores of arm a against 1 of arm b"),
        ([], [], None, "no items"),
        ([1], [0], None, "one item"),
        ([1, math.nan], [0, 1], None, "arm a, item 2 of 2 has score nan"),
        ([1, 0], [0, 1.5], None, "arm b, item 2 of 2 has score 1.5"),
        ([1, None], [0, 1], None, "arm a, item 2 of 2 has score nan"),
        (["x", 0], [0, 1], None, "not numbers"),
        ([1, 0, 1], [0, 1, 1], [("p",), ("p",), ("p",)], "the grouping puts all 3 items into one cluster ('p')"),
        ([1, 0, 1], [0, 1, 1], [("p", 1), ("q", 1), ("p", 1)], "grouping 2 of 2 puts all 3 items into one cluster (1)"),
        ([1, 0, 1], [0, 1, 1], [("p",), ("q",)], "2 cluster labels for 3 items"),
        ([1, 0, 1], [0, 1, 1], [("p",), ("q", 1), ("q", 2)], "1 or 2 cluster labels"),
        ([1, 0, 1], [0, 1, 1], [("p", 1, 2)] * 3, "3 cluster labels"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(a: list, b: list, clusters: list | None, line: str) -> None:
    with pytest.raises(FourscoreError) as error:
        paired_difference(a, b, clusters)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.todo


@pytest.mark.parametrize("confidence", [0.5, 1.0, math.nan])
def test_a_confidence_must_say_something(confidence: float) -> None:
    with pytest.raises(FourscoreError, match="confidence"):
        paired_difference([1, 0], [0, 1], confidence=confidence)


def test_the_room_needs_no_torch() -> None:
    code = "import sys, fourscore.stats; sys.exit('torch' in sys.modules or 'scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_clusters_are_hardly_anything() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random(200) < 0.9, rng.random(200) < 0.5
    p = paired_difference(a, b, [(i % 2,) for i in range(200)])
    assert p.degrees_of_freedom == 1
    assert p.high - p.low > 3 * (paired_difference(a, b).high - paired_difference(a, b).low)
