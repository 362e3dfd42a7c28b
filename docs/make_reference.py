"""Write docs/study.md from the field descriptions in fourscore.spec, and the table of options in docs/serve.md from the command line.

Run it after changing a field or an option of `fourscore serve`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fourscore.spec import Study

INTRODUCTION = """# The study file

A study is one YAML file, written before the run. Every field is listed here; a key that is not is an error.
`fourscore init DATA` writes a commented file for your data. The text of this page is made by `docs/make_reference.py`.
"""


TABLE = "<!-- the options of `fourscore serve`, made by docs/make_reference.py -->"


def reference() -> str:
    """The page, as Markdown."""
    return INTRODUCTION + _section("study.yaml", Study, "")


def serve_options() -> str:
    """The options of `fourscore serve`, as a Markdown table."""
    from typer.main import get_command

    from fourscore.cli import app

    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            default = "" if option.default in (None, False, []) else f"`{option.default}`"
            lines.append(f"| `{option.opts[-1]}` | {default} | {option.help} |")
    return "\n".join(lines) + "\n"


def with_options(text: str) -> str:
    """docs/serve.md with the table as it is now."""
    return text.split(TABLE)[0] + TABLE + "\n" + serve_options()


def _section(title: str, model: type[BaseModel], prefix: str) -> str:
    lines = [f"\n## {title}\n", (model.__doc__ or "").strip() + "\n", "| field | type | default | meaning |", "|---|---|---|---|"]
    below = []
    for name, field in model.model_fields.items():
        inner = _model_of(field)
        meaning = field.description or ("a section, see below" if inner else "")
        lines.append(f"| `{prefix}{name}` | {_type_of(field)} | {_default_of(field)} | {meaning} |")
        if inner:
            below.append(_section(f"{prefix}{name}", inner, f"{prefix}{name}."))
    return "\n".join(lines) + "\n" + "".join(below)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _type_of(field: FieldInfo) -> str:
    inner = _model_of(field)
    if inner:
        return "list of sections" if field.annotation is not inner else "section"
    plain = isinstance(field.annotation, type) and not hasattr(field.annotation, "__args__")
    text = getattr(field.annotation, "__name__", "") if plain else str(field.annotation)
    return text.replace("typing.", "").replace("Literal", "one of ").replace("|", "or")


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return ""
    return "" if field.default in (None, "", [], {}) else f"`{field.default}`"


if __name__ == "__main__":
    Path(__file__).with_name("study.md").write_text(reference(), encoding="utf-8")
    page = Path(__file__).with_name("serve.md")
    page.write_text(with_options(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write("docs/study.md and docs/serve.md written\n")
