"""Causal attention and rotary embeddings while training, by our kernels (native/ops_attention.h) where they run.

transformers' own attention modules stay as they are: what they call is replaced inside a block. Masks, sliding windows, dropout
and whatever else the kernels do not compute go to what was there before. Without kernels short rows take plain products in f32,
because torch's blocked kernel costs as much for them as for rows of 256 tokens.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourscore.train import ops

SHORT = 160  # tokens up to which plain products beat torch's blocked attention on a CPU: 4.4 against 29 ms at 50, even at 200


@contextlib.contextmanager
def fused_rope(network: nn.Module) -> Iterator[list[str]]:
    """Inside the block, the modules that define `network`'s attention turn q and k in one pass; gives the modules' names.

    A module's `apply_rotary_pos_emb` is replaced where it was seen to give the same bits as Llama's.
    """
    names = {type(module).__module__ for module in network.modules()}
    chosen = {name: sys.modules[name] for name in sorted(names) if _same_rope(getattr(sys.modules.get(name), "apply_rotary_pos_emb", None))}
    before: dict[str, Any] = {name: vars(module)["apply_rotary_pos_emb"] for name, module in chosen.items()}
    for name, module in chosen.items():
        vars(module)["apply_rotary_pos_emb"] = functools.partial(_rope_forward, before[name])
    try:
        yield list(chosen)
    finally:
        for name, module in chosen.items():
            vars(module)["apply_rotary_pos_emb"] = before[name]


def _same_rope(function: Any) -> bool:
    """Does it turn the two halves of each head of q and k, with one angle a place, rounded as Llama's is?"""
    if not callable(function):
        return False
    x = torch.linspace(-3, 5, 2 * 3 * 4 * 8, dtype=torch.bfloat16).view(2, 3, 4, 8)
    angles = torch.linspace(0, 6, 4 * 8).view(1, 4, 8)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    try:
        q, k = function(x, x[:, :1], cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # another signature or another layout
        return False
    wanted = ops.rope(x, cos, sin)
    return torch.equal(q, wanted) and torch.equal(k, wanted[:, :1])


def _rope_forward(plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    taken = (
        not args
        and not kwargs
        and torch.is_grad_enabled()
        and q.requires_grad
        and q.dim() == k.dim() == 4
        and cos.shape == sin.shape
        and cos.shape in ((1, q.shape[2], q.shape[3]), (q.shape[0], q.shape[2], q.shape[3]))
        and k.shape == (q.shape[0], k.shape[1], q.shape[2], q.shape[3])
        and ops.native_for(q, k, cos, sin)
    )
    return (_Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)) if taken else plain(q, k, cos, sin, *args, **kwargs)


class _Rope(torch.autograd.Function):
    """x [b, h, t, d] turned by cos and sin [b or 1, t, d]; keeps the angles alone, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return ops.rope(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return ops.rope(dy, cos, sin, back=True), None, None


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside the block, transformers' `sdpa` computes causal attention by our kernels; without them, short rows in f32."""
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
    others = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "sliding_window", "softcap", "s_aux"))
    taken = (
        causal
        and attention_mask is None
        and not dropout
        and not others
        and torch.is_grad_enabled()
        and query.requires_grad
        and query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
    )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if taken and ops.takes_attention(query, key, value):
        return _Attention.apply(query, key, value, scale).transpose(1, 2), None
    if taken and 1 < query.shape[2] <= SHORT:
        return _ShortAttention.apply(query, key, value, scale).transpose(1, 2).contiguous(), None
    return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)


class _Attention(torch.autograd.Function):
    """q [b, h, t, d], k and v [b, g, t, d] -> [b, h, t, d]; causal. Keeps q, k, v, the result and the log normaliser."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, normaliser = ops.attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normaliser = ctx.saved_tensors
        return *ops.attention_backward(dy, q, k, v, out, normaliser, ctx.scale), None


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
