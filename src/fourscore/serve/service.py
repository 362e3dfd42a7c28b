"""Between the protocol and the engine: who may ask, whether there is room, and one answer under way. Knows nothing of HTTP's shapes."""

from __future__ import annotations

import asyncio
import re
import secrets
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fourscore.files import FourscoreError
from fourscore.guards import Guard, Verdict, first_refusal
from fourscore.serve.errors import ApiError
from fourscore.serve.keys import Key, KeyRing
from fourscore.serve.limits import Limits, Reservation
from fourscore.serve.metrics import Metrics
from fourscore.serve.settings import Settings
from fourscore.serve.source import Served, Source

if TYPE_CHECKING:
    from fourscore.engine import Engine
    from fourscore.engine.sampling import TokenLogprobs
    from fourscore.engine.stream import Stream

SENTENCE = re.compile(r"[.!?\n]\s|\n")
HELD = 200  # characters at most that a guard lets wait for the end of a sentence


@dataclass(frozen=True)
class Ask:
    """One question. prompt: makes the token ids (called in a thread). messages: what guards look at. sampling: without its length."""

    model: str
    prompt: Callable[[Any], list[int]]
    messages: Sequence[dict[str, Any]]
    sampling: Mapping[str, Any]
    max_new_tokens: int | None
    chat: bool
    user: str | None = None


class Part(NamedTuple):
    """A part of an answer that may be sent."""

    text: str
    logprobs: tuple[TokenLogprobs, ...]


class Service:
    """The engine with what stands around it."""

    def __init__(
        self, engine: Engine, source: Source, settings: Settings, keys: KeyRing | None = None, guards: Sequence[Guard] = ()
    ) -> None:
        self.engine, self.source, self.settings, self.keys, self.guards = engine, source, settings, keys, tuple(guards)
        self.models = {served.id: served for served in source.models}
        self.limits, self.metrics = Limits(), Metrics(engine)
        self.draining = False
        self._streams: set[Stream] = set()
        self._coming = 0
        self._turn_end = _end_of_turn(engine.tokenizer)

    def find(self, name: str) -> Served:
        """The served model of that name; ApiError 404."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"The model `{name[:100]}` does not exist here. Known: {known}.", param="model", code="model_not_found")
        return self.models[name]

    def warm_up(self) -> None:
        """One token, so that the first reader does not wait for what the engine finds out on its first use."""
        from fourscore.engine import Sampling

        for _ in self.engine.submit([min(self.engine.stop_ids, default=0)], Sampling(max_new_tokens=1)):
            pass

    async def answer(self, ask: Ask, key: Key | None, log: dict[str, Any]) -> Answer:
        """Begin an answer. ApiErrors: 429 where there is no room or the key's limit is reached, 400 where the question cannot be asked."""
        from fourscore.engine import Sampling

        served = self.find(ask.model)
        log |= {"model": served.id} | ({"user": ask.user} if ask.user else {})
        if self.settings.log_text:
            log["messages"] = list(ask.messages)
        self._refuse_when_full()
        self._coming += 1
        reservation = None
        try:
            await self._look_at_question(ask)
            ids = await asyncio.to_thread(ask.prompt, self.engine.tokenizer)
            length = self._length(len(ids), ask.max_new_tokens)
            reservation = self.limits.reserve(key, len(ids) + length) if key else None
            stops = (self._turn_end,) if ask.chat and self._turn_end is not None else ()
            given = {k: v for k, v in ask.sampling.items() if v is not None}
            if "seed" not in given:
                given["seed"] = secrets.randbits(63)
            try:
                sampling = Sampling(**{"max_new_tokens": length, "temperature": 1.0, "stop_ids": stops, **given})
                stream = await asyncio.to_thread(self.engine.submit, ids, sampling, served.adapter)
            except FourscoreError as error:
                raise ApiError(400, str(error), param="response_format" if error.where == "schema" else None) from None
        except BaseException:
            if reservation is not None:
                reservation.settle(0)
            raise
        finally:
            self._coming -= 1
        self._streams.add(stream)
        return Answer(self, served, stream, reservation, log)

    def done(self, answer: Answer) -> None:
        """An answer has ended, in whatever way: count it, give its key the unused tokens back."""
        stream, metrics, name = answer.stream, self.metrics, answer.served.id
        self._streams.discard(stream)
        usage, timing = stream.usage, stream.timing
        if answer.reservation is not None:
            answer.reservation.settle(usage.prompt + usage.new)
        for kind, count in (("prompt", usage.prompt), ("cached", usage.cached), ("completion", usage.new)):
            metrics.tokens.labels(name, kind).inc(count)
        metrics.finished.labels(name, answer.finish_reason or "error").inc()
        if timing.queued is not None:
            metrics.queued.labels(name).observe(timing.queued)
        if timing.first_token is not None:
            metrics.first_token.labels(name).observe(timing.first_token)
        for seconds in timing.between:
            metrics.between.labels(name).observe(seconds)
        answer.log |= {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.new,
            "first_token_ms": None if timing.first_token is None else round(1000 * timing.first_token, 1),
            "finish": answer.finish_reason,
        }
        if self.settings.log_text:
            answer.log["answer"] = answer.text

    def _refuse_when_full(self) -> None:
        self._streams = {stream for stream in self._streams if not stream.ended}  # a reader may be slower than the engine
        if len(self._streams) + self._coming >= self.settings.queue:
            message = f"The server is busy: {self.settings.queue} answers are under way or waiting. Try again in a moment."
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"retry-after": "2"})

    async def _look_at_question(self, ask: Ask) -> None:
        if self.guards:
            refused = await asyncio.to_thread(lambda: first_refusal([(g.name, g.check_in(ask.messages)) for g in self.guards]))
            if refused:
                name, verdict = refused
                raise ApiError(400, verdict.reason or f"Refused by {name}.", param="messages", code="content_filter")

    async def look_at_answer(self, text: str) -> Verdict | None:
        """The verdict of the first guard that refuses this much of an answer."""
        refused = await asyncio.to_thread(lambda: first_refusal([(g.name, g.check_out(text)) for g in self.guards]))
        return refused[1] if refused else None

    def _length(self, prompt: int, asked: int | None) -> int:
        """How long the answer may become; ApiError where the context has no room."""
        room = self.room
        wanted = self.settings.answer_tokens if asked is None else asked
        if room is None:
            return wanted
        if prompt + (asked or 1) > room:
            message = (
                f"This model's maximum context length is {room} tokens. However, you requested {prompt + (asked or 1)} tokens "
                f"({prompt} in the prompt, {asked or 1} in the completion). Shorten the prompt or the completion."
            )
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        return min(wanted, room - prompt)

    @property
    def room(self) -> int | None:
        """Most tokens of a prompt and its answer together."""
        return self.engine.max_length


