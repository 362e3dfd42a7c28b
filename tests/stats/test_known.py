"""Known methods against published worked examples."""

from __future__ import annotations

import math

import pytest

from fourscore.files import FourscoreError
from fourscore.stats import mcnemar, newcombe, tango

# (both, first only, second only, neither), the published 95% interval to its printed digits, where it is printed.
TANGO = [
    ((1, 1, 7, 12), (-0.517, -0.026), "Fagerland, Lydersen and Laake 2014, Stat Med 33:2850, airway hyper-responsiveness"),
    ((53, 16, 8, 9), (-0.020, 0.207), "Agresti and Min 2005, Stat Med 24:729"),
    ((8, 3, 1, 2), (-0.1670, 0.4327), "Tang, Li, Tang 2010, Stat Med 29:46"),
    ((7, 25, 2, 68), (0.139, 0.321), "Chang et al. 2024, J Appl Stat 51:139"),
    (
        (59, 6, 16, 80),
        (-0.1240, -0.0054),
        "Fagerland, Lydersen and Laake 2017, Statistical Analysis of Contingency Tables, ch. 8, Cavo et al.",
    ),
]
NEWCOMBE = [
    ((20, 12, 2, 16), (0.0562, 0.3292), "Newcombe 1998, Stat Med 17:2635, method 10"),
    ((1, 1, 7, 12), (-0.507, -0.026), "Fagerland, Lydersen and Laake 2014"),
    ((8, 3, 1, 2), (-0.1574, 0.4136), "Tang, Li, Tang 2010"),
    ((7, 25, 2, 68), (0.133, 0.318), "Chang et al. 2024"),
    ((59, 6, 16, 80), (-0.1186, -0.0046), "Fagerland, Lydersen and Laake 2017, ch. 8"),
]


def _digits(published: tuple[float, float]) -> int:
    return max(len(str(x).split(".")[1]) for x in published)


@pytest.mark.parametrize(("table", "published", "source"), TANGO)
def test_tango_matches_published_examples(table: tuple[int, int, int, int], published: tuple[float, float], source: str) -> None:
    _, b, c, _ = table
    assert tuple(round(x, _digits(published)) for x in tango(b, c, sum(table))) == published, source


@pytest.mark.parametrize(("table", "published", "source"), NEWCOMBE)
def test_newcombe_matches_published_examples(table: tuple[int, int, int, int], published: tuple[float, float], source: str) -> None:
    assert tuple(round(x, _digits(published)) for x in newcombe(*table)) == published, source


def test_mcnemar_matches_published_examples() -> None:
    cavo = mcnemar(6, 16)  # Fagerland, Lydersen and Laake 2017, ch. 8: Z = -2.132, exact .052479, mid-p .034690
    assert (round(cavo.z, 3), round(cavo.p_exact, 6), round(cavo.p_mid, 6)) == (-2.132, 0.052479, 0.034690)
    approval = mcnemar(150, 86)  # Agresti 1990, p. 350, president's approval: z = 64 / sqrt(236)
    assert round(approval.z, 2) == 4.17
    assert approval.p_exact < 1e-4


def test_mcnemar_by_hand() -> None:
    assert mcnemar(3, 0).p_exact == pytest.approx(2 / 8)
    assert mcnemar(3, 0).p_mid == pytest.approx(1 / 8)
    assert mcnemar(4, 4).p_exact == 1.0
    # Equal counts: the mid-p counts the middle point once, half for each side.
    assert mcnemar(1, 1).p_mid == pytest.approx(1.0)
    nothing = mcnemar(0, 0)
    assert math.isnan(nothing.z)
    assert nothing.p_exact == nothing.p_mid == 1.0


def test_no_discordant_pair_keeps_a_width() -> None:
    low, high = tango(0, 0, 100)
    assert low == pytest.approx(-(1.959964**2) / (100 + 1.959964**2), abs=1e-6)  # the score limit in closed form
    assert high == -low
    low, high = newcombe(50, 0, 0, 50)
    assert low < 0 < high


def test_whole_counts_are_asked_for() -> None:
    with pytest.raises(FourscoreError, match="whole numbers"):
        mcnemar(-1, 3)
    with pytest.raises(FourscoreError, match="whole numbers"):
        tango(30, 30, 40)
    with pytest.raises(FourscoreError, match="no pairs"):
        newcombe(0, 0, 0, 0)
