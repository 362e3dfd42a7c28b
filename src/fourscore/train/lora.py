"""LoRA fused with its frozen base while training: y = x W^T + s (x A^T) B^T as one autograd function.

PEFT's forward casts x to f32 once a projection and keeps every copy until backward. Here x is kept as it came (the same
tensor for q, k and v), with x A^T beside it, and the adapter's products run in x's dtype on parameters that stay f32 and
stay PEFT's: saving and loading do not change. Evaluating goes through PEFT's own forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourscore.nf4 import NF4Linear, kernels


@contextlib.contextmanager
def fused_lora(network: nn.Module) -> Iterator[list[str]]:
    """Inside the block, plain LoRA layers of `network` train through the fused function; gives their names.

    A layer with a variant (DoRA and others), a LoRA bias, another base than NF4Linear or nn.Linear, or more than one active
    adapter keeps PEFT's forward, which computes the same.
    """
    chosen = {name: module for name, module in network.named_modules() if _is_plain(module)}
    for module in chosen.values():
        module.forward = functools.partial(_forward, module, module.forward)
    try:
        yield list(chosen)
    finally:
        for module in chosen.values():
            del module.forward


def _is_plain(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.merged or module.disable_adapters or len(module.active_adapters) != 1:
        return False
    (name,) = module.active_adapters
    base = module.base_layer
    return (
        name in module.lora_A
        and name not in module.lora_variant
        and module.lora_B[name].bias is None
        and not module.fan_in_fan_out
        and not any(p.requires_grad for p in base.parameters())
        and (type(base) is nn.Linear or (type(base) is NF4Linear and base.compute_dtype is None))
    )


def _forward(module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not (module.training and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu") or args or kwargs or module.disable_adapters:
        return plain(x, *args, **kwargs)
    (name,) = module.active_adapters
    share = getattr(module.lora_dropout[name], "p", 0.0)
    rows = x.reshape(-1, x.shape[-1])
    y = _Fused.apply(rows, module.lora_A[name].weight, module.lora_B[name].weight, module.base_layer, module.scaling[name], share)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Fused(torch.autograd.Function):
    """x [n, in], A f32 [r, in], B f32 [out, r] -> [n, out] in x's dtype. Keeps x, x A^T and, with dropout, one byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, base: Any, scale: float, dropout: float) -> Tensor:
        a, b = A.to(x.dtype), B.to(x.dtype)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        h = _dropped(x, mask, dropout) @ a.T
        y = kernels.forward(x, base.quantised, base.bias) if isinstance(base, NF4Linear) else F.linear(x, base.weight, base.bias)
        ctx.save_for_backward(x, h, a, b, mask)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        return y.addmm_(h, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        x, h, a, b, mask = ctx.saved_tensors
        dh = (dy @ b).mul_(ctx.scale)
        dA = (dh.T @ _dropped(x, mask, ctx.dropout)).float()
        dB = (dy.T @ h).float().mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = kernels.backward(dy, ctx.base.quantised) if isinstance(ctx.base, NF4Linear) else dy @ ctx.base.weight
            if mask is None:
                dx.addmm_(dh, a)
            else:
                dx += _dropped(dh @ a, mask, ctx.dropout)
        return dx, dA, dB, None, None, None


def _dropped(x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return x if mask is None else x * mask * (1 / (1 - dropout))
