"""What the fast path knows of each family of decoders, and a network's description for it.

Nothing is guessed: a class, a configuration field, a module or a setting that is not known here is a reason to go through
transformers' modelling code instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fourscore.nf4 import NF4Linear, kernels

TYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
ROPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the sequence


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMMON = _names("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act head_dim
    max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings
    rope_parameters attention_bias attention_dropout quantization_config
""")
# Fields of published files that transformers' code of these families does not read.
UNREAD = _names("is_llama_config rope_interleaved transformers.js_config pretraining_tp unsloth_fixed unsloth_version _unsloth")
LAYERED = _names("use_sliding_window sliding_window max_window_layers layer_types")
GEMMA = LAYERED | _names("""
    hidden_activation query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping use_bidirectional_attention
    cache_implementation _sliding_window_pattern sliding_window_pattern rope_local_base_freq
""")


@dataclass(frozen=True)
class Family:
    """fields: of its configuration, beside the common ones. window: all layers have the configuration's (not by layer_types)."""

    package: str
    fields: frozenset[str] = frozenset()
    window: bool = False
    fused: bool = False  # one layer for q, k, v and one for gate, up
    gemma: bool = False  # norm weights count from 1, norms after each branch too, scaled embeddings
    caps: bool = False  # scores are capped


FAMILIES = {
    "LlamaForCausalLM": Family("llama", frozenset({"mlp_bias"})),
    "MistralForCausalLM": Family("mistral", frozenset({"sliding_window"}), window=True),
    "Qwen2ForCausalLM": Family("qwen2", LAYERED),
    "Qwen3ForCausalLM": Family("qwen3", LAYERED),
    "SmolLM3ForCausalLM": Family("smollm3", LAYERED | {"no_rope_layers", "no_rope_layer_interval", "mlp_bias"}),
    "Gemma2ForCausalLM": Family("gemma2", GEMMA, gemma=True, caps=True),
    "Gemma3ForCausalLM": Family("gemma3", GEMMA, gemma=True),
    "Phi3ForCausalLM": Family(
        "phi3", _names("resid_pdrop embd_pdrop original_max_position_embeddings sliding_window"), window=True, fused=True
    ),
}


@dataclass
class Block:
    """One layer: its linear layers by name, its norms (before and after attention and MLP, queries, keys), table and window."""

    linears: dict[str, nn.Linear]
    norms: list[nn.Module | None]
    rope: str | None
    window: int


@dataclass
class Description:
    """All that the decoder is built from; the modules stay the network's."""

    dtype: torch.dtype
    hidden: int
    heads: int
    groups: int
    width: int
    inner: int
    scale: float
    attention_cap: float
    logit_cap: float
    activation: int
    embedding: Tensor
    embedding_scale: float
    norm_offset: float  # added to norm weights; with it, norms round after the product only
    last: nn.Module
    head: nn.Linear
    limit: int
    blocks: list[Block] = field(default_factory=list)
    ropes: dict[str, tuple[Tensor, float]] = field(default_factory=dict)  # inverse frequencies, what cos and sin are multiplied with


