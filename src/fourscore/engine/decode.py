"""Tokens one after another over transformers' code: prefill, then one step a token, many prompts in a batch.

Prompts of about the same length share a batch, padded on the left with the padding masked; rows that have ended leave it.
Which prompts share a batch depends on the prompts alone, not on their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fourscore.engine.answer import Answer
from fourscore.engine.runner import Runner, can_shrink

BATCH_ROWS, BATCH_TOKENS = 32, 8192  # most rows in a batch, and most tokens its caches may hold when all rows run to the end


@dataclass
class DecodeState:
    """One sequence under way: its tokens so far, the token that comes next, and the number of its cache, freed with the state."""

    ids: list[int]
    next_id: int
    adapter: str | None
    cache: int = field(repr=False)


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


def decode(runner: Runner, prompts: list[list[int]], answers: Sequence[Answer]) -> None:
    """Let each prompt's answer grow until it is finished."""
    width = max(len(p) for p in prompts)
    device = runner.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = runner.new_cache()
    rows = list(range(len(prompts)))  # the prompt in each row of the batch
    last = [0] * len(prompts)
    while True:
        logits = runner.extend(ids, mask, cache)
        for at, row in enumerate(rows):
            if not answers[row].finished:
                last[row] = answers[row].take(logits[at])
        alive = [at for at, row in enumerate(rows) if not answers[row].finished]
        if not alive:
            return
        if len(alive) <= len(rows) * 3 // 4 and can_shrink(cache):  # dropping rows copies the cache: worth it when a good part has ended
            chosen = torch.tensor(alive, device=device)
            cache.batch_select_indices(chosen)
            mask, rows = mask[chosen], [rows[at] for at in alive]
        ids = torch.tensor([[last[row]] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)


def decode_again(runner: Runner, prompt: list[int], answer: Answer) -> None:
    """Let an answer grow, each token computed from the whole sequence anew: slow, and right for every network."""
    ids = list(prompt)
    while not answer.finished:
        ids.append(answer.take(runner.plain(ids, 1)[0].float()))
