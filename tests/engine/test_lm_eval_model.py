"""lm-eval gets the same numbers from EngineLM as from its own HFLM, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fourscore.engine import Engine
from fourscore.evaluate.lm_eval_model import EngineLM
from fourscore.evaluate.skills import read_skill
from fourscore.files import FourscoreError
from fourscore.model import Model

COLOURS = ["red", "green", "dark blue"]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **settings}))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"What colour is fruit {n}? " * (1 + n % 3), "gold": n % 3} for n in range(9)]
    write_task(
        tmp_path,
        "local_choice",
        rows,
        output_type="multiple_choice",
        doc_to_text="Question: {{q}}\nAnswer:",
        doc_to_target="gold",
        doc_to_choice=COLOURS,
    )
    texts = [{"text": " ".join(f"The shop at number {n * k} opens at {k}." for k in range(1, 3 + 3 * n))} for n in range(4)]
    write_task(
        tmp_path,
        "local_rolling",
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        tmp_path,
        "local_writing",
        [{"q": f"Count from {n}: {n},", "a": str(n + 1)} for n in range(5)],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n", " 7"], "max_gen_toks": 10, "do_sample": False},
    )
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def run(lm: Any, tasks: TaskManager, names: list[str], **settings: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True, **settings)
    assert found is not None
    return found


def answers(found: dict[str, Any], name: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("chat", [False, True])
def test_local_tasks_agree_with_hflm(tiny: Model, tasks: TaskManager, chat: bool) -> None:
    names = ["local_choice", "local_rolling", "local_writing"]
    ours = run(EngineLM(Engine(tiny)), tasks, names, apply_chat_template=chat)
    theirs = run(HFLM(pretrained=tiny.network, tokenizer=tiny.tokenizer, batch_size=4), tasks, names, apply_chat_template=chat)
    for a, b in zip(answers(ours, "local_choice"), answers(theirs, "local_choice"), strict=True):
        assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
        assert [likelihood for likelihood, _ in a] == pytest.approx([likelihood for likelihood, _ in b], abs=1e-3)
    assert answers(ours, "local_writing") == answers(theirs, "local_writing")
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4)


def test_smollm2_piqa_agrees_with_hflm(smol: Model) -> None:
    """Two dozen rows in lm-eval's own wording of PIQA, and what the model writes after some of them."""
    rows = read_skill("piqa").first(24)
    contexts = [f"Question: {row.messages[0]['content'][0]['text']}\nAnswer:" for row in rows]
    asked = [instance("loglikelihood", (c, f" {choice}")) for c, row in zip(contexts, rows, strict=True) for choice in row.choices]
    ours, theirs = EngineLM(Engine(smol)), HFLM(pretrained=smol.network, tokenizer=smol.tokenizer, batch_size=8)
    a, b = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-3)
    assert [g for _, g in a] == [g for _, g in b]
    assert [a[i][0] > a[i + 1][0] for i in range(0, len(a), 2)] == [b[i][0] > b[i + 1][0] for i in range(0, len(b), 2)]
    written = [instance("generate_until", (c, {"until": [".", "\n\n"], "max_gen_toks": 16})) for c in contexts[:6]]
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


def instance(kind: Any, arguments: tuple[Any, ...]) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_long_texts_roll_through_windows_as_in_hflm(tiny: Model) -> None:
    text = [instance("loglikelihood_rolling", ("many words of one long text " * 40,)), instance("loglikelihood_rolling", ("",))]
    ours, theirs = EngineLM(Engine(tiny), max_length=32), HFLM(pretrained=tiny.network, tokenizer=tiny.tokenizer, max_length=32)
    assert ours.loglikelihood_rolling(text) == pytest.approx(theirs.loglikelihood_rolling(text, disable_tqdm=True), abs=1e-2)


def test_an_empty_context_is_the_first_token_as_in_hflm(tiny: Model) -> None:
    asked = [instance("loglikelihood", ("", "A text by itself.")), instance("loglikelihood", ("Ends in a space ", "here"))]
    ours, theirs = EngineLM(Engine(tiny)), HFLM(pretrained=tiny.network, tokenizer=tiny.tokenizer)
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    for a, b in zip(ours.loglikelihood(asked, disable_tqdm=True), want, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_settings_that_are_not_read_are_errors(tiny: Model) -> None:
    lm = EngineLM(Engine(tiny))
    for settings, said in (
        ({"do_sample": True, "temperature": 1.0, "top_k": 5}, "`top_k: 5` is not supported"),
        ({"num_beams": 4}, "`num_beams: 4` is not supported"),
        ({"do_sample": True}, "do_sample without a temperature"),
        ({"colour": "red"}, "`colour: red` is not supported"),
    ):
        with pytest.raises(FourscoreError, match=said):
            lm.generate_until([instance("generate_until", ("Hello", {"max_gen_toks": 2, **settings}))])
    sampled = instance("generate_until", ("Hello", {"max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "until": ["x"]}))
    assert lm.generate_until([sampled]) == lm.generate_until([sampled])


def test_nothing_is_cut_to_fit(tiny: Model) -> None:
    lm = EngineLM(Engine(tiny))
    with pytest.raises(FourscoreError, match="and the model takes 512"):
        lm.loglikelihood([instance("loglikelihood", ("word " * 600, "end"))], disable_tqdm=True)
    with pytest.raises(FourscoreError, match="and the model takes 512"):
        lm.generate_until([instance("generate_until", ("word " * 500, {"max_gen_toks": 100}))])
