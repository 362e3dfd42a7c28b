"""/v1/responses, the basics: text or messages in, one message out, whole or as events. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fourscore.serve.chat import followed, sampled
from fourscore.serve.prompt import chat_ids
from fourscore.serve.protocol import ResponsesRequest, content_text
from fourscore.serve.service import Answer, Ask

ENDED = {"length": "max_output_tokens", "content_filter": "content_filter"}


def ask_of(request: ResponsesRequest) -> Ask:
    """The question that a request asks: its instructions as the system's message before its input."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for item in request.input:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": content_text(item.content)})
    schema = followed(request.text.format.schema_of() if request.text and request.text.format else None)
    sampling = sampled(request) | {"schema": schema}
    return Ask(request.model, lambda t: chat_ids(t, messages), messages, sampling, request.max_output_tokens, True, request.user)


def _told(request: ResponsesRequest, answer: Answer, name: str, created: int, status: str, output: list[Any]) -> dict[str, Any]:
    usage = answer.stream.usage
    ended = status in ("completed", "incomplete")
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    return {
        "id": name,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": ENDED[answer.finish_reason or "length"]} if status == "incomplete" else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "model": answer.served.id,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.new,
        }
        if ended
        else None,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(name: str, status: str, content: list[Any]) -> dict[str, Any]:
    return {"id": name.replace("resp_", "msg_"), "type": "message", "status": status, "role": "assistant", "content": content}


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish_reason in ENDED else "completed"


async def whole(request: ResponsesRequest, answer: Answer, name: str, created: int) -> dict[str, Any]:
    """A response."""
    text = await answer.whole()
    status = _status(answer)
    return _told(request, answer, name, created, status, [_message(name, status, [_part(text)])])


async def events(request: ResponsesRequest, answer: Answer, name: str, created: int) -> AsyncIterator[Any]:
    """The events of a streamed response, each with its type and number."""
    number = -1

    def event(kind: str, **told: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number, **told}

    begun = _told(request, answer, name, created, "in_progress", [])
    message = _message(name, "in_progress", [])
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    yield event("response.output_item.added", output_index=0, item=message)
    yield event("response.content_part.added", **place, part=_part(""))
    async for part in answer.parts():
        if part.text:
            yield event("response.output_text.delta", **place, delta=part.text, logprobs=[])
    status, done = _status(answer), _part(answer.text)
    item = _message(name, status, [done])
    yield event("response.output_text.done", **place, text=answer.text, logprobs=[])
    yield event("response.content_part.done", **place, part=done)
    yield event("response.output_item.done", output_index=0, item=item)
    yield event(f"response.{status}", response=_told(request, answer, name, created, status, [item]))
