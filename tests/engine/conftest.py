"""The models of the engine's tests, loaded once each."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourscore.model import Model, load


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Model:
    return load(str(tiny_llama), weights="f32")


@pytest.fixture(scope="session")
def smol(smollm2: Path) -> Model:
    return load(str(smollm2), weights="f32")
