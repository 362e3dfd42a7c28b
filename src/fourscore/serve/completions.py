"""/v1/completions: text that goes on, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fourscore.serve.chat import fingerprint, sampled, token_text, usage_of
from fourscore.serve.errors import ApiError, unsupported
from fourscore.serve.protocol import CompletionRequest
from fourscore.serve.service import Answer, Ask

if TYPE_CHECKING:
    from fourscore.engine.sampling import TokenLogprobs

DEFAULT_TOKENS = 16  # OpenAI's


def ask_of(request: CompletionRequest) -> Ask:
    """The question that a completion request asks. Several prompts at once are a clear error."""
    prompt: str | list[int] | list[Any] = request.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise unsupported("prompt", f"One prompt a request is supported, and {len(prompt)} were given: send them one by one.")
        prompt = prompt[0]
    if not prompt:
        raise ApiError(400, "`prompt` is empty.", param="prompt", code="invalid_value")
    sampling = sampled(request) | {"logprobs": request.logprobs}
    messages = [{"role": "user", "content": prompt if isinstance(prompt, str) else f"{len(prompt)} token ids"}]
    return Ask(request.model, lambda t: _ids(t, prompt), messages, sampling, request.max_tokens or DEFAULT_TOKENS, False, request.user)


def _ids(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        if not ids:
            raise ApiError(400, "`prompt` has no token.", param="prompt", code="invalid_value")
        return ids
    words = len(tokenizer)
    if odd := [i for i in prompt if not 0 <= i < words]:
        raise ApiError(400, f"`prompt`: {odd[0]} is no token of this model, which has {words}.", param="prompt", code="invalid_value")
    return prompt


def _logprobs(tokenizer: Any, found: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    texts = [token_text(tokenizer, t.id)[0] for t in found]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in found],
        "top_logprobs": [{token_text(tokenizer, i)[0]: value for i, value in t.top} for t in found],
        "text_offset": offsets,
    }


def _told(request: CompletionRequest, answer: Answer, name: str, created: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "text_completion",
        "created": created,
        "model": answer.served.id,
        "system_fingerprint": fingerprint(answer),
        "choices": choices,
    }


async def whole(request: CompletionRequest, answer: Answer, name: str, created: int) -> dict[str, Any]:
    """A text_completion."""
    text = await answer.whole()
    tokenizer = answer.service.engine.tokenizer
    logprobs = _logprobs(tokenizer, answer.logprobs, 0) if request.logprobs is not None else None
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
    return {**_told(request, answer, name, created, [choice]), "usage": usage_of(answer)}


async def events(request: CompletionRequest, answer: Answer, name: str, created: int) -> AsyncIterator[Any]:
    """The chunks of a streamed text_completion."""
    tokenizer = answer.service.engine.tokenizer
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    usage = {"usage": None} if with_usage else {}
    offset = 0
    async for part in answer.parts():
        logprobs = _logprobs(tokenizer, part.logprobs, offset) if request.logprobs is not None else None
        offset += len(part.text)
        choice = {"index": 0, "text": part.text, "logprobs": logprobs, "finish_reason": None}
        yield {**_told(request, answer, name, created, [choice]), **usage}
    last = {"index": 0, "text": "", "logprobs": None, "finish_reason": answer.finish_reason}
    yield {**_told(request, answer, name, created, [last]), **usage}
    if with_usage:
        yield {**_told(request, answer, name, created, []), "usage": usage_of(answer)}
