"""Models: names to files, files to networks, adapters on and off. torch is imported when a network is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourscore.model.adapter import add_lora as add_lora
    from fourscore.model.adapter import check_adapter as check_adapter
    from fourscore.model.adapter import save_adapter as save_adapter
    from fourscore.model.folder import base_sha256 as base_sha256
    from fourscore.model.loading import Model as Model
    from fourscore.model.loading import compute_dtype as compute_dtype
    from fourscore.model.loading import load as load
    from fourscore.model.loading import load_tokenizer as load_tokenizer
    from fourscore.model.merging import Merged as Merged
    from fourscore.model.merging import merge as merge
    from fourscore.model.names import ModelInfo as ModelInfo
    from fourscore.model.names import catalog as catalog
    from fourscore.model.names import describe as describe
    from fourscore.model.residual import split_base as split_base
    from fourscore.model.sources import pull as pull

_HOMES = {
    "ModelInfo": "names",
    "catalog": "names",
    "describe": "names",
    "base_sha256": "folder",
    "pull": "sources",
    "Model": "loading",
    "load": "loading",
    "compute_dtype": "loading",
    "load_tokenizer": "loading",
    "add_lora": "adapter",
    "check_adapter": "adapter",
    "save_adapter": "adapter",
    "split_base": "residual",
    "Merged": "merging",
    "merge": "merging",
}
__all__ = [
    "Merged",
    "Model",
    "ModelInfo",
    "add_lora",
    "base_sha256",
    "catalog",
    "check_adapter",
    "compute_dtype",
    "describe",
    "load",
    "load_tokenizer",
    "merge",
    "pull",
    "save_adapter",
    "split_base",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fourscore.model.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fourscore.model' has no attribute '{name}'")
