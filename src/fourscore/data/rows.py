"""The rows that training and evaluating read: one chat with its answer, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fourscore.files import FourscoreError, read_jsonl, write_jsonl

Part = Literal["train", "validation", "evaluation"]
PARTS: tuple[Part, ...] = ("train", "validation", "evaluation")


@dataclass(frozen=True)
class Row:
    """One row of a prepared data folder.

    id: 16 hex digits from the source row's content; a repeated source row gets another id at each repetition.
    number: its number in the source, from 1 (the line of a .jsonl file).
    cluster: its group labels (one or two), or [id] where the study names no group.
    messages: system and user messages, content as typed parts. answer: what the assistant should say.
    choices: the permitted answers, empty for free text.
    """

    id: str
    number: int
    cluster: list[str]
    messages: list[dict[str, Any]]
    answer: str
    choices: list[str]


def write_rows(folder: Path, part: Part, rows: Iterable[Row]) -> None:
    """Write `<part>.jsonl` into a data folder, one row a line."""
    write_jsonl(folder / f"{part}.jsonl", (asdict(row) for row in rows))


def read_rows(folder: str | Path, part: Part) -> list[Row]:
    """The rows of one part ("train", "validation", "evaluation") of a data folder that `prepare` wrote, in its order.

    A missing folder or part, or a line with other fields, is a FourscoreError.
    """
    if part not in PARTS:
        raise FourscoreError(f"a data folder has no part `{part}`", where=str(folder), todo=f"ask for one of: {', '.join(PARTS)}")
    path = Path(folder) / f"{part}.jsonl"
    rows = []
    for number, value in enumerate(read_jsonl(path), 1):
        try:
            rows.append(Row(**value))
        except TypeError:
            raise FourscoreError(
                "not a row of a prepared data folder", where=f"{path}:{number}", todo="prepare the data again with `fourscore check`"
            ) from None
    return rows
