"""Which rows train, choose and judge: whole groups on one side, drawn by hashes of the seed and of names.

A hash orders the groups and the rows, so a split is the same on every machine and for any order of the source's rows,
and a row added to an old group moves no other row.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import zip_longest

from fourscore.data.rows import PARTS, Part
from fourscore.files import FourscoreError
from fourscore.spec import Split

FEWEST_EVALUATION_GROUPS = 2  # one cluster has no variance: no interval


def order_key(seed: int, purpose: str, name: str) -> bytes:
    """What a seeded draw sorts by: SHA-256 of seed, purpose and name."""
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()


def divide(groups: Sequence[str], split: Split) -> dict[Part, list[int]]:
    """Row numbers (from 0, ascending) of each part; `groups` holds one label a row.

    The distinct labels in seeded order: the first `split.evaluation` share of them is held out, the next
    `split.validation` share validates, the rest trains (shares of the number of groups, rounded, validation at least
    one). FourscoreError when that leaves fewer than 2 groups for evaluation or none for another part.
    """
    order = sorted(set(groups), key=lambda g: order_key(split.seed, "group", g))
    held_out = round(split.evaluation * len(order))
    choosing = max(1, round(split.validation * len(order)))
    training = len(order) - held_out - choosing
    if held_out < FEWEST_EVALUATION_GROUPS or training < 1:
        raise FourscoreError(
            f"{len(order)} groups are too few to split: {held_out} to evaluate (at least {FEWEST_EVALUATION_GROUPS}), "
            f"{choosing} to validate (1), {max(training, 0)} to train (1)",
            where="data.split",
            todo="group by a column with more values, bring more rows, or change the shares",
        )
    side: dict[str, Part] = {}
    for place, group in enumerate(order):
        side[group] = "evaluation" if place < held_out else "validation" if place < held_out + choosing else "train"
    parts: dict[Part, list[int]] = {part: [] for part in PARTS}
    for index, group in enumerate(groups):
        parts[side[group]].append(index)
    return parts


def draw(rows: Sequence[int], ids: Sequence[str], most: int | None, seed: int, purpose: str) -> list[int]:
    """At most `most` of `rows`, each equally likely, in ascending order. `ids[row]` names a row."""
    if most is None or len(rows) <= most:
        return sorted(rows)
    return sorted(sorted(rows, key=lambda r: order_key(seed, purpose, ids[r]))[:most])


def draw_balanced(rows: Sequence[int], ids: Sequence[str], groups: Sequence[Hashable], most: int, seed: int, purpose: str) -> list[int]:
    """At most `most` of `rows`, in ascending order, taken in rounds: one row of each group, then a second of each, and so on.

    Large groups are cut down before small ones lose a row, so a cap costs as few clusters as possible and no group weighs
    more than it must. The last round stops at a random place of the groups' seeded order.
    """
    if len(rows) <= most:
        return sorted(rows)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: order_key(seed, purpose, ids[r])):
        members[groups[row]].append(row)
    in_order = sorted(members, key=lambda g: order_key(seed, purpose + " group", str(g)))
    rounds = zip_longest(*(members[group] for group in in_order))
    taken = [row for one_round in rounds for row in one_round if row is not None]
    return sorted(taken[:most])
