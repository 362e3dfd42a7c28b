"""`fourscore init`: look at a data file and write a commented study, to be corrected by hand."""

from __future__ import annotations

import textwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fourscore.data.guess import guess_mapping
from fourscore.data.sources import read_source
from fourscore.spec import Study, parse_study

MODEL = "smollm2-135m-instruct"
CHARACTERS_PER_TOKEN = 3  # a low figure, so that the guessed max_tokens is rather too high
WIDTH = 110


def draft_study(source: str, name: str, *, answer_column: str | None = None, sha256: str | None = None) -> str:
    """The text of a commented study.yaml for a data source; it parses with `spec.parse_study`.

    answer_column: which column holds what the assistant should say, where it cannot be told. sha256: needed for `wheel:`.
    FourscoreError for an unreadable source, and, listing the columns, when the answer or the prompt cannot be told.
    """
    table = read_source(source, sha256)
    guess = guess_mapping(table, answer_column)
    given: dict[str, Any] = {
        "study": name,
        "model": {"name": MODEL},
        "data": {
            "source": source,
            "sha256": table.sha256,
            "prompt": guess.prompt,
            "choices": guess.choices,
            "group": guess.group,
            "max_tokens": _max_tokens(guess.longest),
        },
        "evaluate": {"keep": [{"task": "piqa"}, {"task": "commonsense_qa"}]},
    }
    if not guess.choices:
        tokens = max(16, -(-guess.longest_answer // CHARACTERS_PER_TOKEN))
        given["evaluate"] |= {"gain": {"scores": ["generated"]}, "max_new_tokens": min(tokens, 256)}
    head = [
        f"A draft made from {source}: {len(table.rows):,} rows, columns {', '.join(table.columns)}.",
        *guess.notes,
        f"Correct it, name the data's licence, then: fourscore check {name}.yaml",
    ]
    text = "".join(_comment(line, 0) for line in head) + "\n" + _section(Study, given, 0)
    parse_study(text, where=f"{name}.yaml")
    return text


def _max_tokens(characters: int) -> int:
    wanted = characters // CHARACTERS_PER_TOKEN + 64
    return next((n for n in (256, 512, 1024) if n >= wanted), 2048)


def _section(model: type[BaseModel], given: dict[str, Any], depth: int) -> str:
    """A section's fields in YAML, each below its description; what `given` lacks gets the default."""
    out: list[str] = []
    after_section = False
    for name, field in model.model_fields.items():
        inner = _submodel(field)
        value = given[name] if name in given else field.get_default(call_default_factory=True)
        about = _about(field) or (inner.__doc__ if inner else None) or ""
        if depth == 0 and (inner is not None or after_section):
            out.append("\n")
        after_section = inner is not None
        out.append(_comment(about, depth))
        if inner is None:
            out.append(f"{'  ' * depth}{name}: {_scalar(value, depth)}\n")
        elif isinstance(value, list):
            out.append(_list(name, inner, value, depth))
        else:
            values = value if isinstance(value, dict) else {}
            out.append(f"{'  ' * depth}{name}:\n" + _section(inner, values, depth + 1))
    return "".join(out)


def _list(name: str, inner: type[BaseModel], values: list[dict[str, Any]], depth: int) -> str:
    pad = "  " * depth
    about = "".join(_comment(f"{key}: {_about(field)}", depth + 1) for key, field in inner.model_fields.items())
    if not values:
        return f"{pad}{name}: []\n{about}"
    items = [inner.model_validate(value).model_dump(mode="json") for value in values]
    return f"{pad}{name}:\n{about}" + "".join(f"{pad}  - {_scalar(item, depth)}\n" for item in items)


def _submodel(field: FieldInfo) -> type[BaseModel] | None:
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _about(field: FieldInfo) -> str:
    options = _options(field.annotation)
    return (field.description or "") + (f" One of: {', '.join(options)}." if options else "")


def _options(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(a) for a in get_args(kind)]
    if get_origin(kind) in (list, Union, UnionType):
        return [o for a in get_args(kind) for o in _options(a)]
    return []


def _comment(text: str, depth: int) -> str:
    pad = "  " * depth + "# "
    return "".join(f"{line}\n" for line in textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=pad, subsequent_indent=pad))


def _scalar(value: Any, depth: int) -> str:
    if isinstance(value, str) and "\n" in value and value == value.strip():
        pad = "\n" + "  " * (depth + 1)
        return "|-" + "".join(pad + line if line else "\n" for line in value.split("\n"))
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
