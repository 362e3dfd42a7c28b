"""Rows to chats: templates, filters, permitted answers, groups; every row that cannot be a chat is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourscore.data.mapping import map_rows, row_id
from fourscore.data.sources import read_source
from fourscore.files import FourscoreError
from fourscore.spec import Data

Desk = Callable[..., Data]


def mapped(data: Data) -> Any:
    return map_rows(read_source(data.source), data)


def test_templates_fill_in_columns_and_strip(desk: Desk):
    rows = [{"text": " Where is it? ", "label": True, "anti-label": "no", "row-note": "x"}]
    data = desk(rows, prompt={"system": "Be brief.\n", "user": "Q: {{ text }}\n", "answer": "{{ 'yes' if label else row['anti-label'] }} "})
    [example], other = mapped(data)
    assert (example.system, example.user, example.answer, other) == ("Be brief.", "Q:  Where is it?", "yes", 0)


def test_a_system_message_that_renders_empty_is_left_out(desk: Desk):
    prompt = {"system": "{{ hint or '' }}", "user": "{{ text }}", "answer": "{{ label }}"}
    examples, _ = mapped(desk([{"text": "a", "label": "b", "hint": None}, {"text": "c", "label": "d", "hint": "h"}], prompt=prompt))
    assert [e.system for e in examples] == [None, "h"]


def test_where_keeps_equal_values_and_counts_the_rest(desk: Desk):
    rows = [{"text": str(n), "label": "x", "lang": lang, "ok": ok} for n, (lang, ok) in enumerate([("en", True), ("de", True), ("en", 1)])]
    examples, other = mapped(desk(rows, where={"lang": "en", "ok": True}))
    assert [e.number for e in examples] == [1]  # 1 is not true
    assert other == 2


def test_where_compares_csv_text_as_text(tmp_path: Any):
    (tmp_path / "a.csv").write_text("text,label,year,ok\na,b,2020,True\nc,d,2021,true\n")
    data = Data(source=str(tmp_path / "a.csv"), where={"year": 2021, "ok": True}, prompt={"user": "{{ text }}", "answer": "{{ label }}"})
    examples, other = mapped(data)
    assert ([e.user for e in examples], other) == (["c"], 1)


GOOD = [{"text": f"question {n}", "label": "ab"[n % 2], "lang": "en"} for n in range(6)]
ERRORS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "where column": (GOOD, {"where": {"lan": "en"}}, r"`data.where` names column `lan`, which no row has\. Did you mean `lang`\?"),
    "where value": (GOOD, {"where": {"lang": "de"}}, r"no row has lang = 'de' \(lang has 'en'\)"),
    "template column": (
        GOOD,
        {"prompt": {"user": "{{ txt }}", "answer": "{{ label }}"}},
        r"`data.prompt.user` uses column `txt`, which no row has\. Did you mean `text`\?",
    ),
    "hyphen": (
        [r | {"anti-label": "x"} for r in GOOD],
        {"prompt": {"user": "{{ anti-label }}", "answer": "{{ label }}"}},
        r"write `row\['anti-label'\]`",
    ),
    "syntax": (GOOD, {"prompt": {"user": "{{ text ", "answer": "{{ label }}"}}, "`data.prompt.user` is not a Jinja template"),
    "sandbox": (
        GOOD,
        {"prompt": {"user": "{{ ''.__class__.__mro__ }}", "answer": "{{ label }}"}},
        "`data.prompt.user` (fails on|cannot be filled in)",
    ),
    "missing in a row": ([*GOOD, {"text": "x"}], {}, r"`data.prompt.answer` cannot be filled in 1 row \(7\): 'label' is undefined"),
    "null": ([*GOOD, {"text": None, "label": "a"}], {}, r"`data.prompt.user` cannot be filled in 1 row \(7\): a column that is null"),
    "empty user": ([*GOOD, {"text": "  ", "label": "a"}, {"text": "", "label": "a"}], {}, r"2 rows \(7, 8\) with an empty user message"),
    "empty answer": ([*GOOD, {"text": "x", "label": ""}], {}, r"1 row \(7\) with an empty answer"),
    "choices": (
        [*GOOD, {"text": "x", "label": "A"}, {"text": "x", "label": "c"}],
        {"choices": ["a", "b"]},
        r"row 7 answers 'A', which is not among the choices a, b \(1 more rows do too\)",
    ),
    "group column": (GOOD, {"group": "passage"}, "`data.group` names column `passage`, which no row has"),
    "group value": ([*GOOD, {"text": "x", "label": "a"}], {"group": "lang"}, r"row 7 has no value in the group column `lang`"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_row_that_cannot_be_a_chat_is_named(desk: Desk, case: str):
    rows, fields, complaint = ERRORS[case]
    with pytest.raises(FourscoreError) as caught:
        mapped(desk(rows, **fields))
    assert re.search(complaint, str(caught.value), re.IGNORECASE), str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_rows_get_different_ids(desk: Desk):
    examples, _ = mapped(desk([GOOD[0]] * 3 + [GOOD[1]]))
    assert len({e.id for e in examples}) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", e.id) for e in examples)


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), st.text())), st.randoms())
def test_the_order_of_columns_does_not_change_an_id(columns: dict[str, Any], random: Any):
    pairs = list(columns.items())
    random.shuffle(pairs)
    assert row_id(dict(pairs)) == row_id(columns)
