"""The study file: what is refused, and whether the one line says where and what to do."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from fourscore.files import FourscoreError
from fourscore.spec import parse_study, read_study

ROOT = Path(__file__).parent.parent
GOOD = """\
study: desk
model: {name: smollm2-135m-instruct}
data:
  source: rows.jsonl
  prompt:
    user: "{{ question }}"
    answer: "{{ answer }}"
  choices: ["yes", "no"]
"""


def refused(text: str) -> str:
    with pytest.raises(FourscoreError) as caught:
        parse_study(text, "study.yaml")
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_small_file_is_enough_and_defaults_are_the_papers():
    study = parse_study(GOOD)
    assert study.train.targets == "all-linear"
    assert study.model.block_size == 64
    assert study.model.double_quant
    assert study.evaluate.arms == ["trivial", "base-16bit", "base-nf4", "qlora"]


def test_an_unknown_key_names_its_line_and_the_nearest_key():
    line = refused(GOOD + "train:\n  learning_rat: 1.0e-4\n")
    assert line == "study.yaml:10: unknown key `train.learning_rat`. Did you mean `learning_rate`?"


def test_a_missing_field_says_what_belongs_there():
    line = refused(GOOD.replace('    answer: "{{ answer }}"\n', ""))
    assert "missing field `data.prompt.answer`" in line
    assert re.match(r"study\.yaml:5: ", line)
    assert "{{ answer }}" in line


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("source: rows.jsonl", "source: wheel:a==1/b.jsonl", "sha256"),
        ("  choices:", "  choices: [a]\n  choices:", "stands twice"),
        ('["yes", "no"]', '["yes", "yes"]', "repeats an answer"),
        ('["yes", "no"]', "[only]", "at least two"),
        ('["yes", "no"]', "[yes, no]", "write it in quotes"),
        ("data:\n", "train: {learning_rate: .inf}\ndata:\n", "learning_rate"),
        ("data:\n", "train: {seeds: [true]}\ndata:\n", "seeds"),
        ("data:\n", "evaluate: {arms: [trivial, trivial, base-16bit, qlora]}\ndata:\n", "names one thing twice"),
        ("study: desk", "study: &a desk\npurpose: *a", "alias"),
        ('["yes", "no"]', "[]", "likelihood"),
        ("study: desk", "study: ../desk", "study"),
        ("data:\n", "evaluate: {arms: [trivial, qlora]}\ndata:\n", "base-16bit"),
        ("data:\n", "evaluate: {keep: [{task: piqa, margin: 0}]}\ndata:\n", "evaluate.keep.0.margin"),
        ("data:\n", "train: {seeds: [1, 1]}\ndata:\n", "repeats a seed"),
        ("data:\n", "data: [\n", "not YAML"),
    ],
)
def test_contradictions_are_refused_with_a_place(old: str, new: str, says: str):
    line = refused(GOOD.replace(old, new, 1))
    assert says in line
    assert re.match(r"study\.yaml:\d+: ", line)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(text: str):
    assert "fourscore init" in refused(text)


def test_a_study_that_is_not_there_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FourscoreError, match="no such study file.*fourscore init"):
        read_study(tmp_path / "no.yaml")


def test_a_data_file_is_found_beside_the_study(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "study.yaml").write_text(GOOD)
    assert Path(read_study(tmp_path / "study.yaml").data.source).resolve() == tmp_path / "rows.jsonl"


def test_every_example_is_a_valid_study():
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        assert read_study(example).study == example.stem


def test_the_reference_page_is_up_to_date():
    reference = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == reference()
