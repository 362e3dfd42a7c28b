"""Fixtures of the data room: SmolLM2's tokenizer, and small data files with a study section over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourscore.spec import Data


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def desk(tmp_path: Path) -> Callable[..., Data]:
    """Write rows to a .jsonl file and return the data section of a study that reads them; keywords override its fields."""

    def make(rows: list[dict[str, Any]], **fields: Any) -> Data:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        prompt = {"user": "{{ text }}", "answer": "{{ label }}"}
        return Data.model_validate({"source": str(path), "licence": "LicenseRef-own", "prompt": prompt} | fields)

    return make
