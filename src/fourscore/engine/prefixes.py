"""Caches of finished requests, kept as long as there is room: who begins with the same tokens does not compute them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from fourscore.engine.interface import StepRunner
from fourscore.engine.packing import shared_beginning

KEPT = 32  # caches; each is compared with every new prompt (microseconds)
KEPT_TOKENS = 8192  # in all of them, counting what they share as often as it is shared


class Prefixes:
    """Finished caches, least recently used first."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._kept: OrderedDict[int, tuple[np.ndarray, str | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: Sequence[int], adapter: str | None, running: Iterable[tuple[int, Sequence[int]]]) -> tuple[int, int] | None:
        """(cache, tokens) of the longest common beginning, at least a page; running: caches in use and the tokens they hold."""
        wanted, length = np.asarray(ids), self._runner.page - 1
        best: int | None = None
        kept = ((cache, held) for cache, (held, of) in self._kept.items() if of == adapter)
        for cache, held in (*kept, *((cache, np.asarray(held)) for cache, held in running)):
            shared = shared_beginning(wanted, held)
            if shared > length:
                best, length = cache, shared
        if best is None or length < 1:
            return None
        if best in self._kept:
            self._kept.move_to_end(best)
        return best, length

    def keep(self, cache: int, ids: Sequence[int], adapter: str | None) -> None:
        """Take over a cache that holds these tokens. Others that it begins with are freed."""
        held = np.asarray(ids)
        inside = [c for c, (h, of) in self._kept.items() if of == adapter and shared_beginning(h, held) in (len(h), len(held))]
        for other in inside:
            if len(self._kept[other][0]) > len(held):  # it stands there already
                self._runner.free(cache)
                self._kept.move_to_end(other)
                return
            self._drop(other)
        self._kept[cache] = (held, adapter)
        while len(self._kept) > KEPT or (len(self._kept) > 1 and sum(len(h) for h, _ in self._kept.values()) > KEPT_TOKENS):
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Free the least recently used; False when there is none."""
        if self._kept:
            self._drop(next(iter(self._kept)))
            return True
        return False

    def forget(self, adapter: str | None) -> None:
        """Free those of an adapter."""
        for cache in [c for c, (_, of) in self._kept.items() if of == adapter]:
            self._drop(cache)

    def clear(self) -> None:
        """Free all."""
        while self.drop_oldest():
            pass

    def _drop(self, cache: int) -> None:
        del self._kept[cache]
        self._runner.free(cache)
