"""The seam to the C++ operations of a training step (native/ops.h), each with plain torch where no kernel runs.

They take f32 and bf16 on the CPU, sum in f32, and give the same bits for any number of threads. Backend and threads: as for the
NF4 kernels (fourscore.nf4.kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fourscore.files import FourscoreError
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


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [..., n] -> weight * (x / rms(x)), rounded before the product and after, and 1 / rms(x) in f32 [..., 1]."""
    if not native_for(x, weight) or not x.numel():
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return weight * (wide * scale).to(x.dtype), scale
    x, weight = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    n = x.shape[-1]
    addresses = x.data_ptr(), weight.data_ptr()
    _native.norm(*addresses, TYPES[x.dtype], x.numel() // n, n, epsilon, y.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    return y, scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Gradient by x; `scale` as `rms_norm` gave it."""
    if not native_for(dy, x, weight) or not x.numel():
        unit = x.to(torch.float32).mul_(scale)
        g = (dy * weight).to(torch.float32)
        along = (g * unit).mean(-1, keepdim=True)
        return g.sub_(unit.mul_(along)).mul_(scale).to(x.dtype)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    n = x.shape[-1]
    addresses = [t.data_ptr() for t in (dy, x, weight, scale)]
    _native.norm_backward(*addresses, TYPES[x.dtype], x.numel() // n, n, dx.data_ptr(), torch.get_num_threads())
    return dx


def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x [b, h, t, d] turned by cos and sin [b or 1, t, d], with transformers' roundings; `back`: the gradient's way.

    Any strides in, values of one place next to each other in memory out ([b, t, h, d]).
    """
    b, h, t, d = x.shape
    if not native_for(x, cos, sin) or d % 2 or not x.numel():
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = (x * s).chunk(2, -1) if back else x.chunk(2, -1)
        return x * c + torch.cat((second, -first), -1) if back else x * c + torch.cat((-second, first), -1) * s
    x, cos, sin = _by_head(x), cos.contiguous(), sin.contiguous()
    y = torch.empty((b, t, h, d), dtype=x.dtype).transpose(1, 2)
    angles = cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else t * d
    _native.rope(_place(x), *angles, TYPES[x.dtype], b, h, t, d, back, _place(y), torch.get_num_threads())
    return y


def nats_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """logits [n, vocabulary], targets i64 [n] -> f32 [n] cross-entropies. Overwrites the logits: by their gradient, if wanted."""
    if not native_for(logits) or not logits.is_contiguous() or not logits.numel():
        wide, wanted = logits.float(), targets[:, None]
        normaliser = wide.logsumexp(-1, keepdim=True)
        losses = (normaliser - wide.gather(-1, wanted))[:, 0]
        if gradient:
            share = wide.sub_(normaliser).exp_()
            logits.copy_(share.scatter_add_(-1, wanted, torch.full_like(normaliser, -1.0)))
        return losses
    n, vocabulary = logits.shape
    if targets.shape != (n,) or not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise FourscoreError(f"{targets.numel()} targets do not fit logits [{n}, {vocabulary}]", where="cross-entropy")
    losses, targets = torch.empty(n, dtype=torch.float32), targets.contiguous()
    given = targets.data_ptr(), losses.data_ptr()
    _native.nats(logits.data_ptr(), TYPES[logits.dtype], n, vocabulary, *given, gradient, torch.get_num_threads())
    return losses


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q [b, h, t, d], k and v [b, g, s, d] -> [b, h, t, d] and the log normaliser, f32 [b, h, t].

    h is a multiple of g; query i stands at place s - t + i. Any strides in; out lies as [b, t, h, d], so that transformers'
    transpose costs nothing. With native kernels a query's bits depend on itself and on keys and values up to its place alone.
    """
    b, h, t, d = q.shape
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    out = torch.empty((b, t, h, d), dtype=q.dtype).transpose(1, 2)
    normaliser = torch.empty((b, h, t), dtype=torch.float32)
    given = [_place(x) for x in (q, k, v, out)]
    _native.attention(_attention_shape(q, k), scale, TYPES[q.dtype], *given, normaliser.data_ptr(), torch.get_num_threads())
    return out, normaliser


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, normaliser: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, which lie as [b, t, h, d]; `out` and `normaliser` as `attention` gave them."""
    dy, q, k, v = _by_head(dy), _by_head(q), _by_head(k), _by_head(v)
    gradients = [torch.empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype=x.dtype).transpose(1, 2) for x in (q, k, v)]
    given = [_place(x) for x in (q, k, v, out)]
    of = [_place(x) for x in (dy, *gradients)]
    shape = _attention_shape(q, k)
    _native.attention_backward(shape, scale, TYPES[q.dtype], *given, normaliser.data_ptr(), *of, torch.get_num_threads())
    return gradients[0], gradients[1], gradients[2]


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Do the kernels compute `attention` of these?"""
    b, h, t, d = q.shape
    return native_for(q, k, v) and k.shape == v.shape == (b, k.shape[1], k.shape[2], d) and h % k.shape[1] == 0 and 0 < t <= k.shape[2]


def _attention_shape(q: Tensor, k: Tensor) -> Sequence[int]:
    b, h, t, d = q.shape
    return b, h, k.shape[1], t, k.shape[2], d


def _by_head(x: Tensor) -> Tensor:
    """[b, h, t, d] with the values of one head at one place next to each other."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
