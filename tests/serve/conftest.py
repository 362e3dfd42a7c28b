"""One server for the tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Running, running


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without keys."""
    with running(tiny_llama, tmp_path_factory.mktemp("server"), "--body-mb", "0.1", "--answer-tokens", "32") as started:
        yield started
