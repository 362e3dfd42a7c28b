"""Generated tokens are transformers' own, whoever shares the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from architectures import PACKED, PLAIN, build, random_ids

from fourscore.engine import Engine
from fourscore.evaluate.skills import read_skill
from fourscore.files import FourscoreError
from fourscore.model import Model


def by_transformers(network: Any, prompt: list[int], tokens: int, ends: set[int]) -> list[int]:
    inputs = torch.tensor([prompt])
    out = network.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    new = out[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] in ends else new


def test_greedy_smollm2_writes_what_transformers_writes_in_any_order(smol: Model) -> None:
    template = smol.tokenizer.apply_chat_template
    texts = [row.messages[0]["content"][0]["text"] for row in read_skill("piqa").first(20)]
    prompts = [template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False) for t in texts]
    engine = Engine(smol)
    answers = engine.generate(prompts, max_new_tokens=8)
    assert [a.ids for a in answers] == [by_transformers(smol.network, p, 8, engine.stop_ids) for p in prompts]
    assert engine.generate(prompts[::-1], max_new_tokens=8) == answers[::-1]
    assert [a.text for a in answers] == [smol.tokenizer.decode(a.ids) for a in answers]


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_every_architecture_generates_as_in_transformers(name: str) -> None:
    model = build(name)
    engine = Engine(model)
    ids = random_ids(100)
    prompts = [ids[:5], ids[7:19], ids[20:50], ids[3:7]]  # the third is longer than the windows here
    want = [by_transformers(model.network, p, 8, engine.stop_ids) for p in prompts]
    assert [a.ids for a in engine.generate(prompts, max_new_tokens=8)] == want


def test_it_stops_at_stop_ids_and_says_why(tiny: Model) -> None:
    engine = Engine(tiny)
    prompt = random_ids(9)
    (free,) = engine.generate([prompt], max_new_tokens=6)
    assert (len(free.ids), free.finish_reason) == (6, "length")
    third = free.ids[2]
    (stopped, other) = engine.generate([prompt, random_ids(4, seed=1)], max_new_tokens=6, stop_ids=[third])
    assert stopped.ids == free.ids[: free.ids.index(third)]
    assert stopped.finish_reason == "stop"
    assert len(other.ids) == 6


def test_the_models_own_end_tokens_stop_it(tiny: Model) -> None:
    prompt = random_ids(9)
    (free,) = Engine(tiny).generate([prompt], max_new_tokens=6)
    ends = tiny.network.generation_config.eos_token_id
    tiny.network.generation_config.eos_token_id = [free.ids[3], 7]
    try:
        (stopped,) = Engine(tiny).generate([prompt], max_new_tokens=6)
    finally:
        tiny.network.generation_config.eos_token_id = ends
    assert stopped.ids == free.ids[: free.ids.index(free.ids[3])]
    assert stopped.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_it(smol: Model) -> None:
    engine = Engine(smol)
    prompt = smol.tokenizer.encode("One, two, three,")
    (free,) = engine.generate([prompt], max_new_tokens=12)
    stop = free.text[6:9]  # wherever the tokens begin and end
    (stopped,) = engine.generate([prompt], max_new_tokens=12, stop_strings=[stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.ids) < 12


def test_sampling_is_seeded_and_independent_of_the_neighbours(tiny: Model) -> None:
    engine = Engine(tiny)
    prompts = [random_ids(n, seed=n) for n in (4, 9, 10, 15)]

    def draw(some: list[list[int]], seed: int) -> list[list[int]]:
        return [a.ids for a in engine.generate(some, max_new_tokens=6, temperature=1.0, seed=seed)]

    first = draw(prompts, 1)
    assert draw(prompts, 1) == first
    assert draw(prompts[::-1], 1) == first[::-1]
    assert draw(prompts[1:2], 1) == first[1:2]
    assert draw(prompts, 2) != first
    assert len({tuple(ids) for ids in draw([prompts[0]] * 4, 1)}) > 1  # equal prompts are asked again, not copied


def test_sampling_follows_the_distribution() -> None:
    """400 draws of one token against softmax(logits / T): a G-test of the ten likeliest words stays in its usual range."""
    engine = Engine(build("Qwen3ForCausalLM"))
    prompt = random_ids(6)
    (row,) = engine.logprobs([[*prompt, 3]], starts=[6])
    expected = torch.softmax(row[0] / 0.7, -1)
    draws = Counter(a.ids[0] for a in engine.generate([prompt] * 400, max_new_tokens=1, temperature=0.7, stop_ids=[]) if a.ids)
    for word in expected.topk(10).indices.tolist():
        p = float(expected[word])
        assert abs(draws[word] / 400 - p) < 4 * (p * (1 - p) / 400) ** 0.5 + 1e-9


def test_prefill_and_step_are_generate_one_token_at_a_time(tiny: Model) -> None:
    for model in (tiny, build("MambaForCausalLM"), build("Phi3ForCausalLM")):
        engine = Engine(model)
        prompt = random_ids(12)
        state = engine.prefill(prompt)
        ids = [state.next_id, *(engine.step(state) for _ in range(7))]
        assert ids == by_transformers(model.network, prompt, 8, set())
        assert state.ids == prompt + ids[:-1]


def test_a_prompt_that_leaves_no_room_is_an_error(tiny: Model) -> None:
    engine = Engine(tiny)
    with pytest.raises(FourscoreError, match="prompt 1: 520 tokens, and the model takes 512"):
        engine.generate([[5], [5] * 510], max_new_tokens=10)
    with pytest.raises(FourscoreError, match="prompt 0: an empty prompt"):
        engine.generate([[]])
    assert engine.generate([]) == []
