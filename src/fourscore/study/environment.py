"""What of this machine a step's result can depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from fourscore.spec import Study

PACKAGES = ("fourscore", "torch", "transformers", "tokenizers", "peft", "numpy", "scipy")


def threads(study: Study) -> int:
    """Threads the study computes with."""
    return study.threads or len(os.sched_getaffinity(0))


def describe(study: Study) -> dict[str, Any]:
    """Versions, kernels, dtype and threads: part of every step's key."""
    from fourscore import nf4
    from fourscore.model import compute_dtype

    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "kernels": nf4.backend(),
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "threads": threads(study),
        "machine": platform.machine(),
    }
