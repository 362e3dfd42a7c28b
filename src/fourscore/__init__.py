"""fourscore: fine-tune in 4 bits on the hardware you own, and know the score before you ship."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourscore import nf4 as nf4
    from fourscore.engine import Engine as Engine
    from fourscore.files import FourscoreError as FourscoreError
    from fourscore.model import load as load

__version__ = "0.1.0"
__all__ = ["Engine", "FourscoreError", "load", "nf4"]

# torch takes a second to import; it comes when a model does.
_HOMES = {"Engine": "fourscore.engine", "load": "fourscore.model", "FourscoreError": "fourscore.files"}


def __getattr__(name: str) -> Any:
    if name == "nf4":
        return importlib.import_module("fourscore.nf4")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fourscore' has no attribute '{name}'")
