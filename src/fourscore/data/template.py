"""Messages to tokens, once, for training, evaluating and serving: the model's own chat template and the loss mask.

A row becomes the ids `prompt + answer + end of turn`. The loss covers what follows the prompt, nothing else, and an
evaluated answer is scored over exactly those ids. This module knows nothing of files or splits.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fourscore.files import FourscoreError

Message = dict[str, Any]
_PROBE_USER, _PROBE_ANSWER = "fourscore asks", "fourscore answers"


@dataclass(frozen=True)
class Rendered:
    """A row in tokens: `ids[:prompt_length]` is what the model is given, `ids[prompt_length:]` what it is trained to say,
    the end-of-turn token included. What a template writes after that token is not in `ids`."""

    ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class _Chat:
    """What one tokenizer's template needs to know about itself."""

    parts: bool  # the template reads content as a list of typed parts, not as a string
    control: re.Pattern[str]  # any token that the template, and nobody else, may write
    control_ids: frozenset[int]


def text_message(role: str, text: str) -> Message:
    """A message whose content is one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """The text of a message: its string, or its text parts joined. A part of another type is a FourscoreError."""
    content = message["content"]
    if isinstance(content, str):
        return content
    for part in content:
        if part.get("type") != "text":
            raise FourscoreError(f"a message has a part of type `{part.get('type')}`", todo="only text can be rendered here")
    return "".join(part["text"] for part in content)


def render_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of the chat up to where the assistant begins to speak.

    Control tokens inside a message's text (`<|im_end|>` typed by a user) are encoded as plain text. A missing template,
    or one that refuses these messages, is a FourscoreError.
    """
    return _encode(tokenizer, messages, prompt=True)


def render_row(tokenizer: Any, messages: list[Message], answer: str) -> Rendered:
    """Token ids of the chat with the assistant's answer, up to and with the end-of-turn token.

    FourscoreError when the rendered row does not start with the rendered prompt, when the template writes something else
    than the answer, when the answer's first token merges with the prompt's last, or when no token ends the turn.
    """
    full = [*messages, text_message("assistant", answer)]
    prompt_text, text = _text(tokenizer, messages, prompt=True), _text(tokenizer, full, prompt=False)
    _check_text(prompt_text, text, answer)
    prompt, ids = _encode(tokenizer, messages, prompt=True, text=prompt_text), _encode(tokenizer, full, prompt=False, text=text)
    length = len(prompt)
    if ids[:length] != prompt:
        at = next((i for i, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(length, len(ids) - 1))
        raise FourscoreError(
            f"the prompt and the answer run into one token ({tokenizer.decode(ids[at : at + 1])!r})",
            where="chat template",
            todo="a template whose generation prompt ends in a newline or a special token does not do that",
        )
    control = _chat(tokenizer, tokenizer.get_chat_template()).control_ids
    for end in range(length, len(ids)):
        if ids[end] in control:
            return Rendered(ids[: end + 1], length)
    raise FourscoreError(
        "no token ends the assistant's turn, so the model would never learn to stop",
        where="chat template",
        todo="use a model whose template ends a turn with a special token",
    )


def answer_ids(tokenizer: Any, messages: list[Message], answer: str) -> list[int]:
    """The answer's tokens after this prompt, end of turn included: what is trained on and what is scored."""
    row = render_row(tokenizer, messages, answer)
    return row.ids[row.prompt_length :]


def end_of_turn(tokenizer: Any) -> int:
    """The id of the token that ends the assistant's turn in this tokenizer's template: where generating stops."""
    return render_row(tokenizer, [text_message("user", _PROBE_USER)], _PROBE_ANSWER).ids[-1]


def control_text(tokenizer: Any, text: str) -> str | None:
    """The first control token that stands literally in `text`, or None. It is encoded as plain text, never as control."""
    found = _chat(tokenizer, _template(tokenizer)).control.search(text)
    return found.group() if found else None


def prompt_hash(ids: list[int]) -> str:
    """16 hex digits that name a rendered prompt: SHA-256 over its ids as JSON."""
    return hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()[:16]


def _template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        raise FourscoreError(
            "this model's tokenizer has no chat template",
            where=str(getattr(tokenizer, "name_or_path", "")) or "tokenizer",
            todo="take the instruct or chat version of the model",
        ) from None


@lru_cache(maxsize=16)
def _chat(tokenizer: Any, template: str) -> _Chat:
    control = [
        (token_id, token.content)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    ]
    longest_first = sorted((text for _, text in control), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    for parts in (False, True):
        probe = [text_message("user", _PROBE_USER)]
        try:
            seen = _apply(tokenizer, probe, parts, prompt=True, tokenize=False)
        except Exception:  # a template may fail in any way on content it was not written for; the next form is tried
            continue
        if _PROBE_USER in seen:
            return _Chat(parts, pattern, frozenset(token_id for token_id, _ in control))
    raise FourscoreError("the chat template shows no user message", where="chat template", todo="take a model with a working template")


def _apply(tokenizer: Any, messages: list[Message], parts: bool, *, prompt: bool, tokenize: bool) -> Any:
    flat = [m if parts else {**m, "content": text_of(m)} for m in messages]
    # Templates that know `enable_thinking` would otherwise train and score an empty thought as part of the answer;
    # others never look at it.
    return tokenizer.apply_chat_template(
        flat,
        add_generation_prompt=prompt,
        tokenize=tokenize,
        return_dict=False,
        sanitize_control_tokens=tokenize,
        enable_thinking=False,
    )


def _text(tokenizer: Any, messages: list[Message], *, prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    chat = _chat(tokenizer, _template(tokenizer))
    try:
        return str(_apply(tokenizer, messages, chat.parts, prompt=prompt, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        hint = "leave `data.prompt.system` out and say it in `user`" if "system" in str(error).lower() else "check `data.prompt`"
        raise FourscoreError(f"the model's template refuses the messages ({roles}): {error}", where="chat template", todo=hint) from None


def _encode(tokenizer: Any, messages: list[Message], *, prompt: bool, text: str | None = None) -> list[int]:
    """Ids of the rendered messages. `text` spares a second rendering."""
    chat = _chat(tokenizer, _template(tokenizer))
    if any(chat.control.search(text_of(m)) for m in messages):
        return list(_apply(tokenizer, messages, chat.parts, prompt=prompt, tokenize=True))
    if text is None:
        text = _text(tokenizer, messages, prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_text(prompt: str, text: str, answer: str) -> None:
    if not text.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, text)) if a != b), min(len(prompt), len(text)))
        raise FourscoreError(
            f"a row does not start with its own prompt: after {prompt[max(0, at - 20) : at]!r} the prompt goes on with "
            f"{prompt[at : at + 20]!r}, the row with {text[at : at + 20]!r}",
            where="chat template",
            todo="this template renders a finished turn differently from an open one; use another model or mend its template",
        )
    rest = text[len(prompt) :].lstrip()
    if not rest.startswith(answer.strip()):
        raise FourscoreError(
            f"the template writes {rest[:40]!r} where the answer {answer.strip()[:40]!r} should stand",
            where="chat template",
            todo="use a model whose template gives the assistant's text as it is",
        )
