"""The kept skills: every line of the wheel's files is either an item or listed as broken."""

import json
import re

import pytest

from fourscore.evaluate.skills import SOURCES, parse_skill, read_skill
from fourscore.files import FourscoreError

TWO = {"question": "q", "options": "A. left \nB.  right", "answer": "A. left "}


def lines(*rows):
    return [json.dumps(row) for row in rows]


@pytest.mark.parametrize(("task", "total", "broken"), [("piqa", 1500, []), ("commonsense_qa", 1221, [103, 117, 363, 364, 634, 1208])])
def test_the_wheels_files_parse_and_nothing_is_dropped_silently(task, total, broken):
    skill = read_skill(task)
    assert skill.lines == total
    assert [number for number, _ in skill.broken] == broken
    assert len(skill.rows) + len(skill.broken) == total
    assert sorted([row.number for row in skill.rows] + [number for number, _ in skill.broken]) == list(range(1, total + 1))
    assert len({row.id for row in skill.rows}) == len(skill.rows)
    assert all(row.answer in row.choices and len(set(row.choices)) == len(row.choices) for row in skill.rows)
    told = skill.to_json()
    assert told["usable"] == len(skill.rows)
    assert told["licence"] == {"piqa": "AFL-3.0", "commonsense_qa": "MIT"}[task]
    assert told["sha256"] == SOURCES[task].sha256


def test_first_items_are_a_fixed_shuffle_so_that_more_items_only_add():
    skill = read_skill("piqa")
    few, many = skill.first(50), skill.first(300)
    assert many[:50] == few
    assert [row.number for row in few] != list(range(1, 51))
    assert sorted(row.number for row in skill.first(1500)) == [row.number for row in skill.rows]
    with pytest.raises(FourscoreError, match="Ask for 1500 at most"):
        skill.first(1501)


def test_a_row_is_a_question_with_its_texts():
    row = parse_skill("piqa", lines(TWO), 2).rows[0]
    assert (row.choices, row.answer, row.number) == (["left", "right"], "left", 1)
    assert row.messages == [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert row.cluster == [row.id]


def test_items_that_ask_the_same_question_share_a_cluster():
    other = {"question": "q", "options": "A. up\nB. down", "answer": "B. down"}
    rows = parse_skill("piqa", lines(TWO, other, {**TWO, "question": "another"}, TWO), 2).rows
    assert rows[0].cluster == rows[1].cluster == rows[3].cluster != rows[2].cluster
    assert rows[2].cluster == [rows[2].id]
    assert len({row.id for row in rows}) == 4  # even the repeated line is an item of its own


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": "A. left"}, "lettered A, not AB"),
        ({"options": "A. left\nC. right"}, "lettered AC"),
        ({"options": ".\nA. left\nB. right"}, "lettered \\?AB"),
        ({"options": "A. left\nB. "}, "lettered A\\?"),
        ({"answer": "B. left"}, "none of the options"),
        ({"answer": "left"}, "none of the options"),
        ({"question": " "}, "question is empty"),
        ({"question": None}, "not a JSON object"),
    ],
)
def test_a_broken_row_is_listed_with_its_reason(change, why):
    skill = parse_skill("piqa", lines(TWO, TWO | change), 2)
    assert [number for number, _ in skill.broken] == [2]
    assert re.search(why, skill.broken[0][1])
    assert len(skill.rows) == 1


def test_a_line_that_is_no_json_is_broken_too():
    assert [n for n, _ in parse_skill("piqa", ["{", *lines(TWO)], 2).broken] == [1]


def test_an_option_that_stands_twice_is_one_choice():
    row = {"question": "q", "options": "\nA. ram\nB. lamb\nC. done\nD. ram\nE. wolf", "answer": "D. ram"}
    skill = parse_skill("commonsense_qa", lines(row), 5)
    assert skill.rows[0].choices == ["ram", "lamb", "done", "wolf"]
    assert skill.repeated_options == 1
