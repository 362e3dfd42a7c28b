"""What of this machine a step's result can depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from fourscore.spec import Study

PACKAGES = ("fourscore", "torch", "transformers", "tokenizers", "peft", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Installed versions of what computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def threads(study: Study) -> int:
    """Threads the study computes with."""
    return study.threads or len(os.sched_getaffinity(0))


def describe(study: Study) -> dict[str, Any]:
    """Versions, device, kernels, dtype and threads: part of every step's key."""
    from fourscore.machine import has_bf16
    from fourscore.model.device import describe_device, on_gpu

    return {
        "versions": versions(),
        **describe_device(),
        "dtype": "bfloat16" if on_gpu() or has_bf16() else "float32",
        "threads": threads(study),
        "machine": platform.machine(),
    }
