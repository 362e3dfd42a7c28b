"""LoRA fused with its frozen base while training: y = x W^T + s (x A^T) B^T as one autograd function.

PEFT's forward casts x to f32 once a projection and keeps every copy until backward. Here x is kept as it came (the same
tensor for q, k and v), with x A^T beside it, and the adapter's products run in x's dtype on parameters that stay f32 and
stay PEFT's: saving and loading do not change. Evaluating goes through PEFT's own forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
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
    gated = [module for module in network.modules() if _is_gated(module, chosen.values())]
    for module in chosen.values():
        module.forward = functools.partial(_forward, module, module.forward)
    for module in gated:
        module.forward = functools.partial(_gated_forward, module, module.forward)
    try:
        yield list(chosen)
    finally:
        for module in (*chosen.values(), *gated):
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


def _is_gated(module: Any, plain: Collection[nn.Module]) -> bool:
    """Is it Llama's MLP, down(silu(gate(x)) * up(x)), and does its forward give those very bits?"""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not callable(getattr(module, "act_fn", None)) or not all(any(p is q for q in plain) for p in parts):
        return False
    gate, up, down = parts
    weight = gate.base_layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    x = torch.linspace(-2, 3, 2 * gate.in_features).view(2, -1).to(dtype)
    was = module.training
    module.eval()  # no dropout, nothing drawn
    try:
        with torch.no_grad():
            return torch.equal(module(x), down(F.silu(gate(x)) * up(x)))
    finally:
        module.train(was)


def _takes_part(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _forward(module: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not _takes_part(module) or args or kwargs or module.disable_adapters:
        return plain(x, *args, **kwargs)
    return _apply(module, x, None)


def _gated_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not _takes_part(module) or module.down_proj.disable_adapters:
        return plain(x)
    return _apply(module.down_proj, module.up_proj(x), module.gate_proj(x))


def _apply(module: Any, x: Tensor, gate: Tensor | None) -> Tensor:
    (name,) = module.active_adapters
    share = getattr(module.lora_dropout[name], "p", 0.0)
    rows = x.reshape(-1, x.shape[-1])
    gates = None if gate is None else gate.reshape(rows.shape)
    A, B = module.lora_A[name].weight, module.lora_B[name].weight
    y = _Fused.apply(rows, gates, A, B, module.base_layer, module.scaling[name], share)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Fused(torch.autograd.Function):
    """x [n, in], A f32 [r, in], B f32 [out, r] -> [n, out] in x's dtype; with a gate [n, in], x is silu(gate) * x first.

    Keeps x, the gate, x A^T and, with dropout, one byte a value; the gated product is made again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, A: Tensor, B: Tensor, base: Any, scale: float, dropout: float) -> Tensor:
        a, b = A.to(x.dtype), B.to(x.dtype)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        given = x if gate is None else F.silu(gate).mul_(x)
        h = _dropped(given, mask, dropout) @ a.T
        y = kernels.forward(given, base.quantised, base.bias) if isinstance(base, NF4Linear) else F.linear(given, base.weight, base.bias)
        ctx.save_for_backward(x, gate, h, a, b, mask)
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        return y.addmm_(h, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None, None, None]:
        x, gate, h, a, b, mask = ctx.saved_tensors
        given = x if gate is None else F.silu(gate).mul_(x)
        dh = (dy @ b).mul_(ctx.scale)
        dA = (dh.T @ _dropped(given, mask, ctx.dropout)).float()
        dB = (dy.T @ h).float().mul_(ctx.scale)
        dx = dgate = None
        if ctx.needs_input_grad[0]:
            dx = kernels.backward(dy, ctx.base.quantised) if isinstance(ctx.base, NF4Linear) else dy @ ctx.base.weight
            if mask is None:
                dx.addmm_(dh, a)
            else:
                dx += _dropped(dh @ a, mask, ctx.dropout)
        if gate is not None and dx is not None:
            dgate = torch.ops.aten.silu_backward(dx * x, gate)
            dx.mul_(F.silu(gate))
        return dx, dgate, dA, dB, None, None, None


def _dropped(x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return x if mask is None else x * mask * (1 / (1 - dropout))
