"""`init`: the usual shapes of data files become a study that parses and prepares; where there is no telling, it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fourscore.data import draft_study, prepare, read_rows
from fourscore.files import FourscoreError
from fourscore.spec import Study, parse_study

PASSAGE = "The harbour of town {} was rebuilt in stone after the great storm had carried away its wooden piers in one night."


def saved(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def drafted(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Study:
    return parse_study(draft_study(saved(folder, rows), "desk", **options))


def first_row(study: Study, tokenizer: Any, folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Prepare the drafted study and read source row 1 back."""
    prepare(study.data, tokenizer, folder / "out")
    rows = [r for part in ("train", "validation", "evaluation") for r in read_rows(folder / "out", part)]  # type: ignore[arg-type]
    row = next(r for r in rows if r.number == 1)
    return [(m["role"], m["content"][0]["text"]) for m in row.messages], row.answer


SHAPES: dict[str, tuple[Any, str, str, list[str]]] = {
    # a row for a number, then the user's message and the answer of row 0, and the choices
    "text and label": (lambda i: {"text": f"ticket {i}", "label": "ab"[i % 2]}, "ticket 0", "a", ["a", "b"]),
    "numbers as labels": (lambda i: {"sentence": f"ticket {i}", "label": i % 3}, "ticket 0", "0", ["0", "1", "2"]),
    "true and false": (lambda i: {"question": f"is it {i}?", "answer": i % 2 == 0}, "is it 0?", "yes", ["no", "yes"]),
    "instruction and output": (
        lambda i: {"instruction": f"Do {i}", "input": "" if i % 2 else f"in {i}", "output": f"done {i}"},
        "Do 0\n\nin 0",
        "done 0",
        [],
    ),
    "prompt and completion": (lambda i: {"prompt": f"Say {i}", "completion": f"said {i}"}, "Say 0", "said 0", []),
    "a named few": (lambda i: {"what came in": f"a longer text {i}", "queue": "xyz"[i % 3]}, "a longer text 0", "x", ["x", "y", "z"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_known_shape_becomes_a_study_that_prepares(tokenizer: Any, tmp_path: Path, shape: str):
    row, user, answer, choices = SHAPES[shape]
    study = drafted(tmp_path, [row(i) for i in range(60)])
    assert study.data.choices == choices
    assert study.model.name == "smollm2-135m-instruct"
    assert study.evaluate.gain.scores == (["likelihood", "generated"] if choices else ["generated"])
    messages, said = first_row(study, tokenizer, tmp_path)
    assert (messages[-1], said) == (("user", user), answer)


def test_a_passage_that_repeats_is_asked_about_and_groups_the_rows(tokenizer: Any, tmp_path: Path):
    rows = [{"passage": PASSAGE.format(i % 12), "question": f"Was it {i}?", "answer": ["yes", "no"][i % 2]} for i in range(60)]
    study = drafted(tmp_path, rows)
    assert study.data.group == ["passage"]
    assert study.data.choices == ["no", "yes"]  # in quotes in the file: YAML would read them as booleans
    messages, answer = first_row(study, tokenizer, tmp_path)
    assert messages[-1] == ("user", PASSAGE.format(0) + "\n\nWas it 0?")
    assert answer == "yes"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chats_of_one_exchange(tokenizer: Any, tmp_path: Path, system: str | None):
    def chat(i: int) -> dict[str, Any]:
        head = [{"role": "system", "content": system}] if system else []
        return {"messages": [*head, {"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": f"Hello {i}"}]}

    messages, answer = first_row(drafted(tmp_path, [chat(i) for i in range(40)]), tokenizer, tmp_path)
    assert messages == ([("system", system)] if system else []) + [("user", "Hi 0")]
    assert answer == "Hello 0"


def test_longer_chats_are_refused_with_the_row(tmp_path: Path):
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(FourscoreError, match="row 2 is a chat of user, assistant, user, assistant"):
        drafted(tmp_path, [{"messages": turn}, {"messages": turn * 2}])


def test_when_the_answer_cannot_be_told_it_asks_and_takes_the_name(tmp_path: Path):
    rows = [{"said": f"something {i} was said", "kind": "ab"[i % 2], "mood": "cd"[i % 2], "place": f"town {i % 25}"} for i in range(100)]
    with pytest.raises(FourscoreError) as caught:
        drafted(tmp_path, rows)
    assert "(columns: said, kind, mood, place)" in str(caught.value)
    assert "--answer COLUMN`, perhaps kind or mood" in str(caught.value)
    study = drafted(tmp_path, rows, answer_column="mood")
    assert (study.data.prompt.answer, study.data.choices, study.data.group) == ("{{ mood }}", ["c", "d"], ["place"])
    with pytest.raises(FourscoreError, match="there is no column `feeling`"):
        drafted(tmp_path, rows, answer_column="feeling")


def fields_of(model: type[BaseModel]) -> list[str]:
    inner = [k for f in model.model_fields.values() for k in (f.annotation, *getattr(f.annotation, "__args__", ()))]
    below = [k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)]
    own = [f.description for f in model.model_fields.values() if f.description]
    return own + [text for section in below for text in fields_of(section)]


def test_every_field_stands_below_its_description(tmp_path: Path):
    text = draft_study(saved(tmp_path, [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(30)]), "desk")
    comments = " ".join(line.strip().removeprefix("# ") for line in text.split("\n") if line.strip().startswith("#"))
    for description in fields_of(Study):
        assert " ".join(description.split()) in comments
    study = parse_study(text)
    assert study.study == "desk"
    assert study.data.sha256 is not None
    assert study.data.licence is None
