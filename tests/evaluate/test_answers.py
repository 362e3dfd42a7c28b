"""One rule from text to answer. The table is what a fair reader would say of each text."""

import pytest

from fourscore.evaluate.answers import match_answer, match_text, normalise
from fourscore.files import FourscoreError

GROUPS = ["gender", "profession", "race", "religion"]


@pytest.mark.parametrize(
    ("text", "choices", "answer", "rule"),
    [
        ("yes", ["yes", "no"], "yes", "exact"),
        ("Yes.", ["yes", "no"], "yes", "exact"),  # an exact match on this text is how a rival scored its base 0.000
        (" **YES!** ", ["yes", "no"], "yes", "exact"),
        ("Yes", ["Yes.", "No."], "Yes.", "exact"),
        ("The race", GROUPS, "race", "exact"),
        ("The answer is race", GROUPS, "race", "named"),
        ("The answer is: Race.\nBecause of its religion", GROUPS, "race", "named"),
        ("\n\n  religion\n", GROUPS, "religion", "exact"),
        ("race/religion", GROUPS, "race religion", "several"),
        ("gender, profession, race or religion", GROUPS, "gender profession race or religion", "several"),
        ("race, and race again", GROUPS, "race", "named"),
        ("racehorse", GROUPS, "racehorse", "none"),  # whole words only
        ("", GROUPS, "", "none"),
        ("...", GROUPS, "", "none"),
        ("ｒａｃｅ", GROUPS, "race", "exact"),  # full-width letters
        ("STRASSE", ["Straße", "Weg"], "Straße", "exact"),
        ("I would take the money bank.", ["money", "money bank"], "money bank", "named"),
        ("money", ["money", "money bank"], "money", "exact"),
        ("my money is in a money bank", ["money", "money bank"], "my money is in money bank", "several"),
        ("B", ["A", "B", "C"], "B", "exact"),
        ("The answer is A.", ["A", "B", "C"], "A", "named"),
        ("A dog is B", ["A", "B", "C"], "B", "named"),  # an article is not the answer A
        ("3.5", ["35", "3.5"], "3.5", "exact"),
        ("-5 degrees", ["5", "-5"], "-5", "named"),
        ("50%", ["50%", "50"], "50%", "exact"),
        ("C++", ["C", "C++"], "C++", "exact"),
    ],
)
def test_table(text, choices, answer, rule):
    match = match_answer(text, choices)
    assert (match.answer, match.rule) == (answer, rule)


def test_normalise_is_idempotent_and_says_nothing_for_no_words():
    for text in ("The  “Quoted” — text…", "a", "the the", "½ of it", "e.g. 1,000.5 €"):
        assert normalise(normalise(text)) == normalise(text)
    assert normalise("?!") == ""
    assert normalise("the") == "the"  # an answer that is only an article is still an answer


def test_choices_that_look_alike_once_normalised_are_an_error():
    with pytest.raises(FourscoreError, match="differ only in case"):
        match_answer("yes", ["yes", "Yes!"])
    with pytest.raises(FourscoreError, match="no letters"):
        match_answer("+", ["!", "?"])


def test_free_text_is_exact_or_not_at_all():
    assert match_text("The invoice, 3.5 EUR.", "the invoice 3.5 eur").rule == "exact"
    assert match_text("the invoice is 3.5 eur", "the invoice 3.5 eur").rule == "none"
    assert match_text('{"a": 1}\n{"b": 2}', '{"a": 1}\n{"b": 2}').rule == "exact"
    assert match_text('{"a": 1}', '{"a": 1}\n{"b": 2}').rule == "none"
    assert match_text("!!", "!!").rule == "exact"
    assert match_text("??", "!!").rule == "none"
