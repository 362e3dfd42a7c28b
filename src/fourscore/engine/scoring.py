"""Logits of many sequences through caches: what they share is computed once, and nothing is padded.

The sequences of a pack are a tree. Its branches of one depth are computed in one step, each after a fork of the cache of what it
branches from: with multiple choice the questions first, then all their choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourscore.engine.interface import Rows
from fourscore.engine.loop import Loop
from fourscore.engine.packing import packs, shared_beginning
from fourscore.files import FourscoreError


@dataclass
class Branch:
    """Tokens [start, end) of these sequences, which have them and all before in common. keep: logits wanted of its last tokens."""

    members: list[int]
    start: int
    end: int
    keep: int
    children: list[Branch] = field(default_factory=list)
    cache: int = -1
    first_row: int = 0


def cached_logits(
    loop: Loop, sequences: Sequence[list[int]], tails: Sequence[int], adapter: str | None, budget: int
) -> Iterator[tuple[list[int], Tensor, list[list[int]]]]:
    """Logits of the last `tails[i]` places of each sequence: (numbers of the sequences, logits, each one's rows in them)."""
    for pack in packs(sequences, budget, loop.runner.limit // 2):
        starts = {m: len(sequences[m]) - tails[m] for m in pack.members}
        roots = grow(sequences, pack.members, starts, 0)
        with loop.work, loop.context():
            logits, rows = _compute(loop, sequences, roots, adapter, starts)
        yield pack.members, logits, [rows[m] for m in pack.members]


def grow(sequences: Sequence[list[int]], members: list[int], starts: dict[int, int], at: int) -> list[Branch]:
    """The branches after the first `at` tokens, which the members (sorted by their tokens) have in common."""
    branches: list[Branch] = []
    groups: list[list[int]] = []
    for member in members:
        if len(sequences[member]) == at:
            continue  # it ends here
        if groups and sequences[groups[-1][0]][at] == sequences[member][at]:
            groups[-1].append(member)
        else:
            groups.append([member])
    for group in groups:
        end = shared_beginning(sequences[group[0]], sequences[group[-1]])  # sorted: the first and the last differ soonest
        keep = min(end - at, max(0, end - min(starts[m] for m in group)))
        branches.append(Branch(group, at, end, keep, grow(sequences, group, starts, end) if len(group) > 1 else []))
    return branches


def _compute(
    loop: Loop, sequences: Sequence[list[int]], roots: list[Branch], adapter: str | None, starts: dict[int, int]
) -> tuple[Tensor, dict[int, list[int]]]:
    runner, prefixes = loop.runner, loop.scheduler.prefixes
    every = list(_walk(roots))
    if not loop.scheduler.make_room(sum(b.end - b.start for b in every), len(every)):
        raise FourscoreError(
            f"a sequence of {max(b.end for b in every)} tokens, and the cache takes {runner.limit}",
            todo="shorten it, or make the engine with more cache_tokens",
        )
    held: set[int] = set()
    parts: list[Tensor] = []
    rows: dict[int, list[int]] = {m: [] for b in every for m in b.members}
    try:
        for root in roots:  # what earlier packs and answers begin with is there already
            first = sequences[root.members[0]]
            found = prefixes.longest(first[: root.end - max(root.keep, 1)], adapter, ())
            root.cache = runner.fork(*found) if found else runner.new()
            root.start = found[1] if found else 0
            held.add(root.cache)
        wave, count = roots, 0
        while wave:
            found_rows = [Rows(b.cache, sequences[b.members[0]][b.start : b.end], b.keep, adapter) for b in wave]
            for branch, logits in zip(wave, runner.extend(found_rows), strict=True):
                for m in branch.members:
                    skip = max(0, starts[m] - (branch.end - branch.keep))  # kept for another member, before this one's tail
                    rows[m] += range(count + skip, count + branch.keep)
                count += branch.keep
                parts.append(logits)
                for child in branch.children[1:]:
                    child.cache = runner.fork(branch.cache, branch.end)
                    held.add(child.cache)
                if branch.children:
                    branch.children[0].cache = branch.cache
            wave = [child for branch in wave for child in branch.children]
        _keep_one(loop, sequences, roots[-1], adapter, held)
    finally:
        for cache in held:
            runner.free(cache)
    return torch.cat(parts), rows


def _keep_one(loop: Loop, sequences: Sequence[list[int]], root: Branch, adapter: str | None, held: set[int]) -> None:
    """Leave the last of the pack to the next one: sequences are sorted, so that is whom it shares most with."""
    if loop.runner.shares:
        last = root
        while last.children:
            last = last.children[-1]
        held.discard(last.cache)
        loop.scheduler.prefixes.keep(last.cache, sequences[last.members[0]][: last.end], adapter)


def _walk(branches: list[Branch]) -> Iterator[Branch]:
    for branch in branches:
        yield branch
        yield from _walk(branch.children)
