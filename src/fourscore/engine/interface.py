"""What the scheduler asks of a runner: caches that grow, split and go, and logits. Two kinds: transformers' code and the fast one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Rows(NamedTuple):
    """Tokens to compute after what a cache holds. keep: of how many of the last ones the logits are wanted."""

    cache: int
    ids: list[int]
    keep: int
    adapter: str | None


class StepRunner(Protocol):
    """Caches are handles (whole numbers). Not thread-safe: one call at a time.

    page: tokens that are taken from the limit at a time. shares: whether a cache can be forked at any token and computed on in
    chunks; else every sequence is computed at once. limit: most tokens that all caches may hold.
    """

    page: int
    shares: bool
    limit: int

    @property
    def used(self) -> int:
        """Tokens that the caches hold of the limit, whole pages, shared ones counted once."""
        ...

    def new(self) -> int:
        """An empty cache."""
        ...

    def fork(self, cache: int, tokens: int) -> int:
        """A cache that begins as the first `tokens` tokens of another, which stays as it is."""
        ...

    def free(self, cache: int) -> None:
        """Give a cache back; what forks share stays."""
        ...

    def extend(self, rows: Sequence[Rows]) -> list[Tensor]:
        """Compute them all; f32 logits [keep, vocabulary] of each. No cache may stand in it twice."""
        ...
