"""How a table's rows seem to become chats: which column answers, which ask, which ties rows together. A guess to correct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourscore.data.sources import Table
from fourscore.files import FourscoreError

ANSWERS = (
    *("answer", "label", "output", "response", "completion", "reply", "assistant"),
    *("category", "class", "intent", "sentiment", "summary", "translation"),
)
QUESTIONS = ("question", "instruction", "prompt", "query", "text", "sentence", "message", "review", "input", "user", "document", "content")
CONTEXTS = ("passage", "context", "document", "article", "input")
GROUPS = ("group", "customer", "author", "topic")
MOST_CHOICES = 20
LONG_TEXT = 80  # characters on average: a passage, not a name


@dataclass(frozen=True)
class Guess:
    """How a table's rows seem to become chats. `notes` go into the file as comments."""

    prompt: dict[str, str | None]
    choices: list[str]
    group: list[str]
    longest: int  # characters of the longest row
    longest_answer: int
    notes: list[str]


def guess_mapping(table: Table, answer_column: str | None = None) -> Guess:
    """Look at the rows. `answer_column` names the answer where it cannot be told.

    Known shapes: chats ({"messages": [...]}, one exchange), instruction/input/output, question/answer with or without a
    passage, prompt/completion, text/label; else an answer column of few values and the longest text. FourscoreError,
    listing the columns, when the answer or the prompt cannot be told.
    """
    if answer_column is None and _is_chat(table):
        return _messages(table)
    return _columns(table, answer_column)


def _is_chat(table: Table) -> bool:
    def message(value: Any) -> bool:
        return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)

    values = [row.columns.get("messages") for row in table.rows]
    return all(isinstance(v, list) and v and all(message(m) for m in v) for v in values)


def _messages(table: Table) -> Guess:
    """Rows of {"messages": [{"role", "content"}, ...]} with one question and one answer."""
    chats = [row.columns["messages"] for row in table.rows]
    for row, chat in zip(table.rows, chats):
        roles = [m["role"] for m in chat]
        if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
            raise FourscoreError(
                f"row {row.number} is a chat of {', '.join(roles)}",
                where=table.source,
                todo="a study takes one question and one answer a row, with or without a system message: split longer chats first",
            )
    system = "{{ messages[0].content if messages[0].role == 'system' else '' }}"
    return Guess(
        prompt={
            "system": system if any(len(chat) == 3 for chat in chats) else None,
            "user": "{{ messages[-2].content }}",
            "answer": "{{ messages[-1].content }}",
        },
        choices=_choices([chat[-1]["content"].strip() for chat in chats]),
        group=_group(table, set(), {"messages"}),
        longest=max(sum(len(m["content"]) for m in chat) for chat in chats),
        longest_answer=max(len(chat[-1]["content"]) for chat in chats),
        notes=["Its rows are chats of one question and one answer."],
    )


def _columns(table: Table, answer_column: str | None) -> Guess:
    answer = _answer(table, answer_column)
    asked = _questions(table, answer)
    values = [row.columns.get(answer) for row in table.rows]
    if values and all(isinstance(v, bool) for v in values):
        template, choices = f"{{{{ 'yes' if {_spell(answer)} else 'no' }}}}", ["no", "yes"]
    else:
        template, choices = f"{{{{ {_spell(answer)} }}}}", _choices(["" if v is None else str(v).strip() for v in values])
    if choices:
        listed = ", ".join(choices[:-1]) + " or " + choices[-1]
        system: str | None = f"Answer with {listed}."
    else:
        system = None
    group = _group(table, {answer}, set(asked[-1:]))
    return Guess(
        prompt={"system": system, "user": _ask(asked, table), "answer": template},
        choices=choices,
        group=group,
        longest=max(sum(len(str(row.columns.get(c) or "")) for c in [*asked, answer]) for row in table.rows),
        longest_answer=max(len(str(v)) for v in values),
        notes=[
            f"Taken for the answer: {answer}. For the prompt: {', '.join(asked)}. "
            + (f"For what belongs together: {', '.join(group)}." if group else "No column was seen to group the rows.")
        ],
    )


