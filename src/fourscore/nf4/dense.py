"""Products with dense matrices by our kernels (native/dense.h), plain torch where none runs.

They keep the NF4 linear's promises: f32 sums in one order, so that a row's bits depend on that row and on the weight alone, and
threads that are our own. Training takes its head and its adapters through them, the engine its 16-bit layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fourscore.files import FourscoreError
from fourscore.nf4 import kernels

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_native: Any = cast(Any, kernels)._native


def runs_for(*tensors: Tensor) -> bool:
    """Does a kernel take these: f32 and bf16 on the CPU, and a backend that is not torch?"""
    return kernels.backend() != "torch" and all(t.dtype in TYPES and t.device.type == "cpu" for t in tensors)


def product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, scale: float = 1.0, bias: Tensor | None = None, add: bool = False
) -> Tensor:
    """a [m, k] times the transpose of b [n, k] -> [m, n]: scale * a b^T + bias, added to what `out` holds where `add`.

    a, b and out are f32 or bf16, each its own (others, and no kernels: plain torch); b is rounded to a's dtype, sums are in f32, the
    result is rounded once to out's dtype (without `out`: a's). Any strides. A row of the result does not depend on the others or
    on the number of threads, and is the same however a and b lie in memory (except on backend 'torch').
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or (out is not None and out.shape != (a.shape[0], b.shape[0])):
        into = "" if out is None else f" into {list(out.shape)}"
        raise FourscoreError(f"{list(a.shape)} times {list(b.shape)} transposed{into} is no product", where="nf4.dense")
    if add and out is None:
        raise FourscoreError("nothing to add to", where="nf4.dense", todo="give `out`")
    y = torch.empty((a.shape[0], b.shape[0]), dtype=a.dtype, device=a.device) if out is None else out
    if not runs_for(a, b, y) or not a.numel() or not b.numel():
        result = torch.mm(a, b.to(a.dtype).T)
        result = result if scale == 1.0 else result.mul_(scale)
        result = result if bias is None else result.add_(bias)
        return y.add_(result) if add else result.to(y.dtype) if out is None else y.copy_(result)
    a, b = _straight(a), _straight(b)
    bias = None if bias is None else bias.detach().float().contiguous()
    _native.product(
        a.shape[0],
        b.shape[0],
        a.shape[1],
        _matrix(a),
        _matrix(b),
        (y.data_ptr(), *y.stride(), TYPES[y.dtype]),
        scale,
        0 if bias is None else bias.data_ptr(),
        add,
        torch.get_num_threads(),
    )
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> x W^T + bias [..., out] with a dense W [out, in]; not differentiable."""
    return product(x.reshape(-1, x.shape[-1]), weight, bias=bias).view(*x.shape[:-1], weight.shape[0])


def _straight(x: Tensor) -> Tensor:
    """[rows, columns] with neighbours next to each other one way or the other."""
    return x if 1 in x.stride() or 1 in x.shape else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    """Address, strides, type; one of the strides is 1."""
    row, column = x.stride()
    row, column = (row, 1) if column == 1 or x.shape[1] == 1 else (1, column)
    return x.data_ptr(), row, column, TYPES[x.dtype]
