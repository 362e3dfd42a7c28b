"""How long each row is in tokens, what happens to rows that are too long, and rows that would train on nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourscore.data.mapping import Example, name_rows
from fourscore.data.template import Message, Rendered, render_row, text_message
from fourscore.files import FourscoreError
from fourscore.progress import track
from fourscore.spec import Data


@dataclass(frozen=True)
class Sized:
    """A row that fits: `tokens` in all, `trained` of them the answer's with its end of turn."""

    example: Example
    tokens: int
    trained: int


@dataclass(frozen=True)
class OverLong:
    """Rows over `max_tokens` as they stand in the source; `longest_tokens` and `longest_row` over all rows."""

    numbers: list[int]
    longest_tokens: int
    longest_row: int


def chat(example: Example) -> list[Message]:
    """The messages that the model is given."""
    system = [text_message("system", example.system)] if example.system else []
    return [*system, text_message("user", example.user)]


def size_rows(examples: Sequence[Example], data: Data, tokenizer: Any) -> tuple[list[Sized], OverLong]:
    """Every row in tokens; over-long rows cut or dropped as the study says.

    FourscoreError, with row numbers, for over-long rows where the study says neither, for rows that do not fit even with
    an empty user message, for answers without a token of their own, and for what the template refuses.
    """
    sized, too_long, untrainable, unfit = [], [], [], []
    longest = (0, 0)
    with track("tokenise", len(examples), "rows") as bar:
        for example in examples:
            rendered = _render(example, tokenizer)
            longest = max(longest, (len(rendered.ids), -example.number))
            if len(rendered.ids) - rendered.prompt_length < 2:  # the end of turn alone teaches nothing
                untrainable.append(example.number)
            elif len(rendered.ids) <= data.max_tokens:
                sized.append(_sized(example, rendered))
            else:
                too_long.append(example.number)
                if data.over_long == "cut":
                    cut = _cut(example, rendered, data.max_tokens, tokenizer)
                    if cut is None:
                        unfit.append(example.number)
                    else:
                        sized.append(cut)
            bar.advance()
    over = OverLong(too_long, longest[0], -longest[1])
    _refuse(data, over, untrainable, unfit)
    if not sized:
        raise FourscoreError(f"every row has more than {data.max_tokens} tokens", where=data.source, todo="raise `data.max_tokens`")
    return sized, over


def _refuse(data: Data, over: OverLong, untrainable: list[int], unfit: list[int]) -> None:
    if untrainable:
        raise FourscoreError(
            f"{name_rows(untrainable)} without a trainable token: the answer has no token of its own",
            where=data.source,
            todo="mend those answers, or leave the rows out with `data.where`",
        )
    if over.numbers and data.over_long == "error":
        raise FourscoreError(
            f"{name_rows(over.numbers)} with more than {data.max_tokens} tokens; "
            f"the longest, row {over.longest_row}, has {over.longest_tokens:,}",
            where=data.source,
            todo="raise `data.max_tokens`, or say `data.over_long: cut` or `drop`",
        )
    if unfit:
        raise FourscoreError(
            f"{name_rows(unfit)} with more than {data.max_tokens} tokens even when the user's message is cut to nothing",
            where=data.source,
            todo="raise `data.max_tokens`, or say `data.over_long: drop`",
        )


def _render(example: Example, tokenizer: Any) -> Rendered:
    try:
        return render_row(tokenizer, chat(example), example.answer)
    except FourscoreError as error:
        raise FourscoreError(error.what, where=f"row {example.number}, {error.where}", todo=error.todo) from None


def _sized(example: Example, rendered: Rendered) -> Sized:
    return Sized(example, len(rendered.ids), len(rendered.ids) - rendered.prompt_length)


def _cut(example: Example, rendered: Rendered, most: int, tokenizer: Any) -> Sized | None:
    """The row with its user message shortened from the end, token by token, until it fits; None if it cannot."""
    ends = [end for _, end in tokenizer(example.user, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    keep = len(ends)
    while len(rendered.ids) > most:
        keep -= len(rendered.ids) - most
        user = example.user[: ends[keep - 1]].rstrip() if keep > 0 else ""
        if not user:
            return None
        example = replace(example, user=user)
        rendered = _render(example, tokenizer)
    return _sized(example, rendered)
