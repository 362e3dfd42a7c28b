"""Measuring: each arm answers the same questions and is weighed; items for every answer, measures for every arm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourscore.evaluate.arm import evaluate_arm as evaluate_arm
    from fourscore.evaluate.items import summary as summary

__all__ = ["evaluate_arm", "summary"]

_HOMES = {"evaluate_arm": "fourscore.evaluate.arm", "summary": "fourscore.evaluate.items"}


def __getattr__(name: str) -> Any:
    # Lazy, so that the light parts (answers, energy) can be used without torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fourscore.evaluate' has no attribute '{name}'")
