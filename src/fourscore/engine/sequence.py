"""One request on its way through the engine: its tokens, how many of them its cache holds, and what its reader was told."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from fourscore.engine.sampling import Sampler, Sampling, TokenLogprobs, logprobs
from fourscore.engine.stream import FinishReason, Piece, Stream, Usage
from fourscore.engine.text import Text


class Sequence:
    """ids: the prompt and the tokens chosen so far; the cache holds the first `computed` of them. number: its place in the line."""

    def __init__(self, number: int, prompt: list[int], sampling: Sampling, adapter: str | None, sampler: Sampler, text: Text) -> None:
        self.number, self.ids, self.sampling, self.adapter = number, prompt, sampling, adapter
        self.prompt_tokens = len(prompt)
        self.cache: int | None = None
        self.computed = 0
        self.stream = Stream(len(prompt), adapter)
        self.finished: FinishReason | None = None
        self._sampler, self._text = sampler, text
        self._reports: list[TokenLogprobs] = []
        self._submitted = time.perf_counter()
        self._last = self._submitted

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

    def choose(self, logits: Tensor, stops: set[int]) -> None:
        """Take the next token, by the logits [vocabulary] of the last one; tell the reader."""
        token = self._sampler.pick(logits)
        self._clock()
        self.ids.append(token)
        new = len(self.ids) - self.prompt_tokens
        self.stream.usage = replace(self.stream.usage, new=new)
        if token in stops or token in self.sampling.stop_ids:
            self.finished = "stop"
            return
        if self.sampling.logprobs is not None:
            self._reports.append(logprobs(logits, token, self.sampling.logprobs))
        done = self._text.add(token) or (self._sampler.matcher is not None and self._sampler.matcher.complete)
        if done or new == self.sampling.max_new_tokens:
            self.finished = "stop" if done else "length"
        else:
            self._put(*self._text.certain())

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more is computed: the rest of the text goes out, or the error that stopped it."""
        if error is None:
            self._put(*self._text.rest())
        self.stream.end(self.finished if error is None else None, error)

    def answer(self) -> tuple[list[int], str]:
        """The tokens and the text of the answer, without what stopped it."""
        return self._text.ids[: self._text.kept], self._text.value

    def _put(self, text: str, numbers: list[int]) -> None:
        if text or numbers:
            reports = None if self.sampling.logprobs is None else tuple(self._reports[n] for n in numbers)
            self.stream.put(Piece(text, tuple(self._text.ids[n] for n in numbers), reports))

    def _clock(self) -> None:
        now = time.perf_counter()
        if self.stream.timing.first_token is None:
            self.stream.timing.first_token = now - self._submitted
        else:
            self.stream.timing.between.append(now - self._last)
        self._last = now
