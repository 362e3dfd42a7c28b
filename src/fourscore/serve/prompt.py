"""From a request's messages to token ids, by the same function that rendered what was trained and evaluated; tools beside it.

A call of a tool is recognised where the template writes calls in a form known here. Known is the one of Hermes and Qwen:
<tool_call> {"name": ..., "arguments": {...}} </tool_call>.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from fourscore.data.template import render_prompt, text_message
from fourscore.files import FourscoreError
from fourscore.serve.errors import ApiError, unsupported
from fourscore.serve.protocol import Message, Tool

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{OPENING}\s*(\{{.*?\}})\s*{CLOSING}", re.DOTALL)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a template takes them: `developer` is `system`, arguments of calls are objects."""
    told = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": message.text()}
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        told.append(plain)
    return told


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = ()) -> list[int]:
    """Token ids of a chat up to where the assistant speaks. ApiError where the model has no template, or it refuses."""
    try:
        with_tools = tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if not with_tools:
            return render_prompt(tokenizer, [text_message(m["role"], m["content"]) for m in messages])
        check_tools(tokenizer)
        given = [tool.model_dump(exclude_none=True) for tool in tools] or None
        # The tokenizer encodes control tokens that stand in a message as plain text, as render_prompt does.
        return list(
            tokenizer.apply_chat_template(
                list(messages),
                tools=given,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                enable_thinking=False,
            )
        )
    except FourscoreError as error:
        raise ApiError(400, str(error), param="messages") from None
    except (ValueError, TypeError, LookupError) as error:
        raise ApiError(400, f"The model's template refuses the messages ({_line(error)}).", param="messages") from None
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise ApiError(400, f"The model's template refuses the messages ({_line(error)}).", param="messages") from None
        raise


def check_tools(tokenizer: Any) -> None:
    """ApiError 400 unless this tokenizer's template shows tools, and calls in the known form."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not re.search(r"\btools\b", template):
        raise unsupported("tools", "This model's chat template does not know tools.")
    if OPENING not in template or "<function=" in template:
        raise unsupported("tools", "This model's template writes tool calls in a form that this server cannot read.")


def find_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(text before the calls, the calls in OpenAI's form). What is not a whole call stays text."""
    calls = []
    for found in _CALL.finditer(text):
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return text, []
        if not isinstance(name, str):
            return text, []
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": written}})
    return (text[: text.index(OPENING)].rstrip(), calls) if calls else (text, [])


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "`tool_calls`: the arguments of a call are not JSON", param="messages") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
