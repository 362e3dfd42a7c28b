"""From what a model wrote to the answer it gave: one rule for every arm.

A comparison is only fair when "Yes." counts as "yes" for the base as much as for the tuned model. The rule has two steps,
and both are counted in the measures:

exact   the text, normalised, is a permitted answer, normalised.
named   otherwise, exactly one permitted answer stands in the text as whole words ("The answer is race"). A longer answer
        hides a shorter one inside it ("money bank" is not "money"). Two named answers are `several`, none is `none`; both
        are wrong. A text that denies an answer ("not race") counts as naming it: the rule reads no meaning.

With permitted answers the first line that is not empty is read, because a model goes on to explain itself; free text is
read whole and must match exactly.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from fourscore.files import FourscoreError

ARTICLES = frozenset({"a", "an", "the"})
MARKS = frozenset("`^~|")  # marks of text formatting that Unicode calls symbols; %, &, + and currency signs carry meaning and stay
KEPT = frozenset("%&@#")

Rule = Literal["exact", "named", "several", "none"]


@dataclass(frozen=True)
class Match:
    """answer: the permitted answer as the study writes it, or the normalised text where none was matched; rule: how."""

    answer: str
    rule: Rule


def normalise(text: str, *, articles: bool = False) -> str:
    """Text as compared: NFKC, case folded, punctuation to spaces, articles out (unless nothing would be left), spaces single.

    A point or comma between digits and a minus before a digit stay: 3.5 is not 35, and -5 is not 5. articles: keep them.
    After SQuAD's evaluation script (Rajpurkar et al. 2016, arXiv 1606.05250), with Unicode.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if _means(folded, i) else " " for i, c in enumerate(folded)).split()
    bare = words if articles else [w for w in words if w not in ARTICLES]
    return " ".join(bare or words)


def _means(text: str, i: int) -> bool:
    """Whether the character at `i` carries meaning and stays."""
    c = text[i]
    before, after = text[i - 1 : i] if i else "", text[i + 1 : i + 2]
    if c in ".," and before.isdigit() and after.isdigit():
        return True
    if c in "-\u2212" and after.isdigit() and not before.isalnum():
        return True
    return c in KEPT or (c not in MARKS and not unicodedata.category(c).startswith("P"))


def match_answer(text: str, choices: list[str]) -> Match:
    """Which of the permitted answers `text` gives. Raises where two answers are the same once normalised."""
    # A task whose answers are letters has an article among them; then articles are words like any other.
    articles = any(normalise(choice) in ARTICLES for choice in choices)
    known = {normalise(choice, articles=articles): choice for choice in choices}
    if len(known) < len(choices) or "" in known:
        raise FourscoreError(
            "two permitted answers differ only in case, punctuation or articles, or one has no letters",
            where=f"choices {choices}",
            todo="name them apart in `data.choices`",
        )
    line = first_line(text) if not any("\n" in choice.strip() for choice in choices) else text
    said = normalise(line, articles=articles)
    if said in known:
        return Match(known[said], "exact")
    named = _named(said.split(), list(known))
    if len(named) == 1:
        return Match(known[named.pop()], "named")
    return Match(said, "several" if named else "none")


def match_text(text: str, gold: str) -> Match:
    """Free text: exact once normalised, or not at all. A gold answer without letters is compared as it stands."""
    said, meant = normalise(text), normalise(gold)
    same = said == meant if meant else text.strip() == gold.strip()
    return Match(gold, "exact") if same else Match(said, "none")


def first_line(text: str) -> str:
    """The first line with anything on it, or the empty text."""
    return next((line for line in re.split(r"[\r\n\u2028\u2029]+", text) if line.strip()), "")


def _named(words: list[str], answers: list[str]) -> set[str]:
    """The answers that stand in `words`; at each place the longest one counts, and reading goes on after it."""
    by_length = sorted((answer.split() for answer in answers), key=len, reverse=True)
    found, at = set(), 0
    while at < len(words):
        here = next((a for a in by_length if words[at : at + len(a)] == a and _may_stand(a, at, words)), None)
        if here is None:
            at += 1
        else:
            found.add(" ".join(here))
            at += len(here)
    return found


def _may_stand(answer: list[str], at: int, words: list[str]) -> bool:
    """The answer "a" is only named as the last word: before another word it is an article."""
    return len(answer) > 1 or answer[0] not in ARTICLES or at == len(words) - 1
