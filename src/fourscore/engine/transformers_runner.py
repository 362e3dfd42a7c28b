"""Caches and steps over transformers' modelling code: any network, one sequence a forward pass, one adapter after another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fourscore.engine.interface import Rows
from fourscore.engine.runner import Runner


class Selects(Protocol):
    """The engine's adapters."""

    def selected(self, name: str | None) -> AbstractContextManager[None]: ...


class TransformersRunner:
    """A `StepRunner` over a `Runner`. caches: whether the network decodes with a cache; without, all is computed again each time."""

    page = 1

    def __init__(self, runner: Runner, adapters: Selects, limit: int, *, caches: bool, chunks: bool) -> None:
        self.runner, self.adapters, self.limit, self.caches = runner, adapters, limit, caches
        self.shares = chunks and (not caches or all(type(layer) is DynamicLayer for layer in runner.new_cache().layers))
        self._numbers = itertools.count()
        self._held: dict[int, tuple[list[int], Any]] = {}

    @property
    def used(self) -> int:
        """Tokens in all caches. Forks count in full though their beginnings are shared until they grow."""
        return sum(len(ids) for ids, _ in list(self._held.values()))  # a list: other threads ask

    def new(self) -> int:
        """An empty cache."""
        number = next(self._numbers)
        self._held[number] = ([], self.runner.new_cache() if self.caches else None)
        return number

    def fork(self, cache: int, tokens: int) -> int:
        """A cache that begins as another. Nothing is copied: transformers' layers make new tensors when they grow."""
        ids, held = self._held[cache]
        number = self.new()
        _, made = self._held[number]
        if made is not None and tokens > 0:
            made.layers = [_beginning(layer, tokens) for layer in held.layers]
        self._held[number] = (ids[:tokens], made)
        return number

    def free(self, cache: int) -> None:
        """Give a cache back."""
        del self._held[cache]

    def extend(self, rows: Sequence[Rows]) -> list[Tensor]:
        """The logits asked for, f32 [keep, vocabulary] each; adapters are selected once each."""
        found: dict[int, Tensor] = {}
        for adapter in sorted({row.adapter for row in rows}, key=lambda name: name or ""):
            with self.adapters.selected(adapter):
                for at, row in enumerate(rows):
                    if row.adapter == adapter:
                        found[at] = self._extend(row)
        return [found[at] for at in range(len(rows))]

    def _extend(self, row: Rows) -> Tensor:
        ids, held = self._held[row.cache]
        before = len(ids)
        ids.extend(row.ids)
        if held is None:
            return self.runner.plain(ids, row.keep).float()
        switch = self.runner.rope_switch
        if switch is not None and before <= switch < len(ids):  # from here on rotary frequencies are others
            held, before = self.runner.new_cache(), 0
            self._held[row.cache] = (ids, held)
        return self.runner.after(ids[before:], held, len(ids), row.keep)


def _beginning(layer: Any, tokens: int) -> Any:
    made = copy.copy(layer)
    if layer.is_initialized:
        made.keys, made.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    return made
