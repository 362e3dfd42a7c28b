"""Which sequences compute how many tokens in the next step.

Every sequence that decodes gets its one token; what is left of the step's budget goes to prompts in chunks, in equal parts, so
that a short prompt does not wait for a long one. A sequence is admitted when the cache has room for its prompt; when decoding
fills the cache all the same, kept prefixes go first, then the youngest sequence, which is computed again later and loses nothing.
"""

from __future__ import annotations

import bisect

import numpy as np

from fourscore.engine.interface import StepRunner
from fourscore.engine.packing import shared_beginning
from fourscore.engine.prefixes import Prefixes
from fourscore.engine.sequence import Sequence

STEP_TOKENS = 256  # of a step: more makes prompts little faster, and the streams that decode beside them wait longer
RUNNING = 64  # sequences that have a cache
WORTH_WAITING = 32  # tokens that another sequence is about to compute, for which a new one waits instead of computing them too

Turn = list[tuple[Sequence, int]]


class Scheduler:
    """waiting: by arrival, those taken off the running again at their old place. preempted: how often that happened."""

    def __init__(self, runner: StepRunner, step_tokens: int = STEP_TOKENS) -> None:
        self.runner, self.step_tokens = runner, max(step_tokens, RUNNING)
        self.prefixes = Prefixes(runner)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preempted = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence, or one that is to begin again."""
        bisect.insort(self.waiting, sequence, key=lambda s: s.number)

    def plan(self) -> Turn:
        """The next step: sequences, and how many tokens of each. Empty when nothing waits or runs."""
        self._admit()
        turn = self._divide()
        while turn and self._need(turn) > self._free():
            if self.prefixes.drop_oldest():
                continue
            if len(self.running) == 1:  # alone it fits: that was checked when it came
                break
            gone = self._preempt()
            turn = [(s, n) for s, n in turn if s is not gone]
        return turn

    def finish(self, sequence: Sequence) -> None:
        """It is done: its cache is kept as a prefix, or freed where caches are not shared."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence.cache is not None:
            self.running.remove(sequence)
            cache, sequence.cache = sequence.cache, None
            if self.runner.shares and sequence.computed > 0:
                self.prefixes.keep(cache, sequence.ids[: sequence.computed], sequence.adapter)
            else:
                self.runner.free(cache)

    def make_room(self, tokens: int, caches: int = 1) -> bool:
        """Make room for work outside of the plan, in this many caches; False when it is more than the whole cache."""
        pages = self._pages(tokens) + 2 * caches
        if pages > self.runner.limit // self.runner.page:
            return False
        while pages > self._free() and (self.prefixes.drop_oldest() or self.running):
            if pages > self._free() and not len(self.prefixes) and self.running:
                self._preempt()
        return True

    def _admit(self) -> None:
        for sequence in self.waiting[:RUNNING]:
            if len(self.running) >= RUNNING:
                return
            found = self._beginning(sequence)
            if found is None:
                continue
            cache, shared = found
            reserved = sum(self._pages(s.left) + 1 for s in self.running)
            need = self._pages(len(sequence.ids) + 1 - shared) + 1 + reserved
            while need > self._free() and self.prefixes.drop_oldest():
                pass
            if need > self._free() and self.running:
                self.runner.free(cache)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.admitted(cache, shared)

    def _beginning(self, sequence: Sequence) -> tuple[int, int] | None:
        """A cache for a new sequence and how many tokens it holds; None: wait for one that computes the same beginning."""
        if not self.runner.shares:
            return self.runner.new(), 0
        beside = [s for s in self.running if s.adapter == sequence.adapter and s.cache is not None]
        wanted = sequence.ids[:-1]  # the last one is computed in any case, for its logits
        running = [(s.cache, s.ids[: s.computed]) for s in beside if s.cache is not None]
        best = self.prefixes.longest(wanted, sequence.adapter, running)
        coming = max((shared_beginning(np.asarray(wanted), np.asarray(s.ids)) for s in beside if s.left > 1), default=0)
        if coming - (best[1] if best else 0) >= WORTH_WAITING:
            return None
        return (self.runner.fork(*best), best[1]) if best else (self.runner.new(), 0)

    def _divide(self) -> Turn:
        turn = [(s, 1) for s in self.running if s.left == 1]
        budget = self.step_tokens - len(turn)
        prompts = sorted((s for s in self.running if s.left > 1), key=lambda s: (s.left, s.number))
        for at, sequence in enumerate(prompts):
            part = sequence.left if not self.runner.shares else min(sequence.left, -(-budget // (len(prompts) - at)))
            if budget <= 0:
                break
            turn.append((sequence, part))
            budget -= part
        return turn

    def _preempt(self) -> Sequence:
        """Take the cache of the sequence that came last."""
        sequence = max(self.running, key=lambda s: s.number)
        self.running.remove(sequence)
        assert sequence.cache is not None  # what runs has one
        self.runner.free(sequence.cache)
        sequence.cache, sequence.computed = None, 0
        self.preempted += 1
        self.add(sequence)
        return sequence

    def _need(self, turn: Turn) -> int:
        """Pages that this step takes at most: one more where a half-filled page may be shared and is copied."""
        page = self.runner.page
        return sum(self._pages(s.computed + n) - self._pages(s.computed) + (page > 1 and s.computed % page > 0) for s, n in turn)

    def _free(self) -> int:
        return self.runner.limit // self.runner.page - self._pages(self.runner.used)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.runner.page)
