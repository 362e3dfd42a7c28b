"""The seam to the C++ kernels: which backend runs, and tensors in and out of it.

The backend is the best this machine has; the environment variable FOURSCORE_KERNELS forces one of avx512-bf16, avx512, avx2,
scalar, torch. Threads: as many as torch uses (torch.set_num_threads).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fourscore.files import FourscoreError
from fourscore.nf4 import plain

if TYPE_CHECKING:
    from fourscore.nf4.codec import NF4Tensor


def _choose() -> str:
    forced = os.environ.get("FOURSCORE_KERNELS", "")
    if forced not in ("", "torch"):
        raise FourscoreError(f"FOURSCORE_KERNELS asks for '{forced}', which is not here", todo="use one of torch")
    return "torch"


_backend = _choose()


def backend() -> str:
    """The kernels in use: 'avx512-bf16', 'avx512', 'avx2', 'scalar' or 'torch'."""
    return _backend


def quantize(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    return plain.quantize(flat, block_size)


def nested_quantize(values: torch.Tensor, table: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return plain.nested_quantize(values, table, block_size)


def dequantize(q: NF4Tensor, out: torch.Tensor) -> None:
    plain.dequantize(q.packed, q.scales(), q.block_size, out)


def forward(x: torch.Tensor, q: NF4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times W transposed, plus bias -> [rows, out] in x's dtype."""
    weight = torch.empty(q.shape, dtype=x.dtype)
    plain.dequantize(q.packed, q.scales(), q.block_size, weight)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def backward(dy: torch.Tensor, q: NF4Tensor) -> torch.Tensor:
    """dy [rows, out] times W -> [rows, in] in dy's dtype."""
    weight = torch.empty(q.shape, dtype=dy.dtype)
    plain.dequantize(q.packed, q.scales(), q.block_size, weight)
    return dy @ weight
