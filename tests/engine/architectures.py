"""Tiny random networks of many architectures, with weights large enough that a wrong mask or position shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers

WORDS = 211
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
WINDOW = {"sliding_window": 16}
# Class, settings. What each is here for: the plain kind, a window, soft-caps, logit scales, learned positions, rotary
# frequencies that change with the length, experts.
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}),
    "MistralForCausalLM": ("MistralConfig", WINDOW),
    "Gemma2ForCausalLM": ("Gemma2Config", dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, **WINDOW)),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", dict(head_dim=8, query_pre_attn_scalar=8, **WINDOW)),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.06}),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 16},
    ),
    "OPTForCausalLM": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Phi3ForCausalLM": ("Phi3Config", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
}
# ALiBi, recurrent layers, and both in one: no pack.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "MambaForCausalLM": ("MambaConfig", {"state_size": 4}),
    "JambaForCausalLM": ("JambaConfig", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "Lfm2ForCausalLM": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """What an Engine needs of a Model: the network, and a tokenizer that only knows the end."""
    config, settings = {**PACKED, **PLAIN}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(transformers, name)(getattr(transformers, config)(**{**SHAPE, **settings}))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    decode = lambda ids, **_: " ".join(map(str, ids))  # noqa: E731
    return SimpleNamespace(network=network.to(dtype).eval(), tokenizer=SimpleNamespace(eos_token_id=2, decode=decode))


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
