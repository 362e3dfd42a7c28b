"""What a request may ask of its answer means what it means in transformers."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
import torch
from architectures import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fourscore.engine import Engine, Sampling
from fourscore.engine.sampling import Sampler, cut, penalised
from fourscore.files import FourscoreError
from fourscore.model import Model


def logits_of(seed: int, words: int, spread: float) -> torch.Tensor:
    return torch.randn(words, generator=torch.Generator().manual_seed(seed)).double() * spread


@given(
    st.integers(0, 10**6),
    st.integers(2, 300),
    st.sampled_from([0.3, 3.0, 12.0]),
    st.floats(0.05, 5),
    st.one_of(st.none(), st.integers(1, 400)),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.3, 3),
)
@settings(max_examples=300, deadline=None)
def test_cuts_and_penalty_are_those_of_transformers(
    seed: int, words: int, spread: float, temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float
) -> None:
    logits = logits_of(seed, words, spread)
    seen = torch.randint(0, words, (7,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k is not None else []
    theirs += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    want = theirs(torch.tensor([seen]), logits[None].clone())[0]
    asked = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    words, left = cut(penalised(logits, sorted(set(seen)), penalty), asked)
    got = left if words is None else torch.full_like(logits, -math.inf).index_copy(0, words, left)
    torch.testing.assert_close(got, want)


def test_draws_follow_the_cut_distribution() -> None:
    """4,000 draws against softmax: each word's share within four standard deviations, and nothing from outside of the cut."""
    logits = logits_of(3, 12, 1.5).float()
    asked = Sampling(temperature=0.8, top_k=6, max_new_tokens=1)
    likeliest = logits.topk(6).indices
    expected = torch.zeros(12).index_copy(0, likeliest, torch.softmax(logits[likeliest] / 0.8, -1))
    sampler = Sampler(asked, [1, 2, 3])
    draws = torch.tensor([sampler.pick(logits) for _ in range(4000)]).bincount(minlength=12) / 4000
    assert bool(((draws - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all())


def test_a_penalty_falls_on_the_prompt_and_on_what_was_written(tiny: Model) -> None:
    prompt = random_ids(8)
    (plain,) = Engine(tiny).generate([prompt], max_new_tokens=8)
    network: Any = tiny.network
    theirs = network.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.8, pad_token_id=0, attention_mask=torch.ones(1, 8)
    )
    engine = Engine(tiny)
    got = [i for piece in engine.submit(prompt, Sampling(max_new_tokens=8, repetition_penalty=1.8)) for i in piece.ids]
    assert got == theirs[0, 8:].tolist()
    assert got != plain.ids


def test_logprobs_are_the_scores_of_the_chosen_tokens(tiny: Model) -> None:
    engine, prompt = Engine(tiny), random_ids(9)
    pieces = list(engine.submit(prompt, Sampling(max_new_tokens=6, temperature=2.0, repetition_penalty=1.3, logprobs=3)))
    reports = [report for piece in pieces for report in piece.logprobs or ()]
    ids = [i for piece in pieces for i in piece.ids]
    assert [report.id for report in reports] == ids
    (rows,) = engine.logprobs([prompt + ids], starts=[len(prompt)])
    for report, row in zip(reports, rows, strict=True):
        assert report.logprob == pytest.approx(float(row[report.id]), abs=1e-4)
        assert [i for i, _ in report.top] == row.topk(3).indices.tolist()
        assert [p for _, p in report.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert sum(report.logprob for report in reports) == pytest.approx(engine.score([(prompt, ids)])[0][0], abs=1e-3)


SCHEMA = {
    "type": "object",
    "properties": {"day": {"enum": ["Monday", "Tuesday"]}, "open": {"type": "boolean"}, "hour": {"type": "integer"}},
    "required": ["day", "open", "hour"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_schema_beside_one_that_is_free(smol: Model) -> None:
    engine = Engine(smol)
    ids = smol.tokenizer.apply_chat_template(
        [{"role": "user", "content": "When is the shop open?"}], add_generation_prompt=True, return_dict=False
    )
    bound = [engine.submit(ids, Sampling(max_new_tokens=80, temperature=1.0, seed=n, schema=SCHEMA)) for n in range(2)]
    free = engine.submit(ids, Sampling(max_new_tokens=5))
    for stream in bound:
        jsonschema.validate(json.loads(stream.text()), SCHEMA)
        assert stream.finish_reason == "stop"
    assert free.text() == engine.generate([ids], max_new_tokens=5)[0].text


def test_a_schema_that_cannot_be_followed_is_an_error_at_once(smol: Model) -> None:
    for schema in ({"type": "colour"}, {"type": "object", "properties": {"a": 5}}):
        with pytest.raises(FourscoreError, match="schema"):
            Engine(smol).submit([5, 6], Sampling(schema=schema))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"stop": "end"},
        {"stop": ("",)},
        {"stop_ids": ("a",)},
        {"logprobs": -1},
        {"seed": 1.5},
        {"schema": "{}"},
    ],
)
def test_settings_out_of_their_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(FourscoreError, match=f"sampling: `{next(iter(bad))}` is"):
        Sampling(**bad)
