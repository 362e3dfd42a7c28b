"""Files both ways between fourscore and transformers with bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fourscore import nf4
from fourscore.files import FourscoreError, read_json
from fourscore.nf4.layout import from_tensors, to_tensors


def theirs(folder: Path, double: bool) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")


def ours(folder: Path, double: bool) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4.NF4Config(double_quant=double), dtype=torch.bfloat16)


def dense_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every quantised layer's values, by whoever made the layer."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nf4.NF4Linear):
            found[name] = module.dequantize()
        elif isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).bfloat16()
    return found


@pytest.mark.parametrize("double", [True, False])
def test_what_they_save_we_load(tiny_llama: Path, tmp_path: Path, double: bool) -> None:
    original = theirs(tiny_llama, double)
    original.save_pretrained(tmp_path)
    loaded = nf4.load_prequantized(tmp_path)
    want, got = dense_weights(original), dense_weights(loaded)
    assert len(got) == 14
    assert want.keys() == got.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert all(isinstance(loaded.get_submodule(k), nf4.NF4Linear) for k in got)


@pytest.mark.parametrize("double", [True, False])
def test_what_we_save_they_load(tiny_llama: Path, tmp_path: Path, double: bool) -> None:
    original = ours(tiny_llama, double)
    original.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["quantization_config"]["quant_method"] == "bitsandbytes"
    want = dense_weights(original)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"), nf4.load_prequantized(tmp_path)):
        got = dense_weights(loaded)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    parts = {"", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"} | ({".nested_absmax", ".nested_quant_map"} if double else set())
    assert {k for k in stored if k.startswith(name)} == {name + p for p in parts}


def test_quantising_while_loading_equals_quantising_afterwards(tiny_llama: Path) -> None:
    while_loading = ours(tiny_llama, True)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    nf4.replace_linears(dense)
    a, b = while_loading.state_dict(), dense.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        assert torch.equal(while_loading(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("double", [True, False])
def test_their_reader_takes_our_tensors(double: bool) -> None:
    q = nf4.quantize(torch.randn((24, 192)), double_quant=double)
    tensors = {k or "weight": v for k, v in to_tensors(q).items()}
    state = bnb.functional.QuantState.from_dict({k: v for k, v in tensors.items() if k != "weight"}, device=torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(tensors["weight"], state), nf4.dequantize(q, torch.float32))


@pytest.mark.parametrize("double", [True, False])
def test_our_reader_takes_their_tensors(double: bool) -> None:
    w = torch.randn((24, 192))
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
    q = from_tensors({"": packed, **state.as_dict(packed=True)})
    assert torch.equal(nf4.dequantize(q, torch.float32), bnb.functional.dequantize_4bit(packed, state))
    again = to_tensors(q)
    assert all(torch.equal(again[k], v) for k, v in state.as_dict(packed=True).items() if "quant_state" not in k)


def test_other_formats_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(FourscoreError, match="not NF4 weights of bitsandbytes"):
        nf4.load_prequantized(tiny_llama)
    with pytest.raises(FourscoreError, match="NF4Config knows no bits"):
        nf4.NF4Config(bits=4)
