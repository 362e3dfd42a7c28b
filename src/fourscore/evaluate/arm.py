"""One arm of a study, measured: what it answers, how far it is from the reference, what it needs.

Every arm goes through the same functions with the same rendered questions; an arm is only a model to load, or none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from fourscore.data.prepare import trivial_answer
from fourscore.data.rows import Row, read_rows
from fourscore.data.template import end_of_turn, prompt_hash, render_prompt, render_row
from fourscore.evaluate.energy import cost_of_answers, read_tables
from fourscore.evaluate.fidelity import describe, divergence, load_top, store_top
from fourscore.evaluate.items import Item, Question, answered, constant, summary
from fourscore.evaluate.latency import Latency, measure_latency
from fourscore.evaluate.skills import read_skill
from fourscore.files import FourscoreError, read_jsonl, write_json, write_jsonl
from fourscore.machine import describe_machine, has_bf16, peak_rss_bytes, power
from fourscore.progress import track
from fourscore.spec import Study

if TYPE_CHECKING:
    from fourscore.engine import Engine, Generation
    from fourscore.model import Model

DESK = "desk"
REFERENCE = "base-16bit"
T = TypeVar("T")
WEIGHTS: dict[str, Literal["nf4", "bf16"]] = {REFERENCE: "bf16", "base-nf4": "nf4", "qlora": "nf4"}


@dataclass
class Clock:
    """Tokens and seconds of the bulk runs, for throughput."""

    score_tokens: int = 0
    score_seconds: float = 0.0
    new_tokens: int = 0
    generate_seconds: float = 0.0

    def to_json(self) -> dict[str, float | None]:
        """Tokens a second. Scored tokens: each prompt once, each choice once. New tokens: end of turn counted, over the
        whole call, so that computing the prompts is in the time."""
        return {
            "score_tokens_per_second": self.score_tokens / self.score_seconds if self.score_tokens else None,
            "generate_tokens_per_second": self.new_tokens / self.generate_seconds if self.new_tokens else None,
        }


def evaluate_arm(
    arm: str,
    seed: int | None,
    study: Study,
    base: Path,
    data: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    reference: Path | None = None,
    path: Literal["packed", "plain"] = "packed",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure one arm; writes out/items/<task>.jsonl, then out/measures.json, and returns the latter's content.

    arm: "trivial", "base-16bit", "base-nf4" or "qlora" (which needs `adapter`, a PEFT folder). base: a transformers directory.
    data: a prepared data folder. reference: the folder of the finished base-16bit arm, for fidelity; that arm itself also
    writes out/top.npz. limit: only so many items of each task, spread over all of them.
    path="plain" is the A/A floor: the same answers by the engine's other path, so only items are measured, and latency,
    energy and fidelity are null.
    """
    started = time.perf_counter()
    _check(arm, adapter)
    if study.threads:
        torch.set_num_threads(study.threads)
    rows = spread(read_rows(data, "evaluation"), limit)
    if not rows:
        raise FourscoreError(
            "no held-out item to evaluate", where=str(data), todo="give the study more rows, or a larger `split.evaluation`"
        )
    if arm == "trivial":
        measures = _trivial(read_rows(data, "train"), rows, base, out)
    else:
        measures = _measure_model(arm, study, rows, base, out, adapter, reference, path, limit)
    whole = {"arm": arm, "seed": seed, "path": path, "threads": torch.get_num_threads(), "peak_rss_bytes": peak_rss_bytes()}
    measures = {**whole, **measures, "seconds": time.perf_counter() - started}
    write_json(out / "measures.json", measures)
    return measures


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the rows at even distances, so that sorted rows give more than their first group; all where None."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _check(arm: str, adapter: Path | None) -> None:
    if arm != "trivial" and arm not in WEIGHTS:
        raise FourscoreError(f"no arm `{arm}`", todo=f"use one of: trivial, {', '.join(WEIGHTS)}")
    if (arm == "qlora") != (adapter is not None):
        raise FourscoreError(f"arm `{arm}` {'needs an' if arm == 'qlora' else 'takes no'} adapter", todo="check the call")


def _trivial(train: Sequence[Row], rows: Sequence[Row], base: Path, out: Path) -> dict[str, Any]:
    """The arm that always gives the most frequent training answer; it needs no model, only the tokenizer for the hashes."""
    from fourscore.model import load_tokenizer

    began = time.perf_counter()
    answer = best_constant(train)
    tokenizer = load_tokenizer(base)
    items = []
    for row in rows:
        rendered = render_row(tokenizer, row.messages, row.answer)
        key = prompt_hash(rendered.ids[: rendered.prompt_length])
        items.append(constant(DESK, row, key, answer, len(rendered.ids) - rendered.prompt_length))
    write_jsonl(out / "items" / f"{DESK}.jsonl", items)
    of_model = ("weights", "device", "peak_gpu_bytes", "disk_bytes", "adapter_bytes", "load_seconds", "compute_dtype")
    nothing = (*of_model, "latency", "energy", "fidelity")
    return {
        **dict.fromkeys(nothing),
        "throughput": Clock().to_json(),
        "tasks": {DESK: {**summary(items), "seconds": time.perf_counter() - began}},
        "kernels": "none",
        "trivial_answer": answer,
        "notes": ["kept skills: not answered by this arm, because they have no training rows to choose a constant answer on"],
    }


