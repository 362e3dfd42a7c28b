"""NF4 on CUDA: bitsandbytes' own kernels on the same bytes.

A weight that was moved to a GPU goes through `bitsandbytes.matmul_4bit` and `dequantize_4bit`; nothing is quantised again, since
the layout of the bytes is theirs. `kernels` comes here when a weight is not on the CPU, so NF4Linear, its files and the adapters
over it stay what they are. bitsandbytes is imported when the first such weight is used, never on a CPU alone.

Written for CUDA and never run on one. What can be seen without a GPU is tested with bitsandbytes on the CPU: the conversions both
ways, and every function here on the same bytes.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from fourscore.files import FourscoreError
from fourscore.nf4.plain import CODE

if TYPE_CHECKING:
    from fourscore.nf4.codec import NF4Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what their kernels take
NESTED = 256  # block of the scales' scales that their products take
# A state a weight: its table and its offset are put onto the GPU once, not at every product.
_states: WeakKeyDictionary[NF4Tensor, Any] = WeakKeyDictionary()


def is_installed() -> bool:
    """Whether bitsandbytes is there, without importing it."""
    return importlib.util.find_spec("bitsandbytes") is not None


def describe() -> dict[str, str]:
    """The GPU in use and the kernels on it."""
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    kernels = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}, CUDA {torch.version.cuda}"
    return {"device": f"cuda: {name}, compute capability {major}.{minor}", "kernels": kernels}


def quant_state(q: NF4Tensor) -> Any:
    """bitsandbytes' QuantState of a weight; it shares the scales' memory."""
    if (known := _states.get(q)) is not None:
        return known
    from bitsandbytes.functional import QuantState

    device = q.packed.device
    nested = None
    if q.nested_absmax is not None:
        nested = QuantState(absmax=q.nested_absmax, code=q.nested_code, blocksize=q.nested_block_size, dtype=torch.float32)
    state = QuantState(
        absmax=q.absmax,
        shape=torch.Size(q.shape),
        code=CODE.to(device, copy=True),
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=q.dtype,
        offset=None if nested is None else torch.tensor(q.nested_offset, dtype=torch.float32, device=device),
        state2=nested,
    )
    _states[q] = state
    return state


def to_params4bit(q: NF4Tensor) -> Any:
    """The weight as bitsandbytes' Params4bit, as `Linear4bit.weight` wants it; shares the memory of the codes and scales."""
    from bitsandbytes.nn.modules import Params4bit

    return Params4bit(
        q.packed,
        requires_grad=False,
        quant_state=quant_state(q),
        blocksize=q.block_size,
        compress_statistics=q.double_quant,
        quant_type="nf4",
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )


def from_params4bit(weight: Any, where: str = "") -> NF4Tensor:
    """A weight back from Params4bit, as bitsandbytes quantised it; shares its memory.

    Another type than NF4, a weight not quantised yet, or one that an evaluation on a CPU has repacked is a FourscoreError.
    """
    from fourscore.nf4.layout import from_tensors

    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise FourscoreError(
            "the weight is not quantised yet" if state is None else "bitsandbytes has repacked the weight for this CPU",
            where=where,
            todo="move it to its device first" if state is None else "convert it before its first evaluation",
        )
    if state.quant_type != "nf4":
        raise FourscoreError(f"the weight is in {state.quant_type}, not NF4", where=where, todo="quantise the original to NF4")
    return from_tensors({"": weight.data, **state.as_dict(packed=True)}, where=where)


def dense(q: NF4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in]: the product rounded once, to `dtype` (theirs goes through the dtype that the weight had before)."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(quant_state(q))
    state.dtype = dtype if dtype in FLOATS else torch.float32
    return dequantize_4bit(q.packed, state).to(dtype)


def forward(x: torch.Tensor, q: NF4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times W transposed, plus bias -> [rows, out] in x's dtype."""
    from bitsandbytes.autograd._functions import matmul_4bit

    _same_device(x, q)
    bias = None if bias is None else bias.detach().to(x.dtype)
    if x.dtype not in FLOATS or (q.double_quant and q.nested_block_size != NESTED):
        return F.linear(x, dense(q, x.dtype), bias)
    return matmul_4bit(x.detach(), q.packed, quant_state(q), bias=bias)


def backward(dy: torch.Tensor, q: NF4Tensor) -> torch.Tensor:
    """dy [rows, out] times W -> [rows, in] in dy's dtype; the whole weight is dense for a moment, as in their own backward."""
    _same_device(dy, q)
    return dy @ dense(q, dy.dtype)


def _same_device(x: torch.Tensor, q: NF4Tensor) -> None:
    if x.device != q.packed.device:
        raise FourscoreError(f"the input is on {x.device}, the weight on {q.packed.device}", where="nf4.linear", todo="move one of them")
