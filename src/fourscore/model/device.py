"""Where a model computes: the CPU, or a CUDA device through bitsandbytes. Written for CUDA and never run on one.

`load` chooses by what is there; the environment variable FOURSCORE_DEVICE (auto, cpu or cuda) decides for everything that is not
told otherwise, a whole study included. The study file says nothing of it: the same study runs on either.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from fourscore.files import FourscoreError
from fourscore.nf4 import cuda, kernels
from fourscore.progress import say

Device = Literal["auto", "cpu", "cuda"]
VARIABLE = "FOURSCORE_DEVICE"


def choose_device(asked: str = "auto", weights: str = "nf4") -> torch.device:
    """The device for a model with these weights. `auto`: what FOURSCORE_DEVICE says, else the GPU where torch sees one and
    bitsandbytes is installed, else the CPU.

    `cuda` on a machine that cannot is a FourscoreError; that `auto` leaves a GPU unused is said.
    """
    where = "device"
    if asked == "auto" and os.environ.get(VARIABLE):
        asked, where = os.environ[VARIABLE], VARIABLE
    if asked not in ("auto", "cpu", "cuda"):
        raise FourscoreError(f"no device `{asked}`", where=where, todo="use auto, cpu or cuda")
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if asked == "auto":
        if not cuda.is_installed():
            _say_unused()
        return torch.device("cuda" if cuda.is_installed() else "cpu")
    if not torch.cuda.is_available():
        raise FourscoreError("torch finds no CUDA device", where=where, todo="use device cpu, or install a driver and torch for CUDA")
    if weights == "nf4" and not cuda.is_installed():
        raise FourscoreError("NF4 on CUDA computes with bitsandbytes", where=where, todo="pip install 'fourscore[cuda]'")
    return torch.device("cuda")


@cache
def _say_unused() -> None:
    say("a GPU is here, but bitsandbytes is not installed: computing on the CPU (pip install 'fourscore[cuda]')")


def on_gpu() -> bool:
    """Whether models go to a GPU here unless told otherwise."""
    return choose_device().type == "cuda"


def describe_device() -> dict[str, str]:
    """The device that a study computes on here, and the NF4 kernels there."""
    return cuda.describe() if on_gpu() else {"device": "cpu", "kernels": kernels.backend()}


def kernels_of(network: nn.Module) -> str:
    """The NF4 kernels of a network where it stands."""
    return cuda.describe()["kernels"] if device_of(network).type == "cuda" else kernels.backend()


def device_of(network: nn.Module) -> torch.device:
    """Where a network stands: its first parameter, and so its inputs."""
    return next(network.parameters()).device


def place(network: Any, asked: str, weights: str) -> Any:
    """The loaded network on its device. Its NF4 layers keep their bytes; from then on their products are bitsandbytes'."""
    device = choose_device(asked, weights)
    return network if device.type == "cpu" else network.to(device)


@contextlib.contextmanager
def seeded(seed: int, network: nn.Module) -> Iterator[None]:
    """Draws inside the block follow `seed`, on the CPU and on the network's GPU; outside, both streams go on as they were."""
    gpus = sorted({p.device.index or 0 for p in network.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def peak_gpu_bytes() -> int | None:
    """The most memory of the GPU that this process has held at once, in bytes; None where it computes without one."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None


def gpu_memory_bytes() -> int | None:
    """The memory of the GPU that a study would use here, in bytes; None on a CPU."""
    return int(torch.cuda.get_device_properties(0).total_memory) if on_gpu() else None
