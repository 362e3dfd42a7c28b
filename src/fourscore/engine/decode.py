"""Tokens one after another: prefill, then one step a token, many prompts in a batch.

Prompts of about the same length share a batch, padded on the left with the padding masked; rows that have ended leave it.
Which prompts share a batch depends on the prompts alone, not on their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fourscore.engine.runner import Runner, can_shrink

BATCH_ROWS, BATCH_TOKENS = 32, 8192  # most rows in a batch, and most tokens its caches may hold when all rows run to the end


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered: the new tokens without the stop token, their text, and why it ended."""

    ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass
class DecodeState:
    """One sequence under way: its tokens so far, the token that comes next, and the cache of all tokens in `ids` (None: no cache)."""

    ids: list[int]
    next_id: int
    adapter: str | None
    cache: Any = field(repr=False)


def batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, alone_above: int | None = None) -> Iterator[list[int]]:
    """Numbers of the prompts in batches of similar length, longest first (what does not fit in memory fails at once).

    A prompt that can grow above `alone_above` tokens has a batch of its own.
    """
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]), i)):
        longest = longest or len(prompts[i])
        alone = alone_above is not None and longest + max_new_tokens > alone_above
        if batch and (alone or len(batch) == BATCH_ROWS or (len(batch) + 1) * (longest + max_new_tokens) > BATCH_TOKENS):
            yield batch
            batch, longest = [], len(prompts[i])
        batch.append(i)
    if batch:
        yield batch


def decode(
    runner: Runner,
    prompts: list[list[int]],
    max_new_tokens: int,
    pick: Callable[[int, Tensor], int],
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """New tokens of each prompt, at most `max_new_tokens`; a row stops after the token that makes `ended(tokens)` True.

    pick(row, logits [vocabulary]) chooses a token.
    """
    width = max(len(p) for p in prompts)
    device = runner.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = runner.new_cache()
    rows = list(range(len(prompts)))  # the prompt in each row of the batch
    done = [False] * len(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    while True:
        logits = runner.extend(ids, mask, cache)
        for at, row in enumerate(rows):
            if not done[row]:
                new[row].append(pick(row, logits[at]))
                done[row] = len(new[row]) == max_new_tokens or ended(new[row])
        alive = [at for at, row in enumerate(rows) if not done[row]]
        if not alive:
            return new
        if len(alive) <= len(rows) * 3 // 4 and can_shrink(cache):  # dropping rows copies the cache: worth it when a good part has ended
            chosen = torch.tensor(alive, device=device)
            cache.batch_select_indices(chosen)
            mask, rows = mask[chosen], [rows[at] for at in alive]
        ids = torch.tensor([[new[row][-1]] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)


def decode_again(
    runner: Runner, prompt: list[int], max_new_tokens: int, pick: Callable[[Tensor], int], ended: Callable[[list[int]], bool]
) -> list[int]:
    """The new tokens of one prompt, each computed from the whole sequence anew: slow, and right for every network."""
    new: list[int] = []
    while not new or not (len(new) == max_new_tokens or ended(new)):
        new.append(pick(runner.plain(prompt + new, 1)[0].float()))
    return new


def sampler(temperature: float, seed: int, prompts: Sequence[Sequence[int]]) -> Callable[[int, Tensor], int]:
    """Chooses tokens: the likeliest at temperature 0 (the first of equals), else by softmax(logits / temperature).

    Every prompt draws from its own stream, made from the seed, its tokens and how many equal prompts came before it, so that
    an answer does not depend on the other prompts.
    """
    if temperature == 0:
        return lambda row, logits: int(logits.argmax())
    seen: dict[tuple[int, ...], int] = {}
    streams = []
    for prompt in prompts:
        copy = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        digest = hashlib.sha256(repr((seed, copy, list(prompt))).encode()).digest()
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))

    def draw(row: int, logits: Tensor) -> int:
        shares = torch.softmax(logits.double().cpu() / temperature, -1).cumsum(-1)
        point = torch.rand((), dtype=torch.float64, generator=streams[row]) * shares[-1]
        return min(int(torch.searchsorted(shares, point, right=True)), len(shares) - 1)

    return draw