def bare_network(model: Any) -> Any:
    """The CausalLM of a Model or network, out of PEFT's wrapping."""
    network = getattr(model, "network", model)
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def base_layer(module: nn.Module) -> nn.Module:
    """A linear layer out of its adapters'."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]


class _UnsupportedError(Exception):
    pass


def describe(model: Any) -> Description | str:
    """The description of a network, or the reason why the fast path does not run it."""
    try:
        return _describe(bare_network(model))
    except _UnsupportedError as reason:
        return str(reason)


def _require(condition: Any, reason: str) -> None:
    if not condition:
        raise _UnsupportedError(reason)


def _describe(network: Any) -> Description:
    name = type(network).__name__
    family = FAMILIES.get(name)
    if family is None or type(network).__module__ != f"transformers.models.{family.package}.modeling_{family.package}":
        raise _UnsupportedError(f"{name} is not among {', '.join(FAMILIES)}")
    _require(kernels.backend() != "torch", "the kernels are torch's")
    wrapped = [module for module in network.modules() if hasattr(module, "get_base_layer")]
    _require(all(w.disable_adapters and not w.merged for w in wrapped), "it carries an adapter, which the fast path does not apply")
    config = network.config
    unknown = config.to_dict().keys() - PreTrainedConfig().to_dict().keys() - COMMON - UNREAD - family.fields
    _require(not unknown, f"its configuration has fields that are not known here: {', '.join(sorted(unknown))}")
    _require(not getattr(config, "use_bidirectional_attention", None), "its attention is bidirectional")
    _require(family.caps or not getattr(config, "attn_logit_softcapping", None), "it names a cap for scores, which its code does not read")
    embedding, head, decoder = network.get_input_embeddings(), base_layer(network.get_output_embeddings()), network.model
    dtype = embedding.weight.dtype
    _require(dtype in TYPES, f"its hidden states are {dtype}")
    _require(embedding.weight.device.type == "cpu", f"it is on {embedding.weight.device}")
    _require(embedding.weight.is_contiguous(), "its embeddings are not contiguous")
    words = f"{name.removesuffix('ForCausalLM')}TextScaledWordEmbedding" if family.gemma else "Embedding"
    _require(type(embedding).__name__ == words, f"its embeddings are {type(embedding).__name__}")
    act = str(getattr(config, "hidden_activation" if family.gemma else "hidden_act", None))
    _require(act in ACTIVATIONS, f"its activation is {act}")
    attention = decoder.layers[0].self_attn
    described = Description(
        dtype=dtype,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        width=attention.head_dim,
        inner=config.intermediate_size,
        scale=float(attention.scaling),
        attention_cap=float(config.attn_logit_softcapping or 0) if family.caps else 0.0,
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0),
        activation=ACTIVATIONS[act],
        embedding=embedding.weight.detach(),
        embedding_scale=float(embedding.embed_scale.to(dtype)) if family.gemma else 1.0,
        norm_offset=1.0 if family.gemma else 0.0,
        last=decoder.norm,
        head=_linear(head, dtype, "lm_head"),
        limit=config.max_position_embeddings,
    )
    _require(head.out_features == embedding.weight.shape[0], "its head and its embeddings have different words")
    described.ropes = _ropes(decoder.rotary_emb, described.width)
    described.blocks = [_block(layer, config, family, described, i) for i, layer in enumerate(decoder.layers)]
    return described


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def _block(layer: Any, config: Any, family: Family, d: Description, number: int) -> Block:
    module = f"transformers.models.{family.package}.modeling_{family.package}"
    for part in (layer, layer.self_attn, layer.mlp):
        _require(type(part).__module__ == module, f"layer {number} has a {type(part).__name__} of another kind")
    parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    names = FUSED_NAMES if family.fused else NAMES
    known = {*names, "act_fn", "activation_fn", "q_norm", "k_norm"}
    odd = sorted((parts.keys() - known) | (set(names) - parts.keys()))
    _require(not odd, f"layer {number} is made of other parts: {', '.join(odd)}")
    linears = {name: _linear(base_layer(parts[name]), d.dtype, f"layer {number}'s {name}") for name in names}
    kind = config.layer_types[number] if getattr(config, "layer_types", None) else None
    _require(kind in (None, "full_attention", "sliding_attention"), f"layer {number} is of kind {kind}")
    slides = family.window if kind is None else kind == "sliding_attention"
    window = int(getattr(config, "sliding_window", None) or 0) if slides else 0
    if family.gemma:
        norms = [layer.input_layernorm, layer.post_attention_layernorm, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
    else:
        norms = [layer.input_layernorm, None, layer.post_attention_layernorm, None]
    rope: str | None = (kind or "") if (kind or "") in d.ropes else ""
    if getattr(layer.self_attn, "use_rope", 1) == 0:
        rope = None
    _require(rope is None or rope in d.ropes, f"layer {number} has no rotary frequencies")
    return Block(linears, [*norms, parts.get("q_norm"), parts.get("k_norm")], rope, window)


def _linear(layer: Any, dtype: torch.dtype, name: str) -> nn.Linear:
    if type(layer) is NF4Linear:
        _require(layer.compute_dtype in (None, dtype), f"{name} computes in {layer.compute_dtype}")
        return layer
    _require(type(layer) is nn.Linear, f"{name} is a {type(layer).__name__}")
    _require(layer.weight.dtype == dtype and layer.weight.is_contiguous(), f"{name} is {layer.weight.dtype}, the hidden states are {dtype}")
    return layer


def _ropes(rotary: Any, width: int) -> dict[str, tuple[Tensor, float]]:
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    found = {}
    for kind, rope_type in kinds.items():
        _require(rope_type in ROPES, f"its rotary frequencies are of kind {rope_type}")
        prefix = f"{kind}_" if kind else ""
        frequencies, scaling = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
        _require(2 * len(frequencies) <= width, "its rotary frequencies are more than half a head")
        found[kind] = (frequencies.float(), float(scaling))
    return found
