"""Adapters: made from a seed, saved as PEFT's files, refused where they do not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fourscore.files import FourscoreError
from fourscore.model import Model, add_lora, load, save_adapter
from fourscore.spec import Train

IDS = torch.tensor([[1, 2683, 198, 504, 3575, 282, 4649, 314, 7042, 2]])
SETTINGS = Train(rank=4, alpha=8)


def lora(model: Model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.network.named_parameters() if "lora_" in n}


@pytest.fixture
def tuned(tiny_llama: Path) -> Model:
    """An adapter that changes something, on the bf16 base."""
    model = add_lora(load(tiny_llama, weights="bf16"), SETTINGS, seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(lora(model).items()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def logits(network: Any) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(input_ids=IDS).logits


def test_the_same_seed_gives_the_same_adapter_on_every_form_of_the_base(tiny_llama: Path) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (lora(add_lora(load(tiny_llama, weights=w), SETTINGS, s)) for w, s in (("nf4", 1), ("bf16", 1), ("nf4", 2)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)
    assert all(not p.any() for n, p in first.items() if "lora_B" in n)


def test_only_the_adapter_learns_in_float32_and_every_part_of_it_gets_a_gradient(tiny_llama: Path) -> None:
    model = add_lora(load(tiny_llama, weights="nf4", trainable=True), SETTINGS, 1)
    trained = {n for n, p in model.network.named_parameters() if p.requires_grad}
    assert trained == set(lora(model))
    assert len(trained) == 2 * 14
    assert all(p.dtype == torch.float32 for p in lora(model).values())
    assert not any("lm_head" in n for n in trained)
    assert model.network.training
    model.network(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in lora(model).items() if "lora_B" in n}
    assert all(g is not None and g.any() for g in gradients.values())


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), (["q_proj", "v_proj"], 4), (["model.layers.1.mlp.down_proj"], 1)])
def test_targets(tiny_llama: Path, targets: str | list[str], count: int) -> None:
    model = add_lora(load(tiny_llama, weights="bf16"), Train(rank=2, targets=targets), 1)
    assert len(lora(model)) == 2 * count


@pytest.mark.parametrize("target", ["q_projj", "lm_head", "proj"])
def test_a_target_that_names_no_layer_is_an_error(tiny_llama: Path, target: str) -> None:
    with pytest.raises(FourscoreError, match=rf"no linear layer is named '{target}'.*q_proj"):
        add_lora(load(tiny_llama, weights="bf16"), Train(targets=["q_proj", target]), 1)


def test_plain_peft_loads_what_is_saved(tuned: Model, tiny_llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_adapter(tuned, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    untuned = logits(base)
    expected = logits(tuned.network)
    assert not torch.equal(untuned, expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(folder))), expected)
    assert torch.equal(logits(load(tiny_llama, weights="bf16", adapter=folder).network), expected)
    small = load(tiny_llama, weights="nf4", adapter=folder)
    assert small.adapter == folder
    assert float(torch.nn.functional.cosine_similarity(logits(small.network).flatten().float(), expected.flatten().float(), dim=0)) > 0.98


def test_a_saved_adapter_names_its_base_and_no_path_of_this_machine(smollm2: Path, tiny_llama: Path, tuned: Model, tmp_path: Path) -> None:
    for model, name in ((tuned, tiny_llama.name), (add_lora(load(smollm2, "bf16"), SETTINGS, 1), "HuggingFaceTB/SmolLM2-135M-Instruct")):
        folder = save_adapter(model, tmp_path / "adapter")
        assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "fourscore.json"]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
        assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert str(model.path) not in (folder / "adapter_config.json").read_text() + (folder / "fourscore.json").read_text()


def test_an_adapter_of_another_base_is_refused(tuned: Model, tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tuned, tmp_path / "adapter")
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    text = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(text.replace("SmolLM", "Other"))
    with pytest.raises(FourscoreError, match=r"the adapter was made for another base \(tiny-llama"):
        load(other, weights="bf16", adapter=folder)


def test_an_adapter_with_weights_that_have_no_place_is_refused(tuned: Model, tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tuned, tmp_path / "adapter")
    (folder / "fourscore.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(FourscoreError, match="24 weights of the adapter do not fit the model"):
        load(tiny_llama, weights="bf16", adapter=folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(FourscoreError, match="the adapter does not fit the model"):
        load(tiny_llama, weights="bf16", adapter=folder)


def test_damaged_and_pickled_adapters_are_refused(tuned: Model, tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tuned, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(FourscoreError, match="truncated safetensors file"):
        load(tiny_llama, adapter=folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FourscoreError, match="the adapter is a pickle"):
        load(tiny_llama, adapter=folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FourscoreError, match="no adapter_model.safetensors"):
        load(tiny_llama, adapter=folder)
    with pytest.raises(FourscoreError, match="not an adapter"):
        load(tiny_llama, adapter=tmp_path)


def test_one_adapter_at_a_time(tuned: Model, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="has an adapter already"):
        add_lora(tuned, SETTINGS, 2)
    with pytest.raises(FourscoreError, match="no adapter to save"):
        save_adapter(load(tiny_llama, "bf16"), tmp_path / "adapter")
