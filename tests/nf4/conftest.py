"""The kernels a test can ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fourscore.nf4 import kernels


@pytest.fixture(params=kernels.available())
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of this machine in turn."""
    with kernels.use(request.param):
        yield request.param


@pytest.fixture(params=[b for b in kernels.available() if b != "torch"])
def each_native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every C++ backend of this machine in turn."""
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
