"""An answer that grows: tokens are chosen, become text, and something ends it. The same for every way of computing logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fourscore.engine.grammar import Matcher
from fourscore.engine.sampling import Sampler, Sampling, TokenLogprobs, logprobs
from fourscore.engine.text import Text


@dataclass(frozen=True)
class Generation:
    """What one prompt was answered: the new tokens without the stop token, their text, and why it ended.

    Before a stop string, the tokens are the fewest that write the text: the last of them may write some of the stop string too.
    """

    ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


class Answer:
    """finished: why nothing more is chosen. new: tokens chosen, the stop token included. reports: log-probabilities of `text.ids`."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        stops: Collection[int],
        tokenizer: Any,
        copy: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling, self.text = sampling, Text.of(tokenizer, sampling.stop)
        self.finished: Literal["stop", "length"] | None = None
        self.new = 0
        self.reports: list[TokenLogprobs] = []
        self._sampler, self._matcher = Sampler(sampling, prompt, copy, matcher), matcher
        self._stops = {*stops, *sampling.stop_ids}

    def take(self, logits: Tensor) -> int:
        """Choose the next token by the logits [vocabulary] of the last one."""
        token = self._sampler.pick(logits)
        self.new += 1
        if token in self._stops:
            self.finished = "stop"
            return token
        if self.sampling.logprobs is not None:
            self.reports.append(logprobs(logits, token, self.sampling.logprobs))
        if self.text.add(token) or (self._matcher is not None and self._matcher.complete):
            self.finished = "stop"
        elif self.new == self.sampling.max_new_tokens:
            self.finished = "length"
        return token

    def generation(self) -> Generation:
        """The whole of it."""
        return Generation(self.text.ids[: self.text.kept], self.text.value, self.finished or "length")