def _answer(table: Table, wanted: str | None) -> str:
    columns = ", ".join(table.columns)
    if wanted is not None:
        if wanted not in table.columns:
            raise FourscoreError(f"there is no column `{wanted}`", where=table.source, todo=f"its columns: {columns}")
        return wanted
    named = _first_named(table, ANSWERS)
    if named is not None:
        return named
    few = [c for c in table.columns if _choices([str(r.columns.get(c)) for r in table.rows])]
    if len(few) == 1:
        return few[0]
    raise FourscoreError(
        f"which column holds the answer cannot be told (columns: {columns})",
        where=table.source,
        todo="name it: `fourscore init --answer COLUMN`" + (f", perhaps {' or '.join(few)}" if few else ""),
    )


def _questions(table: Table, answer: str) -> list[str]:
    """The columns that make the user's message: a context where there is one, then the question."""
    question = _first_named(table, tuple(c for c in QUESTIONS if c != answer.lower()))
    if question is None:
        texts = [c for c in table.columns if c != answer and _mean_length(table, c) >= 10]
        question = max(texts, key=lambda c: _mean_length(table, c), default=None)
    if question is None or question == answer:
        raise FourscoreError(
            f"which column holds the prompt cannot be told (columns: {', '.join(table.columns)}; answer: {answer})",
            where=table.source,
            todo="rename it to `question` or `text`, or write the study by hand (docs/study.md)",
        )
    context = _first_named(table, tuple(c for c in CONTEXTS if c not in (question.lower(), answer.lower())))
    if context is None:
        return [question]
    # an `instruction` comes before its `input`; a question after its passage
    return [question, context] if context.lower() == "input" else [context, question]


def _ask(columns: list[str], table: Table) -> str:
    if len(columns) == 1:
        return f"{{{{ {_spell(columns[0])} }}}}"
    optional = columns[1] if columns[1].lower() == "input" else columns[0]
    filled = all(row.columns.get(optional) not in (None, "") for row in table.rows)
    if filled:
        return "\n\n".join(f"{{{{ {_spell(c)} }}}}" for c in columns)
    inside = f"{{{{ {_spell(optional)} }}}}"
    have = f"{_spell(optional)} is defined and {_spell(optional)}"
    if optional == columns[1]:
        return f"{{{{ {_spell(columns[0])} }}}}{{% if {have} %}}\n\n{inside}{{% endif %}}"
    return f"{{% if {have} %}}{inside}\n\n{{% endif %}}{{{{ {_spell(columns[1])} }}}}"


def _group(table: Table, answers: set[str], prompts: set[str]) -> list[str]:
    """A column whose values repeat and so tie rows together: a passage first, then what is named like a group."""
    left = [c for c in table.columns if c not in answers]
    repeated = {c: n for c in left if (n := _distinct(table, c)) is not None and n <= 0.9 * len(table.rows) and n >= 5}
    passages = [c for c in repeated if _mean_length(table, c) >= LONG_TEXT]
    named = [c for c in repeated if c.lower() in GROUPS or c.lower().endswith("_id")]
    names = [c for c in repeated if c not in prompts and _all_text(table, c) and 20 <= repeated[c] <= len(table.rows) / 2]
    return next(([c] for c in [*passages, *named, *names]), [])


def _all_text(table: Table, column: str) -> bool:
    return all(isinstance(row.columns.get(column), str) for row in table.rows)


def _distinct(table: Table, column: str) -> int | None:
    """How many values a column has; None where it has gaps or values that are no labels."""
    values = [row.columns.get(column) for row in table.rows]
    if not all(isinstance(v, str | int) and not isinstance(v, bool) and str(v).strip() for v in values):
        return None
    return len({str(v).strip() for v in values})


def _choices(answers: list[str]) -> list[str]:
    """The distinct answers where they are few, short and often repeated: a list to choose from. Else none."""
    distinct = sorted(set(answers))
    few = 2 <= len(distinct) <= MOST_CHOICES and len(answers) >= 5 * len(distinct)
    return distinct if few and all(0 < len(a) <= 40 for a in distinct) else []


def _first_named(table: Table, names: tuple[str, ...]) -> str | None:
    by_name = {c.lower(): c for c in table.columns}
    return next((by_name[n] for n in names if n in by_name), None)


def _mean_length(table: Table, column: str) -> float:
    values = [row.columns.get(column) for row in table.rows]
    texts = [v for v in values if isinstance(v, str)]
    return sum(map(len, texts)) / len(values) if texts else 0.0


def _spell(column: str) -> str:
    return column if column.isidentifier() and column not in ("row", "if", "else", "in", "is", "not", "and", "or") else f"row[{column!r}]"
