"""model-card.md: front matter that a hub can read, and figures that agree with the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fourscore import report
from fourscore.files import read_json


def front_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_front_matter_names_the_base_and_the_measured_values(passing: Path) -> None:
    card, told = (passing / "model-card.md").read_text(encoding="utf-8"), read_json(passing / "report.json")
    head = front_of(card)
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["library_name"] == "peft"
    shipped = next(a for a in told["arms"] if a["shipped"])
    results = {r["dataset"]["type"]: {m["name"]: m["value"] for m in r["metrics"]} for r in head["model-index"][0]["results"]}
    assert results["triage"]["accuracy, choosing"] == pytest.approx(shipped["tasks"]["desk"]["accuracy_likelihood"], abs=1e-4)
    assert results["piqa"]["accuracy, choosing"] == pytest.approx(shipped["tasks"]["piqa"]["accuracy_likelihood"], abs=1e-4)


def test_card_states_verdict_limits_and_licences(passing: Path) -> None:
    card = (passing / "model-card.md").read_text(encoding="utf-8")
    for words in ("**PASS.**", "stored in 4 bits", "Not measured: Safety", "under Apache-2.0", "under CC-BY-SA-4.0", "SHA-256", "+77.7"):
        assert words in card
    for placeholder in ("None", "unknown", "TODO", "[More Information Needed]", "nan"):
        assert placeholder not in card


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("LicenseRef-own", {"license": "apache-2.0"}),
        ("CC-BY-4.0", {"license": "apache-2.0"}),
        ("CC-BY-SA-4.0", {"license": "other", "license_name": "apache-2.0-and-cc-by-sa-4.0"}),
        (None, {"license": "other", "license_name": "apache-2.0-and-data-of-unstated-licence"}),
    ],
)
def test_licence_is_the_bases_unless_the_data_may_ask_for_more(passing: Path, data: str | None, expected: dict[str, str]) -> None:
    told = read_json(passing / "report.json")
    told["data"]["licence"] = data
    head = front_of(report.model_card(told))
    assert {k: v for k, v in head.items() if k.startswith("license")} == expected


def test_a_failed_study_is_not_offered_for_use(passing: Path) -> None:
    told = read_json(passing / "report.json")
    told["verdict"]["verdict"] = "FAIL"
    assert "do not use it as it is" in report.model_card(told)


def test_markup_in_data_stays_text(hostile: Path) -> None:
    card = (hostile / "model-card.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2]
    assert "<script" not in body.replace("\\<script", "")
    assert "**bold**" not in body
    assert front_of(card)["model-index"][0]["name"] == "triage"
