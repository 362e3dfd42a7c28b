"""How the next token is chosen: what a request may ask for, and the draw.

The order and the meaning are those of transformers' logits processors: grammar, repetition penalty, temperature, top-k, top-p,
min-p. A draw depends on the logits, the request's seed and its own prompt, never on who shares the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourscore.files import FourscoreError

if TYPE_CHECKING:
    from fourscore.engine.grammar import Matcher

NUCLEUS = 128  # words looked at first for top-p


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of its answer.

    temperature: 0 takes the likeliest token (the first of equals); top_k, top_p, min_p then change nothing. top_k: only the k
    likeliest (None: all). top_p: the likeliest that together reach this share. min_p: only tokens of at least this share of the
    likeliest one's probability. repetition_penalty: logits of tokens seen in prompt or answer are divided by it (multiplied
    where negative). stop: strings before which the answer ends. stop_ids: tokens that end it, besides the model's own. logprobs:
    how many of the likeliest tokens to report at each place (0: only the chosen one's; None: nothing). schema: a JSON Schema
    that the answer follows (it is cut, as any answer, at max_new_tokens).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            ("temperature", _number(self.temperature, 0, math.inf), "a number of at least 0"),
            ("top_k", self.top_k is None or _whole(self.top_k, 1), "a whole number of at least 1, or None"),
            ("top_p", _number(self.top_p, 0, 1), "between 0 and 1"),
            ("min_p", _number(self.min_p, 0, 1), "between 0 and 1"),
            ("repetition_penalty", _number(self.repetition_penalty, 0, math.inf) and self.repetition_penalty > 0, "a number above 0"),
            ("seed", _whole(self.seed, -(2**63)), "a whole number"),
            ("stop", _tuple(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            ("stop_ids", _tuple(self.stop_ids, int), "a tuple of token ids"),
            ("logprobs", self.logprobs is None or _whole(self.logprobs, 0), "a whole number of at least 0, or None"),
            ("schema", self.schema is None or isinstance(self.schema, Mapping), "a JSON Schema as a mapping, or None"),
        ]
        for name, good, wanted in checks:
            if not good:
                raise FourscoreError(f"`{name}` is {getattr(self, name)!r}", where="sampling", todo=f"give {wanted}")


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token's log-probability (nats) and those of the likeliest tokens, likeliest first: (id, log-probability).

    They are the model's own, before grammar, penalty, temperature and cuts: the numbers that `Engine.score` adds up.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence. copy: how many requests with equal prompt and seed came before it in one call."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], copy: int = 0, matcher: Matcher | None = None) -> None:
        self.sampling, self.matcher = sampling, matcher
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        digest = hashlib.sha256(repr((sampling.seed, copy, list(prompt))).encode()).digest()
        self._stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def pick(self, logits: Tensor) -> int:
        """The next token, by these logits [vocabulary]."""
        if self.matcher is not None:
            logits = logits.masked_fill(~self.matcher.allowed(logits.shape[-1]).to(logits.device), -math.inf)
        if self._seen:
            logits = penalised(logits, sorted(self._seen), self.sampling.repetition_penalty)
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._draw(logits)
        if self.matcher is not None:
            self.matcher.take(token)
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        words, left = cut(logits.double().cpu(), self.sampling)
        shares = torch.softmax(left, -1).cumsum(-1)
        point = torch.rand((), dtype=torch.float64, generator=self._stream) * shares[-1]
        at = min(int(torch.searchsorted(shares, point, right=True)), len(shares) - 1)
        return at if words is None else int(words[at])


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """The logits [vocabulary] with those of the tokens `seen` divided by the penalty, or multiplied where negative."""
    index = torch.tensor(seen, device=logits.device)
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def cut(logits: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """What top-k, then top-p, then min-p leave of the logits [vocabulary] over the temperature: (words, ascending, and their logits).

    None for the words: all are left. At least the likeliest is.
    """
    words, logits = None, logits / sampling.temperature

    def keep(inside: Tensor) -> None:
        nonlocal words, logits
        words, logits = inside if words is None else words[inside], logits[inside]

    if sampling.top_k is not None and sampling.top_k < len(logits):
        keep((logits >= logits.topk(sampling.top_k).values[-1]).nonzero().flatten())
    if sampling.top_p < 1:
        keep(_nucleus(torch.softmax(logits, -1), sampling.top_p).sort().values)
    if sampling.min_p > 0:
        shares = torch.softmax(logits, -1)
        keep((shares >= sampling.min_p * shares.max()).nonzero().flatten())
    return words, logits


def _nucleus(shares: Tensor, top_p: float) -> Tensor:
    """The likeliest words until they reach the share top_p, at least one. Few do mostly: sorting all costs ten times as much."""
    count = NUCLEUS
    while True:
        best = shares.topk(min(count, len(shares)))
        reached = best.values.cumsum(-1)
        if reached[-1] >= top_p or count >= len(shares):
            break
        count *= 8
    inside = reached - best.values < top_p
    inside[0] = True
    return best.indices[inside]


def logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """What to report of a chosen token, from the model's logits [vocabulary]."""
    row = torch.log_softmax(logits, -1, dtype=torch.float32)
    best = row.topk(min(count, len(row)))
    return TokenLogprobs(token, float(row[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def _tuple(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, kind) for v in values)
