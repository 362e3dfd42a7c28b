"""The fast path: equal to transformers' code for every family, and a request's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import SHAPE, WORDS, build, random_ids

from fourscore import nf4
from fourscore.engine.fast import FastRunner, supported
from fourscore.files import FourscoreError
from fourscore.model import Model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
BIASED = {"attention_bias": True, "mlp_bias": True}

# Class, settings: windows, tied and separate heads, biases, scalings of the frequencies, caps, heads of odd sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {**BIASED, "tie_word_embeddings": True}),
    "llama, heads of 24, one key head": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, a key head for each": ("Llama", {"num_key_value_heads": 4}),
    "mistral, window": ("Mistral", {"sliding_window": 16}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window in one layer": ("Qwen2", SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "smollm3, a layer without positions": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "smollm3, window": ("SmolLM3", {"no_rope_layers": [0, 1], **SLIDING, "mlp_bias": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**GEMMA, "final_logit_softcapping": 3.0}),
    "phi3, window": ("Phi3", {"sliding_window": 16}),
    "phi3, part of a head turned": ("Phi3", {"rope_parameters": PARTIAL, "tie_word_embeddings": True}),
}


def network_of(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    family, settings = FAMILIES[name]
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**SHAPE, **settings, **more})
        network = getattr(transformers, f"{family}ForCausalLM")(made)
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(4)
            else:
                torch.nn.init.normal_(parameter, parameter.data.mean().item(), 0.3)  # biases and norms that matter
    network.config._attn_implementation = "eager"  # transformers' own definition, caps included
    return network.to(dtype).eval()


def plain(network: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return network(torch.tensor([ids]), use_cache=False).logits[0].float()


def whole(runner: FastRunner, ids: list[int], adapter: str | None = None) -> torch.Tensor:
    cache = runner.new()
    (logits,) = runner.extend([(cache, ids, len(ids), adapter)])
    runner.free(cache)
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_network_of_each_family_gives_the_logits_of_transformers(name: str) -> None:
    network = network_of(name)
    assert supported(network) is None
    runner = FastRunner(network)
    for length in (1, 15, 100):
        ids = random_ids(length, seed=length)
        torch.testing.assert_close(whole(runner, ids), plain(network, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["f32", "bf16", "nf4"])
def test_bits_depend_on_the_own_tokens_alone(name: str, form: str) -> None:
    """Other cuts, other requests beside, forks from a longer sequence, another number of threads: torch.equal."""
    network = network_of(name, torch.float32 if form == "f32" else torch.bfloat16)
    if form == "nf4":
        nf4.replace_linears(network)
    runner = FastRunner(network)
    ids, other = random_ids(90), random_ids(77, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = whole(runner, ids)
        torch.set_num_threads(3)
        assert torch.equal(whole(runner, ids), want)
        for cuts in ([33, 34, 90], [1, 2, 3, 19, 20, 82, 90]):
            cache, beside = runner.new(), runner.new()
            start = 0
            for i, end in enumerate(cuts):
                piece = other[10 * i : 10 * i + 3 + 5 * i]
                neighbour = (beside, piece, 1, None)
                mine = (cache, ids[start:end], end - start, None)
                got = runner.extend([neighbour, mine] if i % 2 else [mine, neighbour])[i % 2]
                assert torch.equal(got, want[start:end])
                start = end
            # Another end after 50 shared tokens, then the same end again.
            fork = runner.fork(cache, 50)
            runner.extend([(fork, other[:9], 0, None)])
            again = runner.fork(fork, 50)
            assert torch.equal(runner.extend([(again, ids[50:], 40, None)])[0], want[50:])
            for used in (cache, beside, fork, again):
                runner.free(used)
        assert runner.pages.used == 0
    finally:
        torch.set_num_threads(before)


PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n",
    "1, 1, 2, 3, 5, 8,",
    "The main difference between a virus and a bacterium is",
    "Q: How many legs does a spider have?\nA:",
]


def test_smollm2_greedy_in_f32_is_token_for_token_that_of_transformers(smol: Model) -> None:
    """All prompts in one batch here, one after another there."""
    runner = FastRunner(smol)
    prompts = [smol.tokenizer(p)["input_ids"] for p in PROMPTS]
    caches = [runner.new() for _ in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    logits = runner.extend([(c, p, 1, None) for c, p in zip(caches, prompts, strict=True)])
    for _ in range(16):
        for got, row in zip(new, logits, strict=True):
            got.append(int(row[0].argmax()))
        logits = runner.extend([(c, n[-1:], 1, None) for c, n in zip(caches, new, strict=True)])
    for prompt, got in zip(prompts, new, strict=True):
        with torch.inference_mode():
            out = smol.network.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        assert out[0, len(prompt) :].tolist() == got


def test_a_full_cache_and_a_too_long_text_change_nothing() -> None:
    runner = FastRunner(network_of("llama"), cache_bytes=0)
    with pytest.raises(FourscoreError, match="cache is full: 1 more pages are needed, 0 of 0 are left"):
        runner.extend([(runner.new(), [5], 1, None)])
    size = runner.pages.size
    runner = FastRunner(network_of("llama"), cache_bytes=3 * size)
    first, second = runner.new(), runner.new()
    runner.extend([(first, random_ids(20), 0, None)])
    assert (runner.pages.used, runner.pages.free) == (2, 1)
    with pytest.raises(FourscoreError, match="cache is full"):
        runner.extend([(second, random_ids(10), 0, None), (first, random_ids(13), 0, None)])
    assert (first.length, second.length, runner.pages.used) == (20, 0, 2)
    with pytest.raises(FourscoreError, match="129 tokens are more than the model's 128"):
        runner.extend([(first, random_ids(109), 0, None)])
    for wrong in ([], [WORDS], [-1]):
        with pytest.raises(FourscoreError):
            runner.extend([(first, wrong, 0, None)])
    with pytest.raises(FourscoreError, match="one cache stands in two"):
        runner.extend([(first, [5], 0, None), (first, [6], 0, None)])
    assert torch.equal(runner.extend([(first, [7], 1, None)])[0], whole(FastRunner(network_of("llama")), [*random_ids(20), 7])[-1:])


def test_forks_share_full_pages() -> None:
    runner = FastRunner(network_of("llama"))
    cache = runner.new()
    runner.extend([(cache, random_ids(50), 0, None)])
    forks = [runner.fork(cache, 50) for _ in range(5)]
    assert runner.pages.used == 4 + 5  # four pages; each fork has its own copy of the last one, which is not full
    runner.free(cache)
    assert runner.pages.used == 3 + 5
    for fork in forks:
        runner.free(fork)
    assert runner.pages.used == 0


def changed(**settings: Any) -> Any:
    network = network_of("llama")
    for key, value in settings.items():
        setattr(network.config, key, value)
    return network


def test_what_is_not_known_is_named() -> None:
    assert "GPT2LMHeadModel is not among" in str(supported(build("GPT2LMHeadModel").network))
    assert "longrope" in str(supported(build("Phi3ForCausalLM").network))
    assert "fields that are not known here: residual_multiplier" in str(supported(changed(residual_multiplier=0.5)))
    assert "activation is relu" in str(supported(changed(hidden_act="relu")))
    assert "float16" in str(supported(network_of("llama", torch.float16)))
    odd = network_of("llama")
    odd.model.layers[1].self_attn.extra_norm = torch.nn.LayerNorm(8)
    assert "layer 1 is made of other parts: extra_norm" in str(supported(odd))
    odd = network_of("llama")
    odd.model.layers[0].mlp.up_proj = torch.nn.Identity()
    assert "layer 0's up_proj is a Identity" in str(supported(odd))
    with pytest.raises(FourscoreError, match="the fast path does not run this model: MixtralForCausalLM"):
        FastRunner(build("MixtralForCausalLM"))


def test_an_adapter_is_never_left_out_silently() -> None:
    peft = pytest.importorskip("peft")
    network = network_of("llama")
    want = whole(FastRunner(network), random_ids(20))
    wrapped = peft.get_peft_model(network, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert "carries an adapter" in str(supported(wrapped))
    wrapped.base_model.disable_adapter_layers()
    assert torch.equal(whole(FastRunner(wrapped), random_ids(20)), want)
