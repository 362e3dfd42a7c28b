"""NF4 codes and scales: what a quantised weight is, and how it is made and unmade.

The format is bitsandbytes' (0.50): 16 code values, blocks along the flattened row-major weight, two codes a byte with the
first in the high nibble, one f32 scale (absmax) a block. With double quantisation the scales, less their mean, become 8-bit
codes of a 256-entry table in blocks of 256. QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from fourscore.files import FourscoreError
from fourscore.nf4 import kernels, plain
from fourscore.nf4.plain import NF4_VALUES

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight [out, in] in NF4.

    packed: u8 [ceil(out * in / 2), 1], two codes a byte. absmax: f32 [blocks], or u8 [blocks] with double quantisation, and
    then nested_absmax: f32 [ceil(blocks / 256)], nested_code: f32 [256], nested_offset: the subtracted mean.
    dtype: what the weight was before (kept in files only).
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: float = 0.0
    nested_block_size: int = NESTED_BLOCK_SIZE

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_code)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def scales(self) -> torch.Tensor:
        """absmax as f32 [blocks], the double quantisation undone (two roundings, as bitsandbytes does it)."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        return plain.nested_dequantize(self.absmax, self.nested_absmax, self.nested_code, self.nested_offset, self.nested_block_size)


@cache
def nested_code() -> torch.Tensor:
    """The 256 values of the 8-bit "dynamic" type, f32, sorted (arXiv 2110.02861: an exponent of varying length, then a linear fraction)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = ((10 ** (exponent - 6)) * middles).tolist()
        values += scaled + [-v for v in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


def mean_absmax(absmax: torch.Tensor) -> float:
    """Mean of f32 absmax, summed in f64 in one fixed order (64 interleaved sums, then in turn), rounded to f32."""
    values = absmax.numpy()
    lanes = np.zeros(64, dtype=np.float64)
    whole = len(values) // 64 * 64
    if whole:
        lanes += np.add.reduce(values[:whole].reshape(-1, 64).astype(np.float64), axis=0)
    lanes[: len(values) - whole] += values[whole:]
    total = 0.0
    for lane in lanes.tolist():
        total += lane
    return float(np.float32(total / len(values)))


def quantize(
    w: torch.Tensor, block_size: int = 64, double_quant: bool = True, *, nested_offset: float | None = None, name: str = ""
) -> NF4Tensor:
    """Quantise a weight to NF4; codes and absmax equal bitsandbytes' bit for bit.

    w: [out, in], f32, bf16 or f16, on the CPU. nested_offset: the value to subtract from absmax before its own quantisation,
    by default the mean (f64, fixed order). name: the tensor's, for errors. A NaN or infinity is a FourscoreError.
    """
    if w.dim() != 2 or w.dtype not in FLOATS or w.numel() == 0:
        raise FourscoreError(
            f"NF4 wants a non-empty matrix in f32, bf16 or f16, this is {w.dtype} {list(w.shape)}",
            where=name,
            todo="convert or leave it out",
        )
    if block_size not in BLOCK_SIZES:
        raise FourscoreError(f"no NF4 block size {block_size}", where=name, todo=f"choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if w.device.type != "cpu":
        raise FourscoreError(f"the weight is on {w.device}", where=name or "nf4.quantize", todo="quantise on the CPU, then move the result")
    w = w.detach().contiguous()
    packed, absmax, bad = kernels.quantize(w.view(-1), block_size)
    if bad >= 0:
        row, column = divmod(bad, w.shape[1])
        raise FourscoreError(
            f"the weight holds {w.view(-1)[bad].item()} at row {row}, column {column}",
            where=name or "nf4.quantize",
            todo="fetch the model again; these weights cannot be used",
        )
    shape = (w.shape[0], w.shape[1])
    if not double_quant:
        return NF4Tensor(packed, absmax, shape, w.dtype, block_size)
    offset = mean_absmax(absmax) if nested_offset is None else nested_offset
    table = nested_code().clone()
    codes, nested = kernels.nested_quantize(absmax - offset, table, NESTED_BLOCK_SIZE)
    return NF4Tensor(packed, codes, shape, w.dtype, block_size, nested, table, offset)


def dequantize(q: NF4Tensor, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [out, in] again, in f32, bf16 or f16; equal to bitsandbytes' values from the same bytes.

    out: a contiguous buffer of that shape and dtype to write into (returned). Products are rounded once, to nearest even; on
    backend 'avx512-bf16' subnormal bf16 results are zero, as bitsandbytes' are on such a machine.
    """
    if dtype not in FLOATS:
        raise FourscoreError(f"NF4 is dequantised to f32, bf16 or f16, not {dtype}", where="nf4.dequantize", todo="ask for one of those")
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    elif tuple(out.shape) != q.shape or out.dtype != dtype or not out.is_contiguous():
        raise FourscoreError(
            f"the buffer is {out.dtype} {list(out.shape)}, the weight {dtype} {list(q.shape)}",
            where="nf4.dequantize",
            todo="pass a contiguous buffer of the weight's shape and dtype",
        )
    kernels.dequantize(q, out)
    return out


def packed_bytes(shape: tuple[int, int]) -> int:
    """Bytes of the packed codes of a weight of this shape."""
    return math.ceil(shape[0] * shape[1] / 2)


__all__ = ["BLOCK_SIZES", "FLOATS", "NF4_VALUES", "NF4Tensor", "dequantize", "mean_absmax", "nested_code", "packed_bytes", "quantize"]
