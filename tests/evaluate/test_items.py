"""Items and what they add up to, against sums done by hand."""

import math

import pytest

from fourscore.data.rows import Row
from fourscore.evaluate.items import Question, answered, best_choice, constant, summary
from fourscore.files import FourscoreError


def row(number, answer, choices, cluster=("c",)):
    return Row(f"{number:016x}", number, list(cluster), [{"role": "user", "content": [{"type": "text", "text": "q"}]}], answer, choices)


def question(number, answer, choices, lengths=None, cluster=("c",), tokens=2):
    ids = [[7] * tokens for _ in choices or [answer]]
    return Question("desk", row(number, answer, choices, cluster), [1, 2], "p" * 16, ids, choices.index(answer) if choices else 0, lengths)


def test_summary_by_hand():
    items = [
        answered(question(1, "yes", ["yes", "no"], cluster=("a",)), [-1.0, -2.0], "Yes.", True),
        answered(question(2, "no", ["yes", "no"], cluster=("a",)), [-1.0, -3.0], "I say no", False),
        answered(question(3, "no", ["yes", "no"], cluster=("b",)), [-2.0, -2.0], "no yes"),
    ]
    assert [item["correct"] for item in items] == [True, False, False]  # equals: the first choice is taken
    assert [item["generated_correct"] for item in items] == [True, True, False]
    told = summary(items)
    assert told["accuracy_likelihood"] == pytest.approx(1 / 3)
    assert told["accuracy_generated"] == pytest.approx(2 / 3)
    assert told["perplexity_answer"] == pytest.approx(math.exp((1 + 3 + 2) / 6))
    assert (told["items"], told["clusters"], told["ties"]) == (3, [2], 1)
    assert told["matched_by"] == {"exact": 1, "named": 1, "several": 1}
    assert told["predictions"] == {"yes": 3}
    assert told["chance"] == 0.5
    assert told["unfinished"] == 1


def test_kept_skills_compare_per_byte():
    assert best_choice(["ab", "abcd"], [-3.0, -4.0], None) == ("ab", False)
    assert best_choice(["ab", "abcd"], [-3.0, -4.0], [2, 4]) == ("abcd", False)
    item = answered(question(1, "abcd", ["ab", "abcd"], lengths=[2, 4]), [-3.0, -4.0], None)
    assert item["correct"] is True
    assert item["lengths"] == [2, 4]
    assert item["generated"] is None
    assert summary([item])["accuracy_generated"] is None


def test_free_text_has_no_likelihood_verdict():
    item = answered(question(1, "the invoice", []), [-5.0], "The invoice.")
    assert (item["loglik"], item["pred"], item["correct"], item["generated_correct"]) == ([], None, None, True)
    assert item["answer_nll"] == 5.0
    assert summary([item])["accuracy_likelihood"] is None


def test_a_constant_arm_says_the_same_in_both_ways():
    items = [constant("desk", row(i, gold, ["yes", "no"]), "p" * 16, "no", 2) for i, gold in enumerate(["no", "yes", "no"])]
    told = summary(items)
    assert told["accuracy_likelihood"] == told["accuracy_generated"] == pytest.approx(2 / 3)
    assert told["perplexity_answer"] is None


def test_two_way_clusters_are_counted_by_way():
    items = [answered(question(i, "yes", ["yes", "no"], cluster=(f"p{i % 2}", f"q{i}")), [-1.0, -2.0], None) for i in range(4)]
    assert summary(items)["clusters"] == [2, 4]


def test_a_likelihood_that_is_no_number_stops_with_the_row():
    with pytest.raises(FourscoreError, match=r"desk, row 3.*not a number"):
        answered(question(3, "yes", ["yes", "no"]), [float("nan"), -1.0], None)