@dataclass
class Answer:
    """One answer under way: iterate over `parts` to its end, and call `close` whatever happens."""

    service: Service
    served: Served
    stream: Stream
    reservation: Reservation | None
    log: dict[str, Any]
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._deadline = asyncio.get_running_loop().time() + self.service.settings.timeout

    async def parts(self) -> AsyncIterator[Part]:
        """Text as it may be sent. With guards only what they have looked at: whole sentences. ApiError on a timeout or a failure."""
        held = ""
        found: list[TokenLogprobs] = []
        async for piece in self._pieces():
            held += piece.text
            found += piece.logprobs or ()
            if not self.service.guards or SENTENCE.search(held) or len(held) > HELD:
                if await self._refused(held):
                    return
                yield self._release(held, found)
                held, found = "", []
        if held or found:
            if await self._refused(held):
                return
            yield self._release(held, found)
        self.finish_reason = self.stream.finish_reason

    async def whole(self) -> str:
        """Wait for all of it."""
        async for _ in self.parts():
            pass
        return self.text

    def close(self) -> None:
        """End it, if it has not ended: whoever asked went away. Counts it, once."""
        if not self._closed:
            self._closed = True
            if not self.stream.ended:
                self.stream.cancel()
                self.finish_reason = self.finish_reason or "cancelled"
            self.service.done(self)

    def _release(self, text: str, logprobs: Sequence[TokenLogprobs]) -> Part:
        self.text += text
        self.logprobs += logprobs
        return Part(text, tuple(logprobs))

    async def _refused(self, more: str) -> bool:
        if not self.service.guards or await self.service.look_at_answer(self.text + more) is None:
            return False
        self.stream.cancel()
        self.finish_reason = "content_filter"
        return True

    async def _pieces(self) -> AsyncIterator[Any]:
        pieces = aiter(self.stream)
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except TimeoutError:
                self.finish_reason = "timeout"
                message = f"The answer took longer than {self.service.settings.timeout:g} seconds and was stopped."
                raise ApiError(504, message, kind="timeout", code="timeout") from None
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the engine failed: the client learns that it did, the log learns why
                traceback.print_exception(error, file=sys.stderr)
                raise ApiError(500, "The engine failed on this request; the server's log says why.", kind="server_error") from None
            yield piece


def _end_of_turn(tokenizer: Any) -> int | None:
    """Where a chat's answer ends; None for a model without a chat template."""
    from fourscore.data.template import end_of_turn

    try:
        return end_of_turn(tokenizer)
    except FourscoreError:
        return None
