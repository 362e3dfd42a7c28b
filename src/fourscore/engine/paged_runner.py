"""The fast runner as the scheduler sees it: one paged cache for all sequences, and any adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fourscore.engine.fast import FastRunner
from fourscore.engine.interface import Rows


class PagedRunner:
    """A `StepRunner` over a `FastRunner`. limit: tokens of all caches together."""

    shares = True

    def __init__(self, fast: FastRunner, limit: int) -> None:
        self.fast, self.page = fast, fast.pages.tokens
        self.limit = limit // self.page * self.page
        fast.pages.limit = limit // self.page

    @property
    def used(self) -> int:
        """Tokens of all pages that are held."""
        return self.fast.pages.used * self.page

    def new(self) -> Any:
        """An empty cache."""
        return self.fast.new()

    def fork(self, cache: Any, tokens: int) -> Any:
        """A cache that begins as another: full pages are shared, what is left of one is copied."""
        return self.fast.fork(cache, tokens)

    def free(self, cache: Any) -> None:
        """Give a cache back."""
        self.fast.free(cache)

    def extend(self, rows: Sequence[Rows]) -> list[Tensor]:
        """All in one forward pass; f32 logits [keep, vocabulary] of each."""
        return self.fast.extend(rows)
