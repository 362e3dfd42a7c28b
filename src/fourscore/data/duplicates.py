"""Rows that say the same: equal texts, and texts that share most of their word pairs.

Near duplicates are found exactly, not by sketches: two texts are near when the Jaccard index of their sets of word pairs
is at least 0.8. Candidates come from the prefix filter (Chaudhuri et al. 2006, Bayardo et al. 2007): sets that near must
share one of their few rarest pairs. Good to some 50,000 rows.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

NEAR = 0.8
_ROUNDING = 1e-9  # 0.8 * 5 must count as 4
_WORD = re.compile(r"\w+|[^\w\s]")


def normalise(text: str) -> str:
    """The text for comparing: Unicode NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def repeats(keys: Sequence[str]) -> list[int]:
    """Positions whose key stood earlier."""
    seen: set[str] = set()
    found = []
    for position, key in enumerate(keys):
        if key in seen:
            found.append(position)
        seen.add(key)
    return found


def near_duplicates(train: Sequence[str], evaluation: Sequence[str]) -> tuple[int, int]:
    """Near duplicates among normalised texts: how many within `train`, and how many of `evaluation` are near one of `train`.

    Two texts that differ are near when the Jaccard index of their sets of word pairs is at least 0.8. Punctuation counts
    as words; a text of one word has that word alone. Word pairs that stand in more than half of all texts are the prompt's
    own wording and are left out (from 10 texts on). The first count is of rows beyond the first of each family of rows
    that nearness links; equal texts are one row here.
    """
    ours = dict.fromkeys(train)
    sets = _pair_sets([*ours, *(text for text in evaluation if text not in ours)])
    train_sets = [s for s in sets[: len(ours)] if s]
    holders: dict[int, list[int]] = defaultdict(list)
    family = list(range(len(train_sets)))
    links = 0
    for i, pairs in enumerate(train_sets):
        for j in _candidates(pairs, holders):
            if _root(family, i) != _root(family, j) and _near(pairs, train_sets[j]):
                family[_root(family, i)] = _root(family, j)
                links += 1
        for element in _prefix(pairs):
            holders[element].append(i)
    near = sum(any(_near(pairs, train_sets[j]) for j in _candidates(pairs, holders)) for pairs in sets[len(ours) :] if pairs)
    return links, near


def _pair_sets(texts: Sequence[str]) -> list[dict[int, None]]:
    """Each text's word pairs as numbers, rarest first (a dict: an ordered set)."""
    sets: list[set[tuple[str, ...]]] = []
    for text in texts:
        words = _WORD.findall(text)
        sets.append(set(pairwise(words)) if len(words) > 1 else {tuple(words)} if words else set())
    frequency = Counter(pair for pairs in sets for pair in pairs)
    common = {pair for pair, n in frequency.items() if n > len(texts) / 2} if len(texts) >= 10 else set()
    rank = {pair: place for place, pair in enumerate(sorted(frequency, key=lambda p: (frequency[p], p)))}
    return [dict.fromkeys(sorted(rank[pair] for pair in pairs if pair not in common)) for pairs in sets]


def _prefix(pairs: dict[int, None]) -> list[int]:
    """The rarest elements, of which any near set must hold one: J >= t needs an overlap of at least t times the size."""
    return list(pairs)[: len(pairs) - math.ceil(NEAR * len(pairs) - _ROUNDING) + 1]


def _candidates(pairs: dict[int, None], holders: dict[int, list[int]]) -> set[int]:
    return {i for element in _prefix(pairs) for i in holders.get(element, ())}


def _near(a: dict[int, None], b: dict[int, None]) -> bool:
    if min(len(a), len(b)) < NEAR * max(len(a), len(b)) - _ROUNDING:
        return False
    shared = len(a.keys() & b.keys())
    return shared >= NEAR * (len(a) + len(b) - shared) - _ROUNDING


def _root(family: list[int], i: int) -> int:
    while family[i] != i:
        family[i] = family[family[i]]  # halve the path, so that long chains stay cheap
        i = family[i]
    return i
