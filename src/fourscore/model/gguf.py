"""From a GGUF file to a transformers directory: dense 16-bit weights, configuration, tokenizer.

The reader and the three block formats are written here from the format's description (docs/gguf.md and ggml-common.h of
llama.cpp), because transformers 5.23 takes half a minute for this file and rebuilds another pre-tokenizer than the model
was trained with. Only what has been checked against a published original is converted; the rest is an error with its name.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError

# value types of the metadata: struct codes by type number; 8 is a string, 9 an array
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# tensor types: name, weights in a block, bytes of a block
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}
_CONTROL = 3  # token type: special


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: shape as torch has it (rows first), offset from the start of the file, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A GGUF file in memory: its metadata and the places of its tensors."""

    data: bytes
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_gguf(data: bytes, where: str = "GGUF file") -> GGUF:
    """Parse metadata and tensor table of a version 2 or 3 file. Errors: FourscoreError when damaged or of an unknown kind."""
    try:
        return _parse(data, where)
    except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
        raise FourscoreError(f"damaged GGUF file ({error})", where=where, todo="fetch it again") from None


def _parse(data: bytes, where: str) -> GGUF:
    if data[:4] != b"GGUF":
        raise FourscoreError("no GGUF file (the first four bytes are not GGUF)", where=where, todo="check the file")
    version, tensor_count, pair_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise FourscoreError(f"GGUF version {version} is not read here", where=where, todo="convert it to version 3")
    position = 24

    def plain(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, data, position)
        position += struct.calcsize("<" + code)
        return value

    def string() -> str:
        nonlocal position
        length = plain("Q")
        text = data[position : position + length].decode("utf-8")
        position += length
        return text

    def value(kind: int) -> Any:
        if kind == 8:
            return string()
        if kind == 9:
            of, count = plain("I"), plain("Q")
            return [value(of) for _ in range(count)]
        return plain(_PLAIN[kind])

    metadata = {}
    for _ in range(pair_count):
        key = string()
        metadata[key] = value(plain("I"))
    table = []
    for _ in range(tensor_count):
        name = string()
        shape = tuple(reversed([plain("Q") for _ in range(plain("I"))]))
        table.append((name, shape, plain("I"), plain("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-position // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in table:
        if kind not in _TYPES:
            raise FourscoreError(
                f"tensor {name} is stored as GGML type {kind}, which is not read here",
                where=where,
                todo=f"use a file of {', '.join(t[0] for t in _TYPES.values())} tensors",
            )
        _, block, size = _TYPES[kind]
        tensors.append(GGUFTensor(name, shape, kind, start + offset, prod(shape) // block * size))
    end = max((t.offset + t.size for t in tensors), default=0)
    if end > len(data):
        raise FourscoreError(f"truncated: {len(data):,} of {end:,} bytes", where=where, todo="fetch it again")
    return GGUF(data, metadata, tuple(tensors))


def dequantise(file: GGUF, tensor: GGUFTensor) -> Any:
    """The tensor's values as torch float32 (bfloat16 and float16 files: converted exactly), shape `tensor.shape`.

    Q4_0: d (q - 8); Q4_1: d q + m; Q8_0: d q, each in blocks of 32 along the row, d and m in float16 (ggml-common.h).
    """
    import torch

    raw = torch.frombuffer(bytearray(file.data[tensor.offset : tensor.offset + tensor.size]), dtype=torch.uint8)
    name, _, size = _TYPES[tensor.kind]
    if name in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return raw.view(dtype).float().reshape(tensor.shape)
    blocks = raw.view(-1, size)

    def half(first: int) -> torch.Tensor:
        return blocks[:, first : first + 2].contiguous().view(torch.float16).float()

    if name == "Q8_0":
        return (half(0) * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(tensor.shape)
    packed = blocks[:, 2:] if name == "Q4_0" else blocks[:, 4:]
    codes = torch.empty(len(blocks), 32)
    codes[:, :16] = packed & 15  # low nibbles are weights 0-15, high ones 16-31
    codes[:, 16:] = packed >> 4
    values = codes.sub_(8).mul_(half(0)) if name == "Q4_0" else codes.mul_(half(0)).add_(half(2))
    return values.reshape(tensor.shape)


def convert(data: bytes, out: Path, where: str = "GGUF file") -> int:
    """Write a transformers directory (bfloat16 safetensors) into the folder `out`; returns the number of weights.

    The same bytes give the same files, whatever the versions of the libraries. Architectures: llama. Errors: a tensor, an
    architecture or a tokenizer that is not known here.
    """
    file = read_gguf(data, where)
    config = _config(file, where)
    weights = _weights(file, config, where)
    _write_tokenizer(file, config, out, where)
    _write(out / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(out / "generation_config.json", generation)
    from safetensors.torch import save_file

    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    return sum(w.numel() for w in weights.values())


def _config(file: GGUF, where: str) -> dict[str, Any]:
    meta = file.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise FourscoreError(
            f"architecture `{architecture}` is not converted here", where=where, todo="use its transformers directory instead"
        )
    scaling = sorted(k for k in meta if k.startswith("llama.rope.scaling") or k.startswith("llama.expert"))
    if scaling:
        raise FourscoreError(f"{', '.join(scaling)} is not converted here", where=where, todo="use its transformers directory instead")
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    epsilon = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}")  # stored as float32: 1e-05 again
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", meta["tokenizer.ggml.eos_token_id"]),
        "rms_norm_eps": epsilon,
        "rope_parameters": {"rope_theta": meta.get("llama.rope.freq_base", 10000.0), "rope_type": "default"},
        "tie_word_embeddings": all(t.name != "output.weight" for t in file.tensors),
        "use_cache": True,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
    }


_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str | None:
    """The transformers name of a llama tensor of a GGUF file, None when there is none."""
    if name in _LLAMA_ENDS:
        return _LLAMA_ENDS[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LLAMA and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LLAMA[parts[2]]}.weight"
    return None


def _weights(file: GGUF, config: dict[str, Any], where: str) -> dict[str, Any]:
    import torch

    weights = {}
    for tensor in file.tensors:
        name = hf_name(tensor.name)
        if name is None:
            raise FourscoreError(f"tensor {tensor.name} has no place in a llama model", where=where, todo="use its transformers directory")
        value = dequantise(file, tensor)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            value = rotary_order(value, heads)
        weights[name] = value.to(torch.bfloat16).contiguous()
    layers = [f"blk.{i}.{part}.weight" for i in range(config["num_hidden_layers"]) for part in _LLAMA]
    wanted = {hf_name(n) for n in ["token_embd.weight", "output_norm.weight", *layers]}
    if lacking := sorted(str(n) for n in wanted - weights.keys()):
        raise FourscoreError(f"the file lacks {lacking[0]} and {len(lacking) - 1} more tensors", where=where, todo="fetch it again")
    return dict(sorted(weights.items()))


def rotary_order(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's reordering of query and key rows: pairs (i, i + d/2) of a head stand side by side in a GGUF file."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# What cuts text before the merges apply, by the name in the file. smollm: each digit alone, then GPT-2's pattern.
_PRE_TOKENIZERS = {"smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}}


def _write_tokenizer(file: GGUF, config: dict[str, Any], out: Path, where: str) -> None:
    meta = file.metadata
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS or meta.get("tokenizer.ggml.add_bos_token", False):
        raise FourscoreError(f"tokenizer {kind}/{pre} is not converted here", where=where, todo="use its transformers directory instead")
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if kinds[i] == _CONTROL]
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": meta["tokenizer.ggml.merges"]}
    tokenizer: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    tokenizer |= {"pre_tokenizer": _PRE_TOKENIZERS[pre], "post_processor": None}
    tokenizer |= {"decoder": {**_BYTES, "add_prefix_space": True}, "model": model}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    special = {f"{role}_token": tokens[config[f"{role}_token_id"]] for role in ("bos", "eos", "pad")}
    if (unknown := meta.get("tokenizer.ggml.unknown_token_id")) is not None:
        special["unk_token"] = tokens[unknown]
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"]}
    _write(out / "tokenizer_config.json", special | settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if template := meta.get("tokenizer.chat_template"):
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
