"""Many sequences as few forward passes: shared beginnings are computed once and nothing is padded.

Sequences that begin alike (the choices of a question, the questions under one system message) form a trie. A `Pack` is a
trie laid out depth first as one flat row of tokens, where a token may look at its ancestors and at itself only, so each
token sees exactly what it would see in its own sequence. This module knows nothing of networks: integers in, integers out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

OVERFULL = 4  # a pack may grow to this many budgets while that saves computing a long beginning again


@dataclass(frozen=True)
class Pack:
    """A trie of token sequences as one flat row.

    ids, positions, last: one entry a token: the token, its place in its own sequence, the flat place of its last descendant.
    members, paths: the numbers of the sequences in this pack, and for each the flat places of its tokens, in order.
    """

    ids: list[int]
    positions: list[int]
    last: list[int]
    members: list[int]
    paths: list[list[int]]

    @property
    def is_one_sequence(self) -> bool:
        """Whether the flat row is an ordinary sequence, which needs no mask of its own."""
        return self.positions[-1] == len(self.ids) - 1

    def visible(self) -> torch.Tensor:
        """Who sees whom: bool [tokens, tokens], row i is True at i and at the ancestors of i."""
        place = torch.arange(len(self.ids))
        return (place[None, :] <= place[:, None]) & (place[:, None] <= torch.tensor(self.last)[None, :])


def packs(sequences: Sequence[Sequence[int]], budget: int, most: int | None = None) -> Iterator[Pack]:
    """Lay the sequences out in packs of about `budget` tokens. Every sequence is in exactly one pack.

    A pack is longer than the budget when one sequence is, or while a sequence shares more with the one before than it adds
    (then a new pack would compute the shared part again), up to four budgets and never above `most`.
    """
    most = budget * OVERFULL if most is None else min(most, budget * OVERFULL)
    order = sorted(range(len(sequences)), key=lambda i: (tuple(sequences[i]), i))
    start = 0
    while start < len(order):
        size = len(sequences[order[start]])
        stop = start + 1
        while stop < len(order):
            shared = shared_beginning(sequences[order[stop - 1]], sequences[order[stop]])
            new = len(sequences[order[stop]]) - shared
            limit = most if shared > new else min(budget, most)
            if size + new > limit and new > 0:
                break
            size += new
            stop += 1
        yield _lay_out(sequences, order[start:stop])
        start = stop


def _lay_out(sequences: Sequence[Sequence[int]], members: list[int]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    paths: list[list[int]] = []
    path: list[int] = []
    before: Sequence[int] = ()
    for member in members:
        tokens = sequences[member]
        shared = shared_beginning(before, tokens)
        for place in path[shared:]:
            last[place] = len(ids) - 1
        path = path[:shared] + list(range(len(ids), len(ids) + len(tokens) - shared))
        ids.extend(tokens[shared:])
        positions.extend(range(shared, len(tokens)))
        last.extend([-1] * (len(tokens) - shared))
        paths.append(path)
        before = tokens
    for place in path:
        last[place] = len(ids) - 1
    return Pack(ids, positions, last, members, paths)


def shared_beginning(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
