"""The seam to the C++ kernels: which backend runs, and tensors in and out of it.

The backend is the best this machine has; the environment variable FOURSCORE_KERNELS forces one of avx512-bf16, avx512, avx2 (x86),
neon (aarch64), scalar, torch. Threads: as many as torch uses (torch.set_num_threads). The kernels see addresses, so shapes, dtypes
and contiguity are settled here. A weight on a GPU goes to bitsandbytes (cuda.py), whatever the backend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fourscore.files import FourscoreError
from fourscore.nf4 import cuda, plain

if TYPE_CHECKING:
    from fourscore.nf4.codec import NF4Tensor

_native: Any
try:
    from fourscore.nf4 import _native  # type: ignore[attr-defined,no-redef]
except ImportError:
    _native = None

FLOAT_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> list[str]:
    """Backends that run on this machine, best first; 'torch' is always the last."""
    return [*(_native.available() if _native is not None else []), "torch"]


def _choose(name: str, asked_by: str) -> str:
    if name not in available():
        raise FourscoreError(
            f"{asked_by} asks for the kernels '{name}', which do not run here", todo=f"choose one of {', '.join(available())}, or unset it"
        )
    if name != "torch":
        _native.choose(name)
    return name


_backend = _choose(os.environ["FOURSCORE_KERNELS"], "FOURSCORE_KERNELS") if os.environ.get("FOURSCORE_KERNELS") else available()[0]


def backend() -> str:
    """The kernels in use: 'avx512-bf16', 'avx512', 'avx2', 'neon', 'scalar' or 'torch'."""
    return _backend


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run with another backend for a while (tests and measurements; the whole process changes)."""
    global _backend
    before, _backend = _backend, _choose(name, "use")
    try:
        yield
    finally:
        _backend = _choose(before, "use")


def addresses(q: NF4Tensor) -> tuple[Any, ...]:
    """The weight as the kernels take it: where its parts are, and its sizes; `q` must outlive them."""
    nested = q.nested_absmax is not None
    parts = [q.packed, q.absmax, *((q.nested_absmax, q.nested_code) if nested else ())]
    for part in parts:
        assert part is not None
        if part.device.type != "cpu" or not part.is_contiguous():
            raise FourscoreError(f"an NF4 weight on {part.device} cannot be used by the CPU kernels", todo="move the layer to the CPU")
    blocks = -(-q.shape[0] * q.shape[1] // q.block_size)
    if q.packed.numel() != (q.shape[0] * q.shape[1] + 1) // 2 or q.absmax.numel() != blocks:
        raise FourscoreError(f"{q.packed.numel()} bytes and {q.absmax.numel()} scales are no weight {list(q.shape)}", where="nf4")
    return (
        q.packed.data_ptr(),
        *q.shape,
        q.block_size,
        0 if nested else q.absmax.data_ptr(),
        q.absmax.data_ptr() if nested else 0,
        q.nested_code.data_ptr() if q.nested_code is not None else 0,
        q.nested_absmax.data_ptr() if q.nested_absmax is not None else 0,
        q.nested_offset,
        q.nested_block_size,
    )


def _weight(q: NF4Tensor) -> Any:
    return _native.Weight(*addresses(q))


def quantize(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Contiguous f32, bf16 or f16 [n] -> packed u8 [ceil(n / 2), 1], absmax f32 [blocks], index of a NaN or infinity or -1."""
    if _backend == "torch":
        return plain.quantize(flat, block_size)
    n = flat.numel()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    bad = _native.quantize(
        flat.data_ptr(), FLOAT_NUMBERS[flat.dtype], n, block_size, packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads()
    )
    return packed, absmax, bad


def nested_quantize(values: torch.Tensor, table: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [n] -> u8 codes of `table` [n], absmax f32 [ceil(n / block_size)]."""
    if _backend == "torch":
        return plain.nested_quantize(values, table, block_size)
    n = values.numel()
    codes = torch.empty(n, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    _native.nested_quantize(values.data_ptr(), n, table.data_ptr(), block_size, codes.data_ptr(), absmax.data_ptr())
    return codes, absmax


def dequantize(q: NF4Tensor, out: torch.Tensor) -> None:
    """Write the weight into `out`, contiguous, of its shape."""
    if q.packed.device.type == "cuda":
        out.copy_(cuda.dense(q, out.dtype))
    elif _backend == "torch":
        plain.dequantize(q.packed, q.scales(), q.block_size, out)
    else:
        _native.dequantize(_weight(q), out.data_ptr(), FLOAT_NUMBERS[out.dtype], torch.get_num_threads())


def forward(x: torch.Tensor, q: NF4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times W transposed, plus bias -> [rows, out] in x's dtype."""
    if q.packed.device.type == "cuda":
        return cuda.forward(x, q, bias)
    if _backend == "torch" or x.dtype not in FLOAT_NUMBERS:
        weight = torch.empty(q.shape, dtype=x.dtype)
        plain.dequantize(q.packed, q.scales(), q.block_size, weight)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = torch.empty((x.shape[0], q.out_features), dtype=x.dtype)
    x = _rows(x)
    if bias is not None:
        bias = bias.detach().float().contiguous()
    _native.forward(
        _weight(q),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        FLOAT_NUMBERS[x.dtype],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def backward(dy: torch.Tensor, q: NF4Tensor) -> torch.Tensor:
    """dy [rows, out] times W -> [rows, in] in dy's dtype."""
    if q.packed.device.type == "cuda":
        return cuda.backward(dy, q)
    if _backend == "torch" or dy.dtype not in FLOAT_NUMBERS:
        weight = torch.empty(q.shape, dtype=dy.dtype)
        plain.dequantize(q.packed, q.scales(), q.block_size, weight)
        return dy @ weight
    dx = torch.empty((dy.shape[0], q.in_features), dtype=dy.dtype)
    dy = _rows(dy)
    _native.backward(_weight(q), dy.data_ptr(), dy.shape[0], dy.stride(0), FLOAT_NUMBERS[dy.dtype], dx.data_ptr(), torch.get_num_threads())
    return dx


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, n] on the CPU with neighbours in a row next to each other."""
    if x.device.type != "cpu":
        raise FourscoreError(f"the input is on {x.device}, the weight on the CPU", where="nf4.linear", todo="move one of them")
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
