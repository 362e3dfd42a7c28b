"""Scores are transformers' own, whatever is packed with what."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from architectures import PACKED, PLAIN, build, random_ids

from fourscore.engine import Engine
from fourscore.evaluate.skills import read_skill
from fourscore.files import FourscoreError
from fourscore.model import Model, load

Request = tuple[list[int], list[int]]


def reference(network: Any, requests: list[Request]) -> list[tuple[float, bool]]:
    """By the definition: one sequence a forward call, log_softmax over all logits, nothing shared or left out."""
    results = []
    for context, continuation in requests:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([(context + continuation)[:-1]])).logits[0, len(context) - 1 :]
        chosen = torch.log_softmax(logits.float(), -1)[range(len(continuation)), continuation]
        results.append((float(chosen.sum()), logits.argmax(-1).tolist() == continuation))
    return results


def worst(a: list[tuple[float, bool]], b: list[tuple[float, bool]], requests: list[Request]) -> float:
    """The largest difference per token, in nats."""
    return max(abs(x[0] - y[0]) / len(r[1]) for x, y, r in zip(a, b, requests, strict=True))


def some_requests() -> list[Request]:
    """Choices of one, four and six tokens after contexts of several lengths, one longer than the windows here, one alone."""
    ids = random_ids(300)
    contexts = [ids[k * 20 : k * 20 + 6 + 7 * k] for k in range(5)]
    requests = [(c, ids[200 + 9 * k + n : 200 + 9 * k + 2 * n]) for k, c in enumerate(contexts) for n in (1, 4, 6)]
    shared = ids[240:254]
    requests += [([*shared, *ids[260 + n : 261 + n]], [n + 5]) for n in range(30)]  # more than any window here, below one beginning
    return [*requests, (ids[100:103], ids[103:140]), (ids[:1], ids[1:2])]


def piqa(model: Model, items: int) -> list[Request]:
    encode = model.tokenizer.encode
    rows = read_skill("piqa").first(items)
    return [(encode(f"Question: {row.messages[0]['content'][0]['text']}\nAnswer:"), encode(f" {c}")) for row in rows for c in row.choices]


@pytest.mark.parametrize("name", PACKED)
def test_packed_architectures_equal_transformers(name: str) -> None:
    model, requests = build(name), some_requests()
    engine = Engine(model, pack_tokens=60)
    assert engine.path == "packed"
    assert worst(engine.score(requests), reference(model.network, requests), requests) < 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_an_architecture_that_cannot_be_packed_runs_plain_and_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, requests = build(name), some_requests()
    engine = Engine(model)
    assert engine.path == "plain"
    assert capsys.readouterr().err.count("every sequence is computed by itself") == 1
    assert worst(engine.score(requests), reference(model.network, requests), requests) < 1e-4


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM"])
def test_the_trial_is_not_fooled_by_sixteen_bits(name: str) -> None:
    assert Engine(build(name, torch.bfloat16)).path == "plain"


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_the_trial_lets_sixteen_bits_be_packed(name: str) -> None:
    assert Engine(build(name, torch.bfloat16)).path == "packed"


def test_smollm2_in_f32_both_paths_equal_transformers(smol: Model) -> None:
    requests = piqa(smol, 8)
    packed, plain = Engine(smol).score(requests), Engine(smol, path="plain").score(requests)
    want = reference(smol.network, requests)
    assert worst(packed, want, requests) < 1e-4
    assert worst(plain, want, requests) < 1e-4
    assert [g for _, g in packed] == [g for _, g in plain] == [g for _, g in want]


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_smollm2_in_fewer_bits_differs_by_rounding(smollm2: Any, weights: Any) -> None:
    """The two paths do not give the same bits in bf16. What is known of the difference: small on average, no bias."""
    model = load(str(smollm2), weights=weights)
    requests = piqa(model, 8)
    packed, plain = Engine(model).score(requests), Engine(model, path="plain").score(requests)
    tokens = sum(len(r[1]) for r in requests)
    assert sum(abs(a[0] - b[0]) for a, b in zip(packed, plain, strict=True)) / tokens < 0.05
    assert abs(sum(a[0] - b[0] for a, b in zip(packed, plain, strict=True))) / tokens < 0.02


def test_results_come_in_the_order_of_the_requests(tiny: Model) -> None:
    requests = some_requests() * 2
    engine = Engine(tiny)
    want = engine.score(requests)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    assert worst(engine.score([requests[i] for i in order]), [want[i] for i in order], [requests[i] for i in order]) < 1e-4


def test_the_likeliest_continuation_is_greedy_and_another_is_not(tiny: Model) -> None:
    engine = Engine(tiny)
    context = random_ids(9)
    (best,) = engine.generate([context], max_new_tokens=5)
    other = [*best.ids[:-1], best.ids[-1] + 1]
    assert [greedy for _, greedy in engine.score([(context, best.ids), (context, other)])] == [True, False]


def test_logprobs_are_the_whole_distributions(tiny: Model) -> None:
    sequences = [random_ids(n, seed=n) for n in (30, 5, 12)]
    starts = [1, 3, 11]
    for path in ("packed", "plain"):
        got = list(Engine(tiny, path=path).logprobs(sequences, starts))
        for rows, sequence, start in zip(got, sequences, starts, strict=True):
            with torch.no_grad():
                want = torch.log_softmax(tiny.network(torch.tensor([sequence])).logits[0, start - 1 : -1].float(), -1)
            torch.testing.assert_close(rows, want, atol=1e-4, rtol=0)


def test_what_cannot_be_scored_is_an_error(tiny: Model) -> None:
    engine = Engine(tiny)
    for request, said in (([5], []), "request 0: an empty continuation"), (([], [5]), "request 0: an empty context"):
        with pytest.raises(FourscoreError, match=said):
            engine.score([request])
    longest = [5] * 512
    engine.score([(longest, [6])])  # 512 tokens go in: the last token is predicted, not read
    with pytest.raises(FourscoreError, match="513 tokens, and the model takes 512"):
        engine.score([(longest, [6, 7])])


def test_a_model_in_training_is_left_in_training(tiny: Model) -> None:
    tiny.network.train()
    try:
        Engine(tiny).score([([5], [6])])
        assert tiny.network.training
    finally:
        tiny.network.eval()
