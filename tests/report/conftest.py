"""One made-up run, written once for all tests of the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from report_fixture import build_run

from fourscore import report

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> {{ 7*7 }} | **bold** ]]>"


@pytest.fixture(scope="session")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that passes, with its three written files."""
    run = build_run(tmp_path_factory.mktemp("report") / "triage")
    report.write(run)
    return run


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data, answers and purpose hold markup, with its three written files."""
    run = build_run(tmp_path_factory.mktemp("hostile") / "triage", hostile=HOSTILE)
    report.write(run)
    return run
