"""Duplicates: equal after folding, and near by word pairs, against a comparison of every pair with every other."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fourscore.data.duplicates import near_duplicates, normalise, repeats

PASSAGE = "The old harbour of the town was rebuilt in stone after the great storm had carried away its wooden piers in one night"


def pairs_of(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return set(pairwise(words)) if len(words) > 1 else {(words[0],)}


def near(a: str, b: str) -> bool:
    x, y = pairs_of(a), pairs_of(b)
    return a != b and len(x & y) * 10 >= 8 * len(x | y)


TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=1, max_size=14).map(" ".join), max_size=5)


@given(TEXTS, st.lists(st.sampled_from([f"{PASSAGE} {end}" for end in "pqrs"]), max_size=4), TEXTS)
@settings(max_examples=200)
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(some: list[str], passages: list[str], held_out: list[str]):
    train, evaluation = (some + passages)[:5], (held_out + passages[:1])[:4]  # under 10 texts: no wording is left out
    ours = list(dict.fromkeys(train))
    families: list[set[str]] = []
    for text in ours:
        linked = [f for f in families if any(near(text, other) for other in f)]
        families = [f for f in families if f not in linked] + [{text}.union(*linked)]
    between = sum(text not in ours and any(near(text, other) for other in ours) for text in evaluation)
    assert near_duplicates(train, evaluation) == (len(ours) - len(families), between)


def test_one_changed_word_in_a_passage_is_near_and_another_passage_is_not():
    changed = PASSAGE.replace("wooden", "iron")
    assert near_duplicates([PASSAGE], [changed, "Nothing of this kind stands anywhere else in the file of the town"]) == (0, 1)
    assert near_duplicates([PASSAGE, changed, PASSAGE], []) == (1, 0)


def test_the_wording_that_all_prompts_share_does_not_make_them_near():
    animals = ["cat", "dog", "cow", "hen", "bee", "ant", "elk", "fox", "owl", "rat"]
    prompts = [f"{PASSAGE} What does the animal do? {a} {a} {b}" for a, b in zip(animals, animals[1:] + animals[:1])]
    assert near_duplicates(prompts[:8], prompts[8:]) == (0, 0)


def test_folding_ignores_case_space_and_unicode_form_but_not_signs():
    assert normalise(" Caf\u00e9  AU\n lait ") == normalise("cafe\u0301 au lait")
    assert normalise("a < b") != normalise("a > b")
    assert repeats(["a", "b", "a", "a"]) == [2, 3]
