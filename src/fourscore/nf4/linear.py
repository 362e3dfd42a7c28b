"""y = x W^T + b with W in NF4, differentiable in x."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fourscore.files import FourscoreError
from fourscore.nf4 import kernels
from fourscore.nf4.codec import NF4Tensor

# f64 goes through plain torch: it is for checking gradients.
INPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Linear(torch.autograd.Function):
    """Keeps the packed weight by reference and nothing else: neither x nor a dequantised weight lives until backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q: NF4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.q = q
        ctx.bias_dtype = None if bias is None else bias.dtype
        return kernels.forward(x, q, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        dx = kernels.backward(dy, ctx.q) if ctx.needs_input_grad[0] else None
        dbias = dy.sum(dim=0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


def linear(x: torch.Tensor, q: NF4Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] -> [..., out] in x's dtype (f32, bf16, f16; f64 in plain torch), differentiable once in x (and bias).

    W is dequantised to x's dtype tile by tile, products are summed in f32, the bias is added in f32, the result is rounded
    once. Batch-invariant: a row's bits do not depend on the other rows or on the number of threads (except on backend 'torch').
    """
    if x.dtype not in INPUTS or x.shape[-1] != q.in_features:
        raise FourscoreError(
            f"the input is {x.dtype} {list(x.shape)}, the weight takes {q.in_features} features in f32, bf16 or f16",
            where="nf4.linear",
            todo="convert the input",
        )
    rows = x.reshape(-1, q.in_features)
    differentiate = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    y = _Linear.apply(rows, q, bias) if differentiate else kernels.forward(rows, q, bias)
    return y.view(*x.shape[:-1], q.out_features)
