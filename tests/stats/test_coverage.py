"""The bounds cover as promised: 500 simulated studies a case, and the committed table of 10,000."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
STUDIES = 500


def _simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stats_simulation", ROOT / "bench/stats_simulation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stats_simulation"] = module
    spec.loader.exec_module(module)
    return module


simulation = _simulation()
Case = simulation.Case

CASES = [
    Case("pairs", 20, (), "equal", "copied", (), 0.2, -0.2),
    Case("pairs", 300, (), "equal", "copied", (), 0.3, -0.05),
    Case("pairs", 600, (), "equal", "copied", (), 0.01, 0.0),
    Case("few clusters", 40, (5,), "equal", "copied", (0.8,), 0.4, 0.0),
    Case("one large cluster", 100, (10,), "one large", "copied", (0.3,), 0.2, -0.2),
    Case("rare, whole clusters", 300, (40,), "equal", "copied", (0.8,), 0.02, -0.02),
    Case("clusters", 300, (40,), "equal", "copied", (0.2,), 0.4, -0.05),
    Case("skewed clusters", 600, (60,), "skewed", "dirichlet", (0.3,), 0.3, -0.1),
    Case("hot clusters", 600, (60,), "equal", "hot", (0.4,), 0.1, -0.05),
    Case("two-way", 600, (60, 120), "equal", "copied", (0.2, 0.1), 0.3, 0.0),
    Case("two-way, unrelated", 300, (40, 40), "equal", "copied", (0.0, 0.0), 0.3, -0.05),
    Case("noisy scores", 300, (40,), "equal", "copied", (0.2,), 0.3, -0.05, "noisy"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.items}")
def test_each_bound_covers_at_least_nominal_minus_one_point(case: object) -> None:
    row = simulation.run(case, STUDIES, 1)
    # Fewer than this happens once in 10,000 to a bound that covers 94%.
    least = stats.binom.ppf(1e-4, STUDIES, 0.94) / STUDIES
    assert row["cover_low"] >= least
    assert row["cover_high"] >= least


def test_a_naive_interval_would_be_caught() -> None:
    # The same clusters, taken for independent items: the simulation must be able to say no.
    case = Case("clusters", 300, (40,), "equal", "copied", (0.5,), 0.4, 0.0)
    _, codes = simulation.layout(case)
    d = simulation.draw(case, codes, STUDIES, simulation.np.random.default_rng(1))
    found = simulation.paired_bounds(d, (), 0.95)
    assert (found.low <= 0).mean() < 0.85


def test_independent_pairs_are_covered_exactly() -> None:
    for items in (5, 30):
        for band in simulation.exact(items)["bands"].values():
            assert band["lowest"] >= 0.94


def test_the_committed_table_keeps_the_promise() -> None:
    result = json.loads((ROOT / "bench/results/statistics.json").read_text())
    assert result["studies"] == 10_000
    noise = 3 * (0.94 * 0.06 / 10_000) ** 0.5
    for row in result["coverage"]:
        assert min(row["cover_low"], row["cover_high"]) >= 0.94 - noise, row
    for row in result["power"]:
        assert abs(row["pass_superiority"] - 0.8) < 0.05, row
    for row in result["exact"]:
        if row["confidence"] == 0.95:
            assert all(band["lowest"] >= 0.94 for band in row["bands"].values())
    page = (ROOT / "docs/statistics.md").read_text()
    assert simulation.tables(result) in page
