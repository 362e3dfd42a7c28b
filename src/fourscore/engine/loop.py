"""Continuous batching: requests join and leave between steps. A thread of its own works while streams are under way.

Two locks. `work` is held through a step: runner and scheduler. `_news` is held for moments: what came in, who is under way.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from fourscore.engine.interface import Rows, StepRunner
from fourscore.engine.scheduler import Scheduler
from fourscore.engine.sequence import Sequence
from fourscore.files import FourscoreError

LINGER = 1.0  # seconds that the thread waits for more work before it ends


@dataclass(frozen=True)
class Stats:
    """The engine at this moment, and counts since it was made. tokens_in: prompts as they were given; per adapter (None: the base).

    preempted: how often a sequence lost its cache to others and was computed again.
    """

    running: int
    waiting: int
    cache_used: int
    cache_limit: int
    preempted: int
    tokens_in: dict[str | None, int]
    tokens_cached: dict[str | None, int]
    tokens_out: dict[str | None, int]


class Loop:
    """Runs sequences to their ends. context: entered around computing; work: held by whoever computes, here or elsewhere."""

    def __init__(self, runner: StepRunner, work: threading.RLock, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.runner, self.scheduler = runner, Scheduler(runner)
        self.work = work
        self.context = context
        self._news = threading.Condition()
        self._arrived: list[Sequence] = []
        self._released: deque[int] = deque()
        self._active: set[Sequence] = set()
        self._refused: set[str | None] = set()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._count = 0
        self._in: Counter[str | None] = Counter()
        self._cached: Counter[str | None] = Counter()
        self._out: Counter[str | None] = Counter()

    def submit(self, make: Callable[[int], Sequence], *, threaded: bool) -> Sequence:
        """Take a sequence, made with its place in the line. threaded: see to it that the engine's own thread works on it."""
        with self._news:
            if self._closed:
                raise FourscoreError("the engine is closed", todo="make another one")
            self._count += 1
            sequence = make(self._count)
            if sequence.adapter in self._refused:
                raise FourscoreError(f"adapter `{sequence.adapter}` is being removed", todo="ask another one")
            self._arrived.append(sequence)
            self._active.add(sequence)
            self._in[sequence.adapter] += sequence.prompt_tokens
            if threaded and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fourscore-engine", daemon=True)
                self._thread.start()
            self._news.notify_all()
        return sequence

    def finish(self, sequences: Iterable[Sequence], advance: Callable[[int], object] | None = None) -> None:
        """Work in the calling thread until these have ended; `advance` hears how many just did. The first error is raised.

        An interrupted call leaves none of them behind.
        """
        mine = list(sequences)
        try:
            while mine:
                self.step()
                ended = [s for s in mine if s.stream.ended]
                for sequence in ended:
                    sequence.stream.text()  # raises what ended it
                mine = [s for s in mine if not s.stream.ended]
                if advance is not None and ended:
                    advance(len(ended))
        finally:
            for sequence in mine:
                sequence.stream.cancel()
            if mine:
                with self.work:
                    self._collect()

    def alone(self, row: Rows) -> Tensor:
        """Compute tokens outside of the plan, after a cache that the caller holds."""
        with self.work, self.context():
            self._collect()
            if not self.scheduler.make_room(len(row.ids)):
                raise FourscoreError(
                    f"{len(row.ids)} tokens, and the cache takes {self.runner.limit}", todo="give the engine more cache_tokens"
                )
            return self.runner.extend([row])[0]

    def release(self, cache: int) -> None:
        """Free a cache before the next step; from any thread, and from where nothing may wait (a finaliser)."""
        self._released.append(cache)

    def step(self) -> None:
        """One forward pass for everybody who is due."""
        with self.work, self.context():
            self._collect()
            turn = self.scheduler.plan()
            if not turn:
                return
            rows = [Rows(s.cache or 0, s.ids[s.computed : s.computed + n], int(n == s.left), s.adapter) for s, n in turn]
            try:
                found = self.runner.extend(rows)
            except BaseException as error:
                for sequence, _ in turn:
                    sequence.computed = 0  # what its cache holds is not known
                    self._end(sequence, error)
                if isinstance(error, Exception):
                    return
                raise
            for (sequence, n), logits in zip(turn, found, strict=True):
                sequence.computed += n
                if len(logits):
                    self._choose(sequence, logits[-1])

    def stats(self) -> Stats:
        """Never waits for a step; the numbers may be of two neighbouring moments."""
        running = len(self.scheduler.running)
        with self._news:
            waiting, counts = len(self._active) - running, [dict(c) for c in (self._in, self._cached, self._out)]
        return Stats(running, max(0, waiting), self.runner.used, self.runner.limit, self.scheduler.preempted, *counts)

    def drain(self, adapter: str | None, then: Callable[[], None]) -> None:
        """Refuse new sequences of an adapter, wait until those under way have ended, call `then` between two steps."""
        with self._news:
            self._refused.add(adapter)
        try:
            self._wait(lambda s: s.adapter == adapter)
            with self.work:
                self.scheduler.prefixes.forget(adapter)
                then()
        finally:
            with self._news:
                self._refused.discard(adapter)

    def close(self, *, drain: bool) -> None:
        """Take nothing more; wait for what is under way, or cancel it; give all caches back."""
        with self._news:
            self._closed = True
            if not drain:
                for sequence in self._active:
                    sequence.stream.cancel()
            thread = self._thread
            self._news.notify_all()
        self._wait(lambda s: True)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self.work:
            self._collect()
            self.scheduler.prefixes.clear()

    def _wait(self, concerned: Callable[[Sequence], bool]) -> None:
        while True:
            with self._news:
                if not any(concerned(s) for s in self._active):
                    return
            self.step()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._active:
                    if self._closed or (not self._news.wait(LINGER) and not self._active):
                        self._thread = None
                        return
            self.step()

    def _collect(self) -> None:
        """Let in what arrived, and out what was cancelled or released."""
        while self._released:
            self.runner.free(self._released.popleft())
        with self._news:
            arrived, self._arrived = self._arrived, []
            cancelled = [s for s in self._active if s.stream.cancelled]
        for sequence in arrived:
            self.scheduler.add(sequence)
        for sequence in cancelled:
            sequence.finished = "cancelled"
            self._end(sequence)

    def _choose(self, sequence: Sequence, logits: Tensor) -> None:
        self._out[sequence.adapter] += 1
        try:
            sequence.choose(logits)
        except Exception as error:  # of one request, its grammar say: the others go on
            self._end(sequence, error)
        else:
            if sequence.finished:
                self._end(sequence)

    def _end(self, sequence: Sequence, error: BaseException | None = None) -> None:
        """Give back what it holds, and only then tell its reader."""
        self.scheduler.finish(sequence)
        with self._news:
            self._active.discard(sequence)
            self._cached[sequence.adapter] += sequence.stream.usage.cached
            self._news.notify_all()
        sequence.end(error)
