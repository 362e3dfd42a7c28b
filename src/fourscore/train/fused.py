"""What training computes in another order than transformers and PEFT do, for less time and memory, with the same results.

`fused(network)` switches it on for a block: LoRA with its base (lora.py), causal attention and rotary embeddings
(attention.py), and RMS norms in one pass, which keep x in 16 bit instead of two f32 copies. A layer is replaced only where its
own forward was seen to compute the same; every other layer stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourscore.model.device import device_of
from fourscore.nf4 import kernels
from fourscore.train import ops
from fourscore.train.attention import fused_attention, fused_rope
from fourscore.train.lora import fused_lora


@contextlib.contextmanager
def fused(network: nn.Module) -> Iterator[None]:
    """Train with every fused part inside the block; nothing remains of it outside."""
    if device_of(network).type != "cpu":  # a GPU has kernels of its own for all of this
        yield
        return
    with fused_lora(network), fused_norms(network), fused_rope(network), fused_attention():
        yield


@contextlib.contextmanager
def fused_norms(network: nn.Module) -> Iterator[list[str]]:
    """RMS norms with a frozen weight keep their input and one f32 a row; gives the names of those replaced."""
    seen: dict[tuple[type, torch.dtype], bool] = {}
    chosen: dict[str, Any] = {}
    for name, module in network.named_modules():
        if "RMSNorm" in type(module).__name__ and _has_norm_parts(module):
            kind = (type(module), module.weight.dtype)
            if kind not in seen:
                seen[kind] = _same_norm(module)
            if seen[kind]:
                chosen[name] = module
    for module in chosen.values():
        module.forward = functools.partial(_norm_forward, module, module.forward)
    try:
        yield list(chosen)
    finally:
        for module in chosen.values():
            del module.forward


def _has_norm_parts(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not weight.requires_grad
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _same_norm(module: Any) -> bool:
    """Does this norm compute weight * (x / rms(x)), rounded where Llama's is? Gemma's (1 + weight) does not."""
    x = torch.linspace(-3, 5, 4 * module.weight.numel()).view(4, -1).to(module.weight.dtype)
    with torch.no_grad(), kernels.use("torch"):  # the kernels sum in another order
        return torch.equal(module(x), ops.rms_norm(x, module.weight, module.variance_epsilon)[0])


def _norm_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and x.dtype == module.weight.dtype:
        return _RmsNorm.apply(x, module.weight, module.variance_epsilon)
    return plain(x)


class _RmsNorm(torch.autograd.Function):
    """x [..., n] -> weight * x / rms(x), computed in f32. Keeps x in its own dtype and 1 / rms(x) in f32 [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scale = ops.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        return ops.rms_norm_backward(dy, x, weight, scale), None, None
