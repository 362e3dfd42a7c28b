"""report.json: true to its schema, to the files it came from, and open about what it lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
from report_fixture import build_run

from fourscore import report
from fourscore.files import FourscoreError, read_json, read_jsonl, write_json
from fourscore.report.answers import compare_answers, share_by_answer
from fourscore.report.schema import SCHEMA_FILE, schema_text


def test_committed_schema_is_the_generated_one() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m fourscore.report.schema"


def test_report_satisfies_its_schema_and_the_schema_has_teeth(passing: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    told = read_json(passing / "report.json")
    assert list(validator.iter_errors(told)) == []
    assert list(validator.iter_errors({**told, "surprise": 1}))
    assert list(validator.iter_errors({k: v for k, v in told.items() if k != "not_measured"}))
    assert list(validator.iter_errors({**told, "verdict": {**told["verdict"], "verdict": "MAYBE"}}))


def test_figures_are_those_of_the_files(passing: Path) -> None:
    told, verdict = read_json(passing / "report.json"), read_json(passing / "verdict.json")
    assert [g["difference"] for g in told["gates"]] == [g["difference"] for g in verdict["gates"]]
    assert told["verdict"]["shipped"] == {**verdict["shipped"], "base_sha256": None}  # the adapter works on the model itself
    shipped = next(a for a in told["arms"] if a["shipped"])
    assert shipped["name"] == "qlora-2"
    assert shipped["peak_rss_bytes"] == read_json(passing / "measures" / "qlora-2.json")["peak_rss_bytes"]
    before, after = (read_jsonl(passing / "items" / arm / "desk.jsonl") for arm in ("base-16bit", "qlora-2"))
    worse = sum(b["generated_correct"] and not a["generated_correct"] for b, a in zip(before, after, strict=True))
    assert told["answers"]["counts"]["got worse"] == worse > 0


def test_prediction_error_is_measured_over_predicted(passing: Path) -> None:
    told = {p["what"]: p for p in read_json(passing / "report.json")["predictions"]}
    train = 179.0 + 180.0  # the seconds of the two steps' records, starting up included
    assert told["Training"]["measured"] == train
    assert told["Training"]["error"] == pytest.approx(train / 330.0 - 1)
    assert told["Memory while training"]["error"] == pytest.approx(1.31 / 1.25 - 1)


@pytest.mark.parametrize(
    ("loss", "verdict", "words"),
    [(0.0, "PASS", "Yes, use it"), (0.09, "FAIL", "No, do not use it"), (0.045, "INCONCLUSIVE", "Not proven yet")],
)
def test_headline_says_the_verdict_and_what_to_do(tmp_path: Path, loss: float, verdict: str, words: str) -> None:
    told = report.assemble(build_run(tmp_path / "run", kept_loss=loss))
    assert told["verdict"]["verdict"] == verdict
    assert told["verdict"]["headline"].startswith(words)
    assert ("PIQA" in told["verdict"]["headline"]) == (verdict != "PASS")
    assert ("1,840" in told["verdict"]["advice"]) == (verdict == "INCONCLUSIVE")


def test_missing_pieces_are_named_and_never_zero(passing: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(passing, run)
    for name in ("plan.json", "check.json", "train-1.json", "measures/base-nf4.json"):
        (run / name).unlink()
    shutil.rmtree(run / "items")
    measures = read_json(run / "measures" / "qlora-2.json")
    write_json(run / "measures" / "qlora-2.json", measures | {"energy": None, "fidelity": None, "latency": None})
    told = report.assemble(run)
    missing = " ".join(gap["what"] for gap in told["not_measured"])
    for piece in (
        "Predictions",
        "The data check",
        "Training with seed 1",
        "Original model, 4 bit",
        "Answers side by side",
        "Safety",
        "Bias",
    ):
        assert piece in missing
    assert told["predictions"] == []
    assert told["answers"] is None
    page = report.render(told)
    assert "Predicted and measured" not in page
    assert all(gap["what"] in page for gap in told["not_measured"] if "'" not in gap["what"])


def test_study_and_verdict_alone_make_a_page(passing: Path, tmp_path: Path) -> None:
    for name in ("study.yaml", "verdict.json"):
        shutil.copy(passing / name, tmp_path / name)
    report.write(tmp_path)
    assert "None" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(read_json(tmp_path / "report.json")["not_measured"]) >= 12


def test_a_broken_run_leaves_the_old_page(passing: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(passing, run)
    verdict = read_json(run / "verdict.json")
    del verdict["gates"][0]["mean_arm"]
    write_json(run / "verdict.json", verdict)
    before = (run / "report.html").read_bytes()
    with pytest.raises(FourscoreError, match=r"verdict\.json.*mean_arm"):
        report.write(run)
    assert (run / "report.html").read_bytes() == before


def _item(key: str, gold: str, pred: str, sure: float) -> dict[str, object]:
    other = {"yes": "no", "no": "yes"}[pred]
    logs = {pred: -0.1, other: -0.1 - sure}
    return {"id": key, "gold": gold, "pred": pred, "correct": gold == pred, "choices": ["yes", "no"], "loglik": [logs["yes"], logs["no"]]}


def test_worst_changes_come_first() -> None:
    before = [_item("a", "yes", "yes", 1), _item("b", "yes", "yes", 1), _item("c", "no", "yes", 1), _item("d", "no", "yes", 1)]
    after = [_item("a", "yes", "no", 1), _item("b", "yes", "no", 5), _item("c", "no", "no", 1), _item("d", "no", "yes", 1)]
    told = compare_answers(before, after, {"b": "Is it?"})
    assert told is not None
    assert [(p.id, p.change) for p in told.pairs] == [("b", "got worse"), ("a", "got worse"), ("d", "still wrong"), ("c", "got better")]
    assert told.pairs[0].question == "Is it?"
    assert told.pairs[1].question is None
    assert told.counts == {"got worse": 2, "still wrong": 1, "got better": 1, "still right": 0}


def test_ten_answers_even_when_hundreds_got_worse() -> None:
    before = [_item(str(n), "yes", "yes", 1) for n in range(300)] + [_item(f"g{n}", "yes", "no", 1) for n in range(50)]
    after = [_item(str(n), "yes", "no", 1) for n in range(300)] + [_item(f"g{n}", "yes", "yes", 1) for n in range(50)]
    told = compare_answers(before, after, {})
    assert told is not None
    assert [p.change for p in told.pairs] == ["got worse"] * 6 + ["got better"] * 4


def test_a_shift_to_one_favourite_answer_shows() -> None:
    before = [_item(str(n), "yes" if n < 60 else "no", "no", 1) for n in range(100)]
    after = [_item(str(n), "yes" if n < 60 else "no", "yes", 1) for n in range(100)]
    yes, no = share_by_answer(before, after)
    assert (yes.items, yes.before_said, yes.after_said, yes.after_right) == (60, 0, 100, 60)
    assert (no.items, no.before_right, no.after_right) == (40, 40, 0)
