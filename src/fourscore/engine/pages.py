"""Pages of the key-value cache: who holds which, and sequences that share their beginnings.

A page holds 16 tokens of all layers. A sequence's full pages never change, so a fork shares them by counting holders.
"""

from __future__ import annotations

import numpy as np

from fourscore.files import FourscoreError

SLAB = 64  # pages asked of the system at a time


class Cache:
    """One sequence's place in the cache: how many tokens are in it, and the addresses of its pages."""

    def __init__(self) -> None:
        self.length = 0
        self.pages: list[int] = []
        self.table = np.zeros(8, dtype=np.int64)  # the pages again, as the kernels read them

    def _append(self, page: int) -> None:
        if len(self.pages) == len(self.table):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        self.table[len(self.pages)] = page
        self.pages.append(page)


class Pages:
    """Hands out pages of `size` bytes and `tokens` tokens, at most `limit` of them (None: as many as memory holds)."""

    def __init__(self, size: int, tokens: int, limit: int | None = None) -> None:
        self.size, self.tokens, self.limit = -(-size // 64) * 64, tokens, limit
        self._slabs: list[np.ndarray] = []
        self._idle: list[int] = []
        self._holders: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return len(self._holders)

    @property
    def free(self) -> int | None:
        """Pages that can still be taken; None: no limit was set."""
        return None if self.limit is None else self.limit - self.used

    def needed(self, cache: Cache, tokens: int) -> int:
        """Pages to take before `tokens` more go into the cache."""
        return max(0, -(-(cache.length + tokens) // self.tokens) - len(cache.pages))

    def grow(self, cache: Cache, tokens: int) -> None:
        """Take the pages that `tokens` more need. Too few left is a FourscoreError, and then none is taken."""
        count = self.needed(cache, tokens)
        if self.limit is not None and self.used + count > self.limit:
            raise FourscoreError(
                f"the cache is full: {count} more pages are needed, {self.limit - self.used} of {self.limit} are left",
                todo="free sequences, or give the cache more memory",
            )
        for _ in range(count):
            cache._append(self._take())

    def shrink(self, cache: Cache) -> None:
        """Give back pages taken beyond the cache's length."""
        keep = -(-cache.length // self.tokens)
        for page in cache.pages[keep:]:
            self._drop(page)
        del cache.pages[keep:]

    def fork(self, cache: Cache, tokens: int) -> Cache:
        """A cache of the first `tokens` tokens: full pages are shared, the last one is copied when it is not full."""
        full = tokens // self.tokens
        copy, last = Cache(), Cache()
        self.grow(last, tokens % self.tokens)
        for shared in cache.pages[:full]:
            self._holders[shared] += 1
            copy._append(shared)
        for page in last.pages:
            self._view(page)[:] = self._view(cache.pages[full])
            copy._append(page)
        copy.length = tokens
        return copy

    def free_all(self, cache: Cache) -> None:
        """Give back a cache's pages; it is empty afterwards."""
        cache.length = 0
        self.shrink(cache)

    def _take(self) -> int:
        if not self._idle:
            # Zeroed: what no token was written to is read (and counts for nothing, unless it is no number).
            slab = np.zeros(SLAB * self.size + 64, dtype=np.uint8)
            self._slabs.append(slab)
            start = -(-slab.ctypes.data // 64) * 64
            self._idle.extend(start + i * self.size for i in reversed(range(SLAB)))
        page = self._idle.pop()
        self._holders[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            del self._holders[page]
            self._idle.append(page)

    def _view(self, page: int) -> np.ndarray:
        slab = next(s for s in self._slabs if s.ctypes.data <= page < s.ctypes.data + s.nbytes)
        at = page - slab.ctypes.data
        return slab[at : at + self.size]
