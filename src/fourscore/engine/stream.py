"""An answer under way, as its reader sees it: pieces of text as they become certain, from any thread or event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from fourscore.engine.sampling import TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """Text that will not change any more, the tokens it completes, and their log-probabilities where they were asked for."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True)
class Usage:
    """Tokens: of the prompt, how many of them were found in the cache, and computed as the answer (the stop token included)."""

    prompt: int
    cached: int
    new: int


@dataclass
class Timing:
    """Seconds: until its first computation, until the first token, and between each token and the one before it."""

    queued: float | None = None
    first_token: float | None = None
    between: list[float] = field(default_factory=list)


class Stream:
    """Iterates over `Piece`s (`for` or `async for`), then has `finish_reason`. An error in the engine is raised by the iteration.

    usage and timing are kept up to date while the answer is under way.
    """

    def __init__(self, prompt_tokens: int, adapter: str | None) -> None:
        self.adapter = adapter
        self.finish_reason: FinishReason | None = None
        self.usage = Usage(prompt_tokens, 0, 0)
        self.timing = Timing()
        self.cancelled = False
        self._pieces: deque[Piece] = deque()
        self._news = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._wakers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End the answer: what it holds of the cache is free at the engine's next step. Pieces that are there can still be read."""
        self.cancelled = True

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ended

    def text(self) -> str:
        """Wait for the end; all text that was not read yet."""
        return "".join(piece.text for piece in self)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._news:
                while not self._pieces and not self._ended:
                    self._news.wait()
            if not self._pieces:
                break
            yield self._pieces.popleft()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(news.set)

        self._wakers.append(wake)
        try:
            while True:
                news.clear()
                while self._pieces:
                    yield self._pieces.popleft()
                if self._ended and not self._pieces:
                    break
                await news.wait()
        finally:
            self._wakers.remove(wake)
        self._raise()

    def put(self, piece: Piece) -> None:
        """The engine has something new."""
        self._tell(piece)

    def end(self, reason: FinishReason | None, error: BaseException | None = None) -> None:
        """The engine is done with it."""
        self.finish_reason, self._error = reason, error
        self._tell(None)

    def _tell(self, piece: Piece | None) -> None:
        with self._news:
            if piece is None:
                self._ended = True
            else:
                self._pieces.append(piece)
            self._news.notify_all()
        for wake in list(self._wakers):
            wake()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
