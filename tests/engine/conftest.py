"""The models and adapters of the engine's tests, made once each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fourscore.model import Model, load


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Model:
    return load(str(tiny_llama), weights="f32")


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> Model:
    return load(str(smollm2), weights="f32")


@pytest.fixture(scope="session")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that differ from the base and from each other."""
    found = {}
    for seed, name in enumerate(("desk", "till")):
        network = get_peft_model(load(str(tiny_llama), weights="f32").network, LoraConfig(r=4, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        found[name] = tmp_path_factory.mktemp(name)
        network.save_pretrained(str(found[name]))
    return found
