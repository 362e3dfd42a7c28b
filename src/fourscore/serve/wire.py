"""Around the handlers, on ASGI itself: who is speaking to whom, how much, and a line in the log. And answers as events."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourscore.serve.errors import ApiError
from fourscore.serve.service import Answer, Service

BODY_SECONDS = 30.0  # in which a request's body must have come


class Door:
    """Refuses wrong hosts (DNS rebinding), foreign pages, other bodies than JSON and too large ones, before anything is read."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        log: dict[str, Any] = {"id": f"req_{uuid.uuid4().hex}", "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {})["log"] = log

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                fixed = [(b"x-request-id", log["id"].encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *fixed]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive) if scope["method"] == "POST" else None
            except ApiError as error:
                await error_response(error)(scope, receive, sent)
                return
            await self.app(scope, _again(body, receive) if body is not None else receive, sent)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.service.metrics.requests.labels(path, str(status)).inc()
            told = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **log, "status": status}
            told["ms"] = round(1000 * (time.perf_counter() - began), 1)
            print(json.dumps(told), flush=True)

    def _check(self, scope: Scope) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get("host", "")
        if not self._known(host):
            raise ApiError(421, "This server does not go by that name; start it with --allow-host.", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "Pages of other origins may not use this server.", code="foreign_origin")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "The body must be of content type application/json.", code="wrong_content_type")
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.service.settings.body_bytes:
                raise self._too_large()

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.service.settings.hosts:
            return True
        try:  # rebinding needs a name: a page from an address speaks to that address
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The client went away.")
                    body += message.get("body", b"")
                    if len(body) > self.service.settings.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return body
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.service.settings.body_bytes:,} bytes.", code="body_too_large")


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read already, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def error_response(error: ApiError) -> JSONResponse:
    """An error as its answer."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Whole(Response):
    """An answer as one JSON value. A client that goes away before it is there ends it."""

    def __init__(self, answer: Answer, make: Callable[[], Any], headers: dict[str, str]) -> None:
        super().__init__()
        self.answer, self.make, self.told = answer, make, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, left = asyncio.ensure_future(self.make()), asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            try:
                response = JSONResponse(work.result(), headers=self.told)
            except ApiError as error:
                response = error_response(error)
        finally:
            work.cancel()
            left.cancel()
            self.answer.close()
        await response(scope, receive, send)


class Events(Response):
    """An answer as server-sent events. Ends, and ends the answer, when the client goes away or takes too long to read."""

    def __init__(self, answer: Answer, events: AsyncIterator[Any], headers: dict[str, str], *, named: bool) -> None:
        super().__init__()
        self.answer, self.events, self.told, self.named = answer, events, headers, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, left = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(gone(receive))
        try:
            limit = self.answer.service.settings.timeout + 10
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED, timeout=limit)
            if work.done():
                work.result()
        except OSError:
            pass  # the client went away between two looks
        finally:
            work.cancel()
            left.cancel()
            self.answer.close()

    async def _send(self, send: Send) -> None:
        told = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self.told}
        headers = [(k.encode(), v.encode()) for k, v in told.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for value in self.events:
                name = f"event: {value['type']}\n" if self.named else ""
                await _line(send, f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n")
            if not self.named:
                await _line(send, "data: [DONE]\n\n")
        except ApiError as error:
            value = {"type": "error", **error.body()["error"]} if self.named else error.body()
            await _line(send, ("event: error\n" if self.named else "") + f"data: {json.dumps(value)}\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _line(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
