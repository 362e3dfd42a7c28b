"""One request on its way through the engine: its tokens, how many of them its cache holds, and what its reader was told."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import replace

from torch import Tensor

from fourscore.engine.answer import Answer
from fourscore.engine.stream import FinishReason, Piece, Stream, Usage


class Sequence:
    """ids: the prompt and the tokens chosen so far; the cache holds the first `computed` of them. number: its place in the line."""

    def __init__(self, number: int, prompt: Ids[int], answer: Answer, adapter: str | None) -> None:
        self.number, self.ids, self.answer, self.adapter = number, list(prompt), answer, adapter
        self.prompt_tokens = len(prompt)
        self.cache: int | None = None
        self.computed = 0
        self.stream = Stream(len(prompt), adapter)
        self.finished: FinishReason | None = None
        self._submitted = self._last = time.perf_counter()

    @property
    def left(self) -> int:
        """Tokens that are still to be computed before the next one can be chosen."""
        return len(self.ids) - self.computed

    def admitted(self, cache: int, shared: int) -> None:
        """It has a cache, which holds the first `shared` tokens already."""
        self.cache, self.computed = cache, shared
        if self.stream.timing.queued is None:
            self.stream.timing.queued = time.perf_counter() - self._submitted
            self.stream.usage = Usage(self.prompt_tokens, shared, 0)

    def choose(self, logits: Tensor) -> None:
        """Take the next token, by the logits [vocabulary] of the last one; tell the reader."""
        self.ids.append(self.answer.take(logits))
        self._clock()
        self.stream.usage = replace(self.stream.usage, new=self.answer.new)
        self.finished = self.answer.finished
        if not self.finished:
            self._put(*self.answer.text.certain())

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more is computed: the rest of the text goes out, or the error that stopped it."""
        if error is None:
            self._put(*self.answer.text.rest())
        self.stream.end(self.finished if error is None else None, error)

    def _put(self, text: str, numbers: list[int]) -> None:
        if text or numbers:
            reports = None if self.answer.sampling.logprobs is None else tuple(self.answer.reports[n] for n in numbers)
            self.stream.put(Piece(text, tuple(self.answer.text.ids[n] for n in numbers), reports))

    def _clock(self) -> None:
        now, timing = time.perf_counter(), self.stream.timing
        if timing.first_token is None:
            timing.first_token = now - self._submitted
        else:
            timing.between.append(now - self._last)
        self._last = now
