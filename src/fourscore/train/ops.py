"""The seam to the C++ operations of a training step (native/ops.h), each with plain torch where no kernel runs.

They take f32 and bf16 on the CPU, sum in f32, and give the same bits for any number of threads. Backend and threads: as for the
NF4 kernels (fourscore.nf4.kernels).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fourscore.nf4 import kernels

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_native: Any = cast(Any, kernels)._native


def native_for(*tensors: Tensor) -> bool:
    """Can a kernel take these: one dtype that it knows, all on the CPU, and a backend that is not torch?"""
    dtype = tensors[0].dtype
    return kernels.backend() != "torch" and dtype in TYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype, rounded once. Not differentiable by itself: see `swiglu_backward`."""
    if not native_for(gate, up) or gate.shape != up.shape:
        return F.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _native.swiglu(gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], gate.numel(), y.data_ptr(), torch.get_num_threads())
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` by gate and by up."""
    if not native_for(dy, gate, up) or not dy.shape == gate.shape == up.shape:
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    addresses = [t.data_ptr() for t in (dy, gate, up)]
    _native.swiglu_backward(*addresses, TYPES[gate.dtype], gate.numel(), dgate.data_ptr(), dup.data_ptr(), torch.get_num_threads())
    return dgate, dup
