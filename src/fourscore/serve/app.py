"""The routes: each reads a request, asks the service, and answers in OpenAI's shape."""

from __future__ import annotations

import time
import traceback
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fourscore.files import canonical_json
from fourscore.serve import chat, completions, responses
from fourscore.serve.errors import ApiError, invalid_request
from fourscore.serve.keys import Key
from fourscore.serve.page import page
from fourscore.serve.protocol import ChatRequest, CompletionRequest, ResponsesRequest, field_names
from fourscore.serve.service import Ask, Service
from fourscore.serve.source import Served
from fourscore.serve.wire import Door, Events, Whole, error_response

OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
PATHS = OPEN | {"/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"}
_TOLD: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in {
        400: "The request cannot be answered as it is",
        401: "No valid key",
        404: "No such model",
        413: "The body is too large",
        415: "The body is not JSON",
        429: "Too many requests or tokens, or a full queue; see Retry-After",
        503: "The server is about to stop",
        504: "The answer took too long",
    }.items()
}


def create_app(service: Service) -> FastAPI:
    """The application. Guards and keys are the service's."""
    app = FastAPI(title="fourscore", version="1", docs_url=None, redoc_url=None, responses=_TOLD)
    app.add_middleware(Door, service=service, paths=PATHS)
    names = field_names()
    created = int(time.time())
    html, policy = page()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error.errors(), names))

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return error_response(
            ApiError(error.status_code, str(error.detail), code=str(error.detail).lower().replace(" ", "_"), headers=headers)
        )

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        traceback.print_exception(error)
        return error_response(ApiError(500, "The server failed on this request; its log says why.", kind="server_error"))

    def key_of(request: Request) -> Key | None:
        """The key of a request; 401 where the server has keys and this is none of them. Counts the request against its limit."""
        if service.draining:
            raise ApiError(503, "The server is about to stop.", kind="server_error", code="draining", headers={"retry-after": "5"})
        if service.keys is None:
            return None
        word, _, secret = request.headers.get("authorization", "").partition(" ")
        key = service.keys.find(secret.strip()) if word.lower() == "bearer" else None
        if key is None:
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(
                401,
                "No valid key. Send one as `Authorization: Bearer fs-...`.",
                kind="authentication_error",
                code="invalid_api_key",
                headers=headers,
            )
        request.state.log["key"] = key.name
        return key

    async def reply(request: Request, key: Key | None, ask: Ask, body: Any, shape: Any, prefix: str) -> Any:
        """Begin the answer and hand it to the response that sends it."""
        answer = await service.answer(ask, key, request.state.log)
        headers = service.limits.headers(key) if key else {}
        name, now = f"{prefix}{uuid.uuid4().hex}", int(time.time())
        if body.stream:
            return Events(answer, shape.events(body, answer, name, now), headers, named=shape is responses)
        return Whole(answer, lambda: shape.whole(body, answer, name, now), headers)

    def entered(request: Request, body: Any) -> Key | None:
        key = key_of(request)
        if key is not None:
            service.limits.enter(key)
        try:
            canonical_json(body.model_dump(by_alias=True))
        except (UnicodeEncodeError, ValueError, RecursionError):
            raise ApiError(400, "The body holds text that is not Unicode, or nests too deeply.", code="invalid_value") from None
        return key

    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        key = entered(request, body)
        return await reply(request, key, chat.ask_of(body, service.engine.tokenizer), body, chat, "chatcmpl-")

    @app.post("/v1/completions", response_class=JSONResponse)
    async def text_completions(request: Request, body: CompletionRequest) -> Any:
        key = entered(request, body)
        return await reply(request, key, completions.ask_of(body), body, completions, "cmpl-")

    @app.post("/v1/responses", response_class=JSONResponse)
    async def create_response(request: Request, body: ResponsesRequest) -> Any:
        key = entered(request, body)
        return await reply(request, key, responses.ask_of(body), body, responses, "resp_")

    def told(served: Served) -> dict[str, Any]:
        return {
            "id": served.id,
            "object": "model",
            "created": created,
            "owned_by": "fourscore",
            "base_sha256": served.base_sha256,
            "adapter_sha256": served.adapter_sha256,
            "weights": service.source.weights,
            "context_length": service.room,
            "evaluated": service.source.evaluated,
            "verified": served.verified,
            "verdict": served.verdict,
        }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        key_of(request)
        return {"object": "list", "data": [told(served) for served in service.models.values()]}

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        key_of(request)
        return told(service.find(model))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"status": "draining" if service.draining else "ready"}, 503 if service.draining else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        key_of(request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    return app
