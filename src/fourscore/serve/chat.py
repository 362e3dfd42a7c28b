"""/v1/chat/completions: a request as a question to the service, and an answer in OpenAI's shape, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fourscore.serve.errors import ApiError
from fourscore.serve.prompt import OPENING, chat_ids, check_tools, find_calls, plain_messages
from fourscore.serve.protocol import ChatRequest, Strict
from fourscore.serve.service import Answer, Ask

if TYPE_CHECKING:
    from fourscore.engine.sampling import TokenLogprobs


def ask_of(request: ChatRequest, tokenizer: Any) -> Ask:
    """The question that a chat request asks."""
    messages = plain_messages(request.messages)
    tools = () if request.tool_choice == "none" else tuple(request.tools or ())
    schema = followed(request.response_format.schema_of() if request.response_format else None)
    if tools:
        check_tools(tokenizer)
        if schema is not None:
            raise ApiError(400, "`response_format` and `tools` cannot be given together.", param="response_format")
    sampling = sampled(request) | {"schema": schema, "logprobs": (request.top_logprobs or 0) if request.logprobs else None}
    length = request.max_completion_tokens or request.max_tokens
    return Ask(request.model, lambda tokenizer: chat_ids(tokenizer, messages, tools), messages, sampling, length, True, request.user)


def followed(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema with compact output asked of the grammar: a small model that may write spaces between tokens writes them for ever."""
    return None if schema is None else {**schema, "x-guidance": {"whitespace_flexible": False}}


def sampled(request: Any) -> dict[str, Any]:
    """The fields that every kind of request shares, as the engine names them."""
    stop = getattr(request, "stop", None)
    stops = ((stop,) if isinstance(stop, str) else tuple(stop)) if stop else None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return {name: getattr(request, name, None) for name in names} | {"stop": stops}


def usage_of(answer: Answer) -> dict[str, Any]:
    """Tokens, as chat and plain completions tell them."""
    usage = answer.stream.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def fingerprint(answer: Answer) -> str:
    """Names the bytes that answer: the base's hash and the adapter's."""
    return f"fs_{answer.served.base_sha256[:12]}_{(answer.served.adapter_sha256 or 'base')[:12]}"


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token's text and its UTF-8 bytes; None where it is a part of a character."""
    text = tokenizer.decode([token])
    return text, None if "\ufffd" in text else list(text.encode())


def _logprobs(tokenizer: Any, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def told(token: int, logprob: float) -> dict[str, Any]:
        text, encoded = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": encoded}

    content = [{**told(t.id, t.logprob), "top_logprobs": [told(i, value) for i, value in t.top]} for t in found]
    return {"content": content, "refusal": None}


async def whole(request: ChatRequest, answer: Answer, name: str, created: int) -> dict[str, Any]:
    """A chat.completion."""
    text = await answer.whole()
    content, calls = find_calls(text) if _may_call(request) else (text, [])
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(answer.service.engine.tokenizer, answer.logprobs) if request.logprobs else None,
        "finish_reason": "tool_calls" if calls else answer.finish_reason,
    }
    return {
        "id": name,
        "object": "chat.completion",
        "created": created,
        "model": answer.served.id,
        "choices": [choice],
        "usage": usage_of(answer),
        "system_fingerprint": fingerprint(answer),
    }


async def events(request: ChatRequest, answer: Answer, name: str, created: int) -> AsyncIterator[Any]:
    """The chunks of a streamed chat.completion. Text that may begin a call of a tool is held back until it is one or not."""
    with_usage = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(delta: dict[str, Any], found: Sequence[TokenLogprobs] = (), finish: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(answer.service.engine.tokenizer, found) if request.logprobs and found else None
        return {
            "id": name,
            "object": "chat.completion.chunk",
            "created": created,
            "model": answer.served.id,
            "system_fingerprint": fingerprint(answer),
            "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
        } | ({"usage": None} if with_usage else {})

    yield chunk({"role": "assistant", "content": "", "refusal": None})
    held = ""
    calls: list[dict[str, Any]] = []
    async for part in answer.parts():
        text = part.text
        if _may_call(request):
            text, held = _hold_back(held + text)
        if text or part.logprobs:
            yield chunk({"content": text}, part.logprobs)
    if held:
        rest, calls = find_calls(held)
        if rest:
            yield chunk({"content": rest})
        if calls:
            yield chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
    yield chunk({}, finish="tool_calls" if calls else answer.finish_reason)
    if with_usage:
        yield {**chunk({}), "choices": [], "usage": usage_of(answer)}


def _may_call(request: Strict) -> bool:
    return bool(getattr(request, "tools", None)) and getattr(request, "tool_choice", None) != "none"


def _hold_back(text: str) -> tuple[str, str]:
    """(what is surely not a call, what may be or become one)."""
    at = text.find(OPENING)
    if at < 0:
        at = next((len(text) - n for n in range(min(len(OPENING) - 1, len(text)), 0, -1) if text.endswith(OPENING[:n])), len(text))
    return text[:at], text[at:]
