"""Rows to token batches: which rows share an optimiser step, and which of them share a forward pass.

A step holds at most `tokens_per_step` real tokens, drawn from a seeded shuffle, so that a step is a fair sample of the
rows. Inside a step the rows are sorted by length and cut into micro-batches where that wastes least: padding costs
time, and so does another pass over the weights. Everything here is arithmetic on lengths: the same lengths, seed and
epoch give the same batches everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fourscore.files import FourscoreError

if TYPE_CHECKING:
    from fourscore.data import Row

PASS_TOKENS = 64  # what one more pass over the weights costs, in tokens computed: measured on a 135M model, 2 cores
MICRO_TOKENS = 1024  # most tokens of one forward pass, padding included, unless one row alone is longer


@dataclass(frozen=True)
class Example:
    """A row as the network reads it: `ids[prompt_length:]` are the answer's tokens, the only ones trained on."""

    number: int  # row number in the source, from 1
    ids: tuple[int, ...]
    prompt_length: int
    answer: str

    @property
    def supervised(self) -> int:
        """How many tokens are trained on."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class MicroBatch:
    """Rows that share one forward pass, padded on the right; causal attention never lets a token see the padding.

    input_ids i64 [B, T] · positions i64 [n]: where in the flattened [B*T] an answer token is predicted · targets i64 [n].
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: int  # of the rows, answers included
    padding: int


Step = tuple[tuple[int, ...], ...]  # micro-batches of row indices


def render_examples(tokenizer: Any, rows: Sequence[Row]) -> list[Example]:
    """Render rows through the model's chat template. A row without a trainable token is a FourscoreError with its number."""
    from fourscore.data.template import render_row

    examples = []
    for row in rows:
        rendered = render_row(tokenizer, row.messages, row.answer)
        example = Example(row.number, tuple(rendered.ids), rendered.prompt_length, row.answer)
        if example.supervised < 1 or example.prompt_length < 1:
            raise FourscoreError(
                f"row {row.number} has no trainable token ({len(example.ids)} tokens, {example.prompt_length} of them the prompt)",
                todo="give it an answer, or take it out of the data",
            )
        examples.append(example)
    return examples


def plan_steps(lengths: Sequence[int], tokens_per_step: int, epochs: float, seed: int) -> list[Step]:
    """All optimiser steps of a run. `lengths`: tokens of each row; a fraction of an epoch takes that share of its rows."""
    steps: list[Step] = []
    whole = int(epochs)
    for epoch in range(whole + (1 if epochs > whole else 0)):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        if epoch == whole:
            order = order[: max(1, round((epochs - whole) * len(order)))]
        steps += [micro_batches(group, lengths) for group in _fill(order, lengths, tokens_per_step)]
    return steps


def _fill(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut `order` into the fewest runs of at most `limit` tokens, as even as can be.

    Evenness matters for the last step: a step of two left-over rows would move the weights as far as a full one.
    """

    def cut(cap: int) -> list[list[int]]:
        groups: list[list[int]] = []
        held = 0
        for index in order:
            if not groups or held + lengths[index] > cap:
                groups.append([])
                held = 0
            groups[-1].append(index)
            held += lengths[index]
        return groups

    fewest = len(cut(limit))
    low, high = 1, limit
    while low < high:  # the smallest cap that needs no more steps
        middle = (low + high) // 2
        if len(cut(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return cut(low)


def micro_batches(rows: Sequence[int], lengths: Sequence[int], limit: int = MICRO_TOKENS) -> Step:
    """Sort `rows` by length (longest first) and cut them where padding plus passes cost least (dynamic programming).

    At most `limit` padded tokens a micro-batch; a longer row is a micro-batch of its own.
    """
    ranked = sorted(rows, key=lambda i: (-lengths[i], i))
    best = [0.0] + [float("inf")] * len(ranked)
    start = [0] * (len(ranked) + 1)
    for end in range(1, len(ranked) + 1):
        for first in range(end - 1, -1, -1):
            padded = lengths[ranked[first]] * (end - first)
            if padded > limit and end - first > 1:
                break
            if best[first] + padded + PASS_TOKENS < best[end]:
                best[end], start[end] = best[first] + padded + PASS_TOKENS, first
    cuts = []
    end = len(ranked)
    while end:
        cuts.append(tuple(ranked[start[end] : end]))
        end = start[end]
    return tuple(reversed(cuts))


def collate(examples: Sequence[Example], rows: Sequence[int]) -> MicroBatch:
    """Build the tensors of one micro-batch. A row's last token is predicted and never read, so it is not an input."""
    chosen = [examples[i] for i in rows]
    width = max(len(e.ids) for e in chosen) - 1
    input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for line, example in enumerate(chosen):
        input_ids[line, : len(example.ids) - 1] = torch.tensor(example.ids[:-1])
        positions += range(line * width + example.prompt_length - 1, line * width + len(example.ids) - 1)
        targets += example.ids[example.prompt_length :]
    tokens = sum(len(e.ids) for e in chosen)
    padding = input_ids.numel() + len(chosen) - tokens
    return MicroBatch(tuple(rows), input_ids, torch.tensor(positions), torch.tensor(targets), tokens, padding)
