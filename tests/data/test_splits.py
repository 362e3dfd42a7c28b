"""Splits: whole groups on one side, the same split for the same seed, caps that lose as few groups as possible."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fourscore.data.splits import divide, draw, draw_balanced
from fourscore.files import FourscoreError
from fourscore.spec import Split

LABELS = st.lists(st.integers(0, 60).map(str), min_size=20, max_size=300).filter(lambda g: len(set(g)) >= 12)
SPLITS = st.builds(Split, validation=st.floats(0.05, 0.3), evaluation=st.floats(0.2, 0.5), seed=st.integers(0, 9))


@given(LABELS, SPLITS)
def test_no_group_stands_on_two_sides_and_no_row_is_lost(groups: list[str], split: Split):
    parts = divide(groups, split)
    assert sorted(i for rows in parts.values() for i in rows) == list(range(len(groups)))
    sides = [{groups[i] for i in rows} for rows in parts.values()]
    assert sum(map(len, sides)) == len(set(groups))
    assert len({groups[i] for i in parts["evaluation"]}) == round(split.evaluation * len(set(groups)))


@given(LABELS, SPLITS, st.randoms())
def test_the_order_of_rows_does_not_matter(groups: list[str], split: Split, random: Any):
    shuffled = groups.copy()
    random.shuffle(shuffled)
    for part, rows in divide(groups, split).items():
        assert {groups[i] for i in rows} == {shuffled[i] for i in divide(shuffled, split)[part]}


def test_another_seed_gives_another_split_and_the_share_is_of_groups():
    groups = ["big"] * 900 + [str(n) for n in range(99)]
    splits = [divide(groups, Split(validation=0.1, evaluation=0.3, seed=seed)) for seed in range(20)]
    for parts in splits:
        counts = {part: len({groups[i] for i in rows}) for part, rows in parts.items()}
        assert counts == {"train": 60, "validation": 10, "evaluation": 30}
    assert len({tuple(parts["evaluation"]) for parts in splits}) == 20
    assert any(0 in parts["evaluation"] for parts in splits)
    assert any(0 in parts["train"] for parts in splits)


def test_a_split_is_the_same_in_another_process():
    code = (
        "from fourscore.data.splits import divide; from fourscore.spec import Split;"
        "print(divide([str(n % 17) for n in range(100)], Split(seed=3))['evaluation'])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{divide([str(n % 17) for n in range(100)], Split(seed=3))['evaluation']}\n"}


@pytest.mark.parametrize("groups", [["a"] * 10, ["a", "b"] * 10, ["a", "b", "c"]])
def test_too_few_groups_are_an_error_with_the_numbers(groups: list[str]):
    with pytest.raises(FourscoreError, match=rf"{len(set(groups))} groups are too few to split"):
        divide(groups, Split())


@given(st.lists(st.integers(0, 8), min_size=1, max_size=120), st.integers(1, 120), st.integers(0, 5))
@settings(max_examples=60)
def test_a_balanced_cap_takes_from_every_group_alike(labels: list[int], most: int, seed: int):
    ids = [f"row {n}" for n in range(len(labels))]
    taken = draw_balanced(range(len(labels)), ids, labels, most, seed, "evaluation")
    assert len(taken) == len(set(taken)) == min(most, len(labels))
    assert taken == sorted(taken)
    all_of, some_of = Counter(labels), Counter(labels[i] for i in taken)
    level = max(some_of.values())
    for label, n in all_of.items():
        assert some_of[label] >= min(n, level - 1)  # a group is short only because it is used up, or by the last round


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.randoms())
def test_a_draw_depends_on_names_not_on_places(n: int, most: int, seed: int, random: Any):
    assume(most < n)
    ids = [f"row {i}" for i in range(n)]
    shuffled = ids.copy()
    random.shuffle(shuffled)
    drawn = {ids[i] for i in draw(range(n), ids, most, seed, "train")}
    assert len(drawn) == most
    assert drawn == {shuffled[i] for i in draw(range(n), shuffled, most, seed, "train")}


def test_draws_for_different_purposes_differ():
    ids = [f"row {i}" for i in range(100)]
    assert draw(range(100), ids, 10, 0, "train") != draw(range(100), ids, 10, 0, "validation")
