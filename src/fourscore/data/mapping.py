"""Source rows to chats: the `where` filter, the Jinja templates of the study, the permitted answers, the group labels."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from fourscore.data.sources import SourceRow, Table
from fourscore.files import FourscoreError
from fourscore.spec import Data

SHOWN = 5  # row numbers named in an error


@dataclass(frozen=True)
class Example:
    """A row after mapping. `group` holds its labels, one a group column, or is empty."""

    id: str
    number: int
    group: tuple[str, ...]
    system: str | None
    user: str
    answer: str


def map_rows(table: Table, data: Data) -> tuple[list[Example], int]:
    """The rows that `where` keeps, as chats in source order, and how many it left aside.

    All texts lose the white space around them; a system message that renders empty is left out. Templates see the row's
    columns by name, and the whole row as `row` for names that Jinja cannot spell (`row['anti-stereotype']`).
    FourscoreError for unknown columns, broken templates, nulls, empty user messages or answers, answers outside `choices`.
    """
    kept = _where(table, data)
    ids = _ids(kept)
    groups = [_group(row, data, table) for row in kept]
    texts = {}
    for field in ("system", "user", "answer"):
        template = getattr(data.prompt, field)
        texts[field] = _render_all(template, kept, table, f"data.prompt.{field}") if template is not None else [""] * len(kept)
    for field in ("user", "answer"):
        empty = [row.number for row, text in zip(kept, texts[field]) if not text]
        if empty:
            raise FourscoreError(
                f"{name_rows(empty)} with an empty {'user message' if field == 'user' else 'answer'}",
                where=table.source,
                todo=f"mend those rows, leave them out with `data.where`, or change `data.prompt.{field}`",
            )
    if data.choices:
        _check_choices(kept, texts["answer"], data.choices, table)
    examples = [
        Example(id_, row.number, group, system or None, user, answer)
        for id_, row, group, system, user, answer in zip(ids, kept, groups, texts["system"], texts["user"], texts["answer"])
    ]
    return examples, len(table.rows) - len(kept)


def row_id(columns: dict[str, Any], repetition: int = 0) -> str:
    """16 hex digits from a source row's content, whatever the order of its columns; `repetition` tells equal rows apart."""
    text = json.dumps(columns, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_stable)
    return hashlib.sha256(f"{text}#{repetition}".encode() if repetition else text.encode()).hexdigest()[:16]


def _stable(value: Any) -> str:
    """Text of a Parquet value that JSON has no word for."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _ids(rows: list[SourceRow]) -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for row in rows:
        first = row_id(row.columns)
        repetition = seen.get(first, 0)
        seen[first] = repetition + 1
        ids.append(row_id(row.columns, repetition) if repetition else first)
    return ids


def _where(table: Table, data: Data) -> list[SourceRow]:
    for column in data.where:
        _need_column(column, table, "data.where")
    kept = [row for row in table.rows if all(_equal(row.columns.get(c), wanted) for c, wanted in data.where.items())]
    if not kept:
        said = ", ".join(f"{c} = {v!r}" for c, v in data.where.items())
        seen = {c: sorted({str(r.columns.get(c)) for r in table.rows})[:5] for c in data.where}
        there = "; ".join(f"{c} has {', '.join(repr(v) for v in values)}" for c, values in seen.items())
        raise FourscoreError(f"no row has {said} ({there})", where=table.source, todo="correct `data.where`")
    return kept


def _equal(value: Any, wanted: str | int | float | bool) -> bool:
    """Equal values; True is not 1. Text (all that a CSV has) is compared as text: `true`, `12`."""
    if isinstance(value, str):
        return value.strip().lower() == str(wanted).lower() if isinstance(wanted, bool) else value == str(wanted)
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _group(row: SourceRow, data: Data, table: Table) -> tuple[str, ...]:
    for column in data.group:
        _need_column(column, table, "data.group")
        if row.columns.get(column) is None or not str(row.columns[column]).strip():
            raise FourscoreError(
                f"row {row.number} has no value in the group column `{column}`",
                where=table.source,
                todo="fill it in, or group by another column",
            )
    return tuple(str(row.columns[column]).strip() for column in data.group)


def _need_column(column: str, table: Table, field: str) -> None:
    if column not in table.columns:
        near = difflib.get_close_matches(column, table.columns, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"its columns: {', '.join(table.columns)}"
        raise FourscoreError(f"`{field}` names column `{column}`, which no row has", where=table.source, todo=hint)


def _refuse_null(value: Any) -> Any:
    """Jinja would write a null as the word None, and bytes as b'...'."""
    if value is None:
        raise UndefinedError("a column that is null (empty)")
    if isinstance(value, bytes):
        raise UndefinedError("a column of bytes, which is not text")
    return value


def _compile(text: str, table: Table, field: str) -> Template:
    environment = SandboxedEnvironment(undefined=StrictUndefined, finalize=_refuse_null)
    try:
        names = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except TemplateSyntaxError as error:
        raise FourscoreError(f"`{field}` is not a Jinja template: {error.message}", where=table.source, todo="see `data.prompt`") from None
    for name in sorted(names - set(environment.globals) - {"row"}):
        if name not in table.columns:
            spelt = [c for c in table.columns if not c.isidentifier() and name in c.replace("-", " ").replace(".", " ").split()]
            if spelt:
                todo = f"write `row['{spelt[0]}']` for the column `{spelt[0]}`"
            else:
                near = difflib.get_close_matches(name, table.columns, n=1)
                todo = f"did you mean `{near[0]}`?" if near else f"its columns: {', '.join(table.columns)}"
            raise FourscoreError(f"`{field}` uses column `{name}`, which no row has", where=table.source, todo=todo)
    return template


def _render_all(text: str, rows: list[SourceRow], table: Table, field: str) -> list[str]:
    template = _compile(text, table, field)
    rendered, lacking, why = [], [], ""
    for row in rows:
        try:
            rendered.append(template.render({"row": row.columns, **row.columns}).strip())
        except UndefinedError as error:
            lacking.append(row.number)
            why = why or str(error.message)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise FourscoreError(f"`{field}` fails on row {row.number}: {error}", where=table.source, todo="correct the template") from None
    if lacking:
        raise FourscoreError(
            f"`{field}` cannot be filled in {name_rows(lacking)}: {why}",
            where=table.source,
            todo="mend those rows, leave them out with `data.where`, or give a default: `{{ column or '' }}`",
        )
    return rendered


def _check_choices(rows: list[SourceRow], answers: list[str], choices: list[str], table: Table) -> None:
    allowed = set(choices)
    wrong = [(row.number, answer) for row, answer in zip(rows, answers) if answer not in allowed]
    if wrong:
        number, answer = wrong[0]
        more = f" ({len(wrong) - 1} more rows do too)" if len(wrong) > 1 else ""
        raise FourscoreError(
            f"row {number} answers {answer[:60]!r}, which is not among the choices {', '.join(choices)}{more}",
            where=table.source,
            todo="add it to `data.choices`, mend the row, or change `data.prompt.answer`",
        )


def name_rows(numbers: list[int]) -> str:
    """Row numbers for people: how many, the first few, and that there are more: `3 rows (1, 4, 9)`."""
    shown = ", ".join(str(n) for n in numbers[:SHOWN])
    return f"{len(numbers):,} row{'' if len(numbers) == 1 else 's'} ({shown}{', ...' if len(numbers) > SHOWN else ''})"