def best_constant(train: Sequence[Row]) -> str:
    """The most frequent answer of the training rows, by the rule of `check`."""
    if not train:
        raise FourscoreError("no training row to choose a constant answer on", todo="give the study more rows")
    return trivial_answer((row.answer for row in train), train[0].choices)


def _measure_model(
    arm: str,
    study: Study,
    rows: list[Row],
    base: Path,
    out: Path,
    adapter: Path | None,
    reference: Path | None,
    path: Literal["packed", "plain"],
    limit: int | None,
) -> dict[str, Any]:
    import peft  # noqa: F401  # with what it imports takes seconds, which are Python's and not the model's
    from transformers import AutoModelForCausalLM  # noqa: F401

    from fourscore.engine import Engine
    from fourscore.model.device import peak_gpu_bytes

    notes: list[str] = []
    began = time.perf_counter()
    model = _load(arm, study, base, adapter, notes)
    engine = Engine(model, path=path)
    load_seconds = time.perf_counter() - began

    clock = Clock()
    items: dict[str, list[Item]] = {}
    tasks: dict[str, Any] = {}
    began = time.perf_counter()
    desk = questions(DESK, rows, engine.tokenizer)
    items[DESK] = _ask(engine, desk, clock, arm, study.evaluate.max_new_tokens)
    tasks[DESK] = {**summary(items[DESK]), "seconds": time.perf_counter() - began}
    notes += _cut(tasks[DESK], study.evaluate.max_new_tokens)
    sources = {}
    for skill in study.evaluate.keep:
        began = time.perf_counter()
        read = read_skill(skill.task)
        sources[skill.task] = read.to_json()
        asked = questions(skill.task, spread(read.first(skill.items), limit), engine.tokenizer, per_byte=True)
        items[skill.task] = _ask(engine, asked, clock, arm, None)
        tasks[skill.task] = {**summary(items[skill.task]), "seconds": time.perf_counter() - began}
        notes += _near_chance(skill.task, tasks[skill.task])
    for task, answers in items.items():
        write_jsonl(out / "items" / f"{task}.jsonl", answers)

    fidelity = latency = energy = None
    if path == "packed":
        compared = [q.prompt + q.gold_ids for q in desk[: study.evaluate.fidelity_items]]
        fidelity = _fidelity(engine, arm, compared, items, out, reference)
        timed = measure_latency(engine, rows, study.evaluate.latency_prompts, study.evaluate.max_new_tokens, arm)
        latency, energy = timed.to_json(), _energy(timed, study, notes)
    else:
        notes.append("the A/A floor: latency, energy and fidelity are not measured on this path")
    if engine.path != path:
        notes.append(f"the engine cannot pack this network and ran path `{engine.path}`")
    return {
        "weights": WEIGHTS[arm],
        "device": str(model.network.device),
        "peak_gpu_bytes": peak_gpu_bytes(),
        "compute_dtype": str(model.network.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "disk_bytes": model.disk_bytes // 2 if model.weights == "f32" else model.disk_bytes,
        "adapter_bytes": sum(f.stat().st_size for f in adapter.rglob("*") if f.is_file()) if adapter else None,
        "load_seconds": load_seconds,
        "latency": latency,
        "throughput": clock.to_json(),
        "energy": energy,
        "tasks": tasks,
        "fidelity": fidelity,
        "kernels": _kernels(arm),
        "skills": sources,
        "notes": notes,
    }


def _cut(told: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Written answers that were cut may have been on their way to the right word; the reader must know."""
    if not told["unfinished"]:
        return []
    return [
        f"{told['unfinished']} of {told['items']} written answers were cut after {max_new_tokens} tokens and judged as far as they went"
    ]


def _near_chance(task: str, told: dict[str, Any]) -> list[str]:
    """A word of warning where a skill is within two standard errors of guessing: what is not there cannot be lost."""
    right, chance = told["accuracy_likelihood"], told["chance"]
    if right > chance + 2 * (chance * (1 - chance) / told["items"]) ** 0.5:
        return []
    return [f"{task}: {right:.1%} right where guessing scores {chance:.1%}: {told['items']} items show no skill here that could be lost"]


def _load(arm: str, study: Study, base: Path, adapter: Path | None, notes: list[str]) -> Model:
    from fourscore.model import load
    from fourscore.model.device import on_gpu

    weights: Literal["nf4", "bf16", "f32"] = WEIGHTS[arm]
    if weights == "bf16" and not has_bf16() and not on_gpu():
        # The same values; only the products are computed in f32, because bf16 would be emulated.
        weights = "f32"
        notes.append("this processor has no bf16: the 16-bit weights are computed in f32")
    return load(base, weights=weights, adapter=adapter, block_size=study.model.block_size, double_quant=study.model.double_quant)


def _kernels(arm: str) -> str:
    from fourscore.model.device import describe_device

    return describe_device()["kernels"] if WEIGHTS[arm] == "nf4" else "torch"


def questions(task: str, rows: Sequence[Row], tokenizer: Any, *, per_byte: bool = False) -> list[Question]:
    """Rows in tokens. per_byte: choices are compared by log-likelihood per byte of their text (kept skills).

    Then the text alone is scored, as lm-eval does: the end-of-turn token has no byte to be divided by. The desk's answers are
    scored whole, end of turn included, which is what is trained and what must be written for an answer to end.
    """
    asked = []
    for row in rows:
        answers = row.choices or [row.answer]
        if row.answer not in answers:
            raise FourscoreError(
                f"the answer {row.answer!r} is none of the choices", where=f"{task}, row {row.number}", todo="mend the row"
            )
        prompt = render_prompt(tokenizer, row.messages)
        ids = []
        for answer in answers:
            rendered = render_row(tokenizer, row.messages, answer)
            ids.append(rendered.ids[rendered.prompt_length : -1 if per_byte else None])
        lengths = [len(answer.encode()) for answer in answers] if per_byte else None
        asked.append(Question(task, row, prompt, prompt_hash(prompt), ids, answers.index(row.answer), lengths))
    return asked


def _ask(engine: Engine, asked: Sequence[Question], clock: Clock, arm: str, max_new_tokens: int | None) -> list[Item]:
    """Answer every question by likelihood, and in writing where `max_new_tokens` is given."""
    task = asked[0].task
    requests = [(q.prompt, ids) for q in asked for ids in q.continuations]
    with track(f"{arm}: {task}, likelihood", len(requests), "answers") as bar:
        began = time.perf_counter()
        scored = engine.score(requests, advance=bar.advance)
        clock.score_seconds += time.perf_counter() - began
        clock.score_tokens += sum(len(q.prompt) + sum(map(len, q.continuations)) for q in asked)
    logliks = iter(scored)
    by_question = [[next(logliks)[0] for _ in q.continuations] for q in asked]
    if max_new_tokens is None:
        return [answered(q, values, None) for q, values in zip(asked, by_question, strict=True)]
    written = _write(engine, asked, clock, f"{arm}: {task}, written", max_new_tokens)
    return [answered(q, values, g.text, g.finish_reason == "stop") for q, values, g in zip(asked, by_question, written, strict=True)]


def _write(engine: Engine, asked: Sequence[Question], clock: Clock, title: str, max_new_tokens: int) -> list[Generation]:
    """Greedy answers. On the plain path each prompt is a call of its own, so that the floor also sees what batching does."""
    stops = [end_of_turn(engine.tokenizer)]
    prompts = [q.prompt for q in asked]
    calls = [[p] for p in prompts] if engine.path == "plain" else [prompts]
    written: list[Generation] = []
    with track(title, len(prompts), "answers") as bar:
        began = time.perf_counter()
        for call in calls:
            written += engine.generate(call, max_new_tokens, stop_ids=stops, advance=bar.advance)
        clock.generate_seconds += time.perf_counter() - began
    clock.new_tokens += sum(len(g.ids) + (g.finish_reason == "stop") for g in written)
    return written


def _fidelity(
    engine: Engine, arm: str, sequences: list[list[int]], items: dict[str, list[Item]], out: Path, reference: Path | None
) -> dict[str, Any] | None:
    """The reference stores its distributions; the others are compared with them."""
    if arm != REFERENCE and reference is None:
        return None
    with track(f"{arm}: fidelity", len(sequences), "sequences") as bar:

        def counted() -> Any:
            for distribution in engine.logprobs(sequences):
                yield distribution.cpu()
                bar.advance()

        if reference is None or arm == REFERENCE:
            store_top(sequences, counted()).save(out / "top.npz")
            return None
        kl, same = divergence(load_top(reference / "top.npz"), sequences, counted())
    known = {task: read_jsonl(reference / "items" / f"{task}.jsonl") for task in items}
    return describe(kl, same, items, known)


def _energy(timed: Latency, study: Study, notes: list[str]) -> dict[str, Any] | None:
    from fourscore.model.device import on_gpu

    if on_gpu() and study.cost.watts is None:
        notes.append("electricity: what the GPU draws is not read; give the reading of a wall meter as `cost.watts`")
        return None
    machine, tables = describe_machine(), read_tables()
    drawn = power(study.cost.watts, machine, measured_watts=timed.watts, threads=torch.get_num_threads(), tdp=tables.tdp)
    return cost_of_answers(drawn, timed.answer_seconds, study.cost, tables)
