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

NEAR = 0.8
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


def near_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, of normalised texts that differ and whose word pairs have a Jaccard index of at least 0.8.

    Punctuation counts as words; a text of one word has that word alone. Word pairs that stand in more than half of the
    texts are the prompt's own wording and are left out (from 10 texts on). Equal texts are compared once.
    """
    where: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(texts):
        where[text].append(position)
    distinct = list(where)
    pairs = []
    for a, b in _near_sets(_pair_sets(distinct)):
        pairs.extend((min(i, j), max(i, j)) for i in where[distinct[a]] for j in where[distinct[b]])
    return sorted(pairs)


def _pair_sets(texts: Sequence[str]) -> list[list[int]]:
    """Each text's word pairs as numbers, rarest first."""
    sets: list[set[tuple[str, ...]]] = []
    for text in texts:
        words = _WORD.findall(text)
        sets.append(set(zip(words, words[1:])) if len(words) > 1 else {tuple(words)} if words else set())
    frequency = Counter(pair for pairs in sets for pair in pairs)
    common = {pair for pair, n in frequency.items() if n > len(texts) / 2} if len(texts) >= 10 else set()
    rank = {pair: place for place, pair in enumerate(sorted(frequency, key=lambda p: (frequency[p], p)))}
    return [sorted(rank[pair] for pair in pairs if pair not in common) for pairs in sets]


def _near_sets(sets: Sequence[list[int]]) -> list[tuple[int, int]]:
    """Indices of the sets (sorted, rarest first) with a Jaccard index of at least NEAR."""
    by_size = sorted((i for i, s in enumerate(sets) if s), key=lambda i: len(sets[i]))
    members = [frozenset(s) for s in sets]
    holders: dict[int, list[int]] = defaultdict(list)
    found = []
    for i in by_size:
        size = len(sets[i])
        # J >= t needs an overlap of at least t * |larger|: one shared element must stand before the last ceil(t * size) - 1
        prefix = sets[i][: size - math.ceil(NEAR * size - 1e-9) + 1]
        candidates = {j for element in prefix for j in holders[element] if len(sets[j]) >= NEAR * size - 1e-9}
        for j in candidates:
            shared = len(members[i] & members[j])
            if shared >= NEAR * (size + len(sets[j]) - shared) - 1e-9:
                found.append((min(i, j), max(i, j)))
        for element in prefix:
            holders[element].append(i)
    return found
