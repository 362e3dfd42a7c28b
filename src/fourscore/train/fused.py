"""What training computes in another order than transformers and PEFT do, for less time and memory, with the same results.

`fused(network)` switches it on for a block: LoRA with its base (lora.py), RMS norms that keep x in 16 bit instead of two
f32 copies, and attention over short rows, for which torch's blocked kernel costs as much as for rows of 256 tokens. A layer is
replaced only where its own forward was seen to give the same bits; every other layer stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourscore.train.lora import fused_lora

SHORT = 160  # tokens up to which plain products beat torch's blocked attention on a CPU: 4.4 against 29 ms at 50, even at 200


@contextlib.contextmanager
def fused(network: nn.Module) -> Iterator[None]:
    """Train with every fused part inside the block; nothing remains of it outside."""
    with fused_lora(network), fused_norms(network), short_attention():
        yield


@contextlib.contextmanager
def fused_norms(network: nn.Module) -> Iterator[list[str]]:
    """RMS norms with a frozen weight keep their input and one f32 a row; gives the names of those replaced."""
    seen: dict[tuple[type, torch.dtype], bool] = {}
    chosen: dict[str, Any] = {}
    for name, module in network.named_modules():
        if "RMSNorm" in type(module).__name__ and _has_norm_parts(module):
            kind = (type(module), module.weight.dtype)
            if kind not in seen:
                seen[kind] = _same_norm(module)
            if seen[kind]:
                chosen[name] = module
    for module in chosen.values():
        module.forward = functools.partial(_norm_forward, module, module.forward)
    try:
        yield list(chosen)
    finally:
        for module in chosen.values():
            del module.forward


def _has_norm_parts(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not weight.requires_grad
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _same_norm(module: Any) -> bool:
    """Does this norm compute weight * (x / rms(x)), rounded where Llama's is? Gemma's (1 + weight) does not."""
    x = torch.linspace(-3, 5, 4 * module.weight.numel()).view(4, -1).to(module.weight.dtype)
    with torch.no_grad():
        return torch.equal(module(x), _RmsNorm.apply(x, module.weight, module.variance_epsilon))


def _norm_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and x.dtype == module.weight.dtype:
        return _RmsNorm.apply(x, module.weight, module.variance_epsilon)
    return plain(x)


class _RmsNorm(torch.autograd.Function):
    """x [..., n] -> weight * x / rms(x), computed in f32. Keeps x in its own dtype and 1 / rms(x) in f32 [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(torch.float32).mul_(scale)
        g = (dy * weight).to(torch.float32)
        along = (g * unit).mean(-1, keepdim=True)
        return g.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), None, None


@contextlib.contextmanager
def short_attention() -> Iterator[None]:
    """Inside the block, transformers' `sdpa` computes causal attention over short rows by plain products, in f32."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(_attention_forward, before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _attention_forward(
    plain: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Any:
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    others = kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    taken = (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.device.type == "cpu"
        and 1 < query.shape[2] == key.shape[2] <= SHORT
        and query.shape[-1] == value.shape[-1]
    )
    if not taken or not causal or attention_mask is not None or dropout or others:
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return _ShortAttention.apply(query, key, value, scale).transpose(1, 2).contiguous(), None


class _ShortAttention(torch.autograd.Function):
    """q [b, h, t, d], k and v [b, g, t, d], h a multiple of g -> [b, h, t, d]; causal. Keeps q, k, v and the log normaliser."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, keys, values = _by_group(q, k), _flat(k), _flat(v)
        scores = _scores(rows, keys, scale, q.shape[2])
        normaliser = scores.logsumexp(-1, keepdim=True)
        out = torch.bmm(scores.sub_(normaliser).exp_(), values)
        ctx.save_for_backward(q, k, v, normaliser)
        ctx.scale = scale
        return out.view(q.shape).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, normaliser = ctx.saved_tensors
        rows, keys, values, outer = _by_group(q, k), _flat(k), _flat(v), _by_group(dy, k)
        share = _scores(rows, keys, ctx.scale, q.shape[2]).sub_(normaliser).exp_()
        dv = torch.bmm(share.transpose(1, 2), outer)
        ds = torch.bmm(outer, values.transpose(1, 2))
        ds.sub_((ds * share).sum(-1, keepdim=True)).mul_(share).mul_(ctx.scale)
        dq = torch.bmm(ds, keys)
        dk = torch.bmm(ds.transpose(1, 2), rows)
        return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), None


def _flat(x: Tensor) -> Tensor:
    """[b, g, t, d] -> f32 [b * g, t, d]."""
    return x.float().reshape(-1, *x.shape[2:])


def _by_group(q: Tensor, k: Tensor) -> Tensor:
    """[b, h, t, d] -> f32 [b * g, h / g * t, d]: the query heads that share a key head under one another."""
    return q.float().reshape(q.shape[0] * k.shape[1], -1, q.shape[3])


def _scores(rows: Tensor, keys: Tensor, scale: float, length: int) -> Tensor:
    """Scaled products [b * g, h / g * t, t], minus infinity after a token's own place."""
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)
    later = torch.full((length, length), float("-inf")).triu_(1)
    scores.view(scores.shape[0], -1, length, length).add_(later)
    return scores
