"""`make bench`: the goals, the table, and what it does about benches that fail and machines that are busy."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/run.py; its neighbours are found as when it is run."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module("run")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def _run(bench: ModuleType, folder: Path, script: str | None, monkeypatch: pytest.MonkeyPatch, seconds: float = 5.0):
    monkeypatch.setattr(bench, "FOLDER", folder)
    if script is not None:
        (folder / "mine.py").write_text(script)
    entry = bench.Bench("mine", "{threads} {out}", "", (seconds, seconds))
    return bench.run(entry, False, 1, folder / "mine.log", folder / "mine.json")


def test_every_goal_is_measured_by_a_bench_that_is_run(bench: ModuleType):
    assert {goal.bench for goal in bench.read_goals()} <= {b.name for b in bench.BENCHES}
    for entry in bench.BENCHES:
        assert (ROOT / "bench" / f"{entry.name}.py").exists()


def test_a_record_carries_the_machine_the_load_and_the_versions(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outcome = _run(bench, tmp_path, "import sys; open(sys.argv[2], 'w').write('{\"rows\": []}')", monkeypatch)
    run = outcome.record["run"]
    assert run["machine"]["threads"] >= 1
    assert run["versions"]["torch"].startswith("2.")
    assert run["others_busy_cores"] >= 0
    assert str(tmp_path) not in str(run), "a result names no path of one machine"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "bench/mine.py is not there"),
        ("raise ValueError('no such model')", "exit code 1: ValueError: no such model"),
        ("pass", "wrote no result"),
    ],
)
def test_a_bench_that_gives_nothing_is_a_row(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
):
    outcome = _run(bench, tmp_path, script, monkeypatch)
    assert outcome.record is None
    assert said in outcome.fault
    assert said in bench.table([], [outcome])


def test_a_goal_is_met_missed_or_not_measured(bench: ModuleType):
    goals = {g.name: g for g in bench.read_goals()}
    more = goals["quantise 4096x4096 bf16, double quant"]
    row = {"what": "quantise 4096x4096 bf16, double quant"}
    outcome = bench.Outcome(bench.Bench("nf4_kernels", "", "", (1, 1)), {"rows": [{**row, "ratio": 49.9}]})
    assert bench.table([more], [outcome]).endswith("NO")
    outcome.record["rows"][0]["ratio"] = 50.0
    assert bench.table([more], [outcome]).endswith("yes")
    outcome.record["rows"] = []
    assert "not measured" in bench.table([more], [outcome])


def test_a_figure_that_two_rows_could_be_is_an_error(bench: ModuleType):
    goal = bench.read_goals()[0]
    with pytest.raises(bench.FourscoreError, match="2 rows fit"):
        goal.measured({"rows": [{**goal.row, "ratio": 1}] * 2})


def test_a_busy_core_is_seen_and_refused(bench: ModuleType):
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others = bench.quiet.Others()
        with pytest.raises(subprocess.TimeoutExpired):
            spinning.wait(2.0)
        assert others.busy() > 0.3
    finally:
        spinning.kill()
        spinning.wait()
    assert bench.refusal({"others_busy_cores": 0.05}) is None
    assert "--force" in str(bench.refusal({"others_busy_cores": 1.0}))


def test_the_peers_versions_are_the_tested_ones():
    tested = set((ROOT / "constraints.txt").read_text().splitlines())
    pinned = [line for line in (ROOT / "bench/requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    assert pinned
    assert set(pinned) <= tested
