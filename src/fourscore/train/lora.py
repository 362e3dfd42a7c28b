"""LoRA fused with its frozen base while training: y = x W^T + s (x A^T) B^T, for all layers that read one x in one function.

PEFT's forward casts x to f32 once a projection and keeps every copy until backward. Here x is kept as it came, once for q, k
and v, with x [A_q; A_k; A_v]^T beside it; the adapters' products run in x's dtype on parameters that stay f32 and stay PEFT's, so
saving and loading do not change. A gated MLP is one function from its input to its output. Evaluating goes through PEFT's
own forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourscore.nf4 import NF4Linear, kernels
from fourscore.train import ops


@contextlib.contextmanager
def fused_lora(network: nn.Module) -> Iterator[list[str]]:
    """Inside the block, plain LoRA layers of `network` train through the fused functions; gives their names.

    A layer with a variant (DoRA and others), a LoRA bias, another base than NF4Linear or nn.Linear, or more than one active
    adapter keeps PEFT's forward, which computes the same.
    """
    chosen = {name: module for name, module in network.named_modules() if _is_plain(module)}
    gated = [module for module in network.modules() if _is_gated(module, chosen.values())]
    inside = {id(m) for module in gated for m in module.modules()}
    groups = [_Group(g) for g in _sharing(network, [m for m in chosen.values() if id(m) not in inside])]
    group_of = {id(m): group for group in groups for m in group.members}
    for module in chosen.values():
        module.forward = functools.partial(_forward, module, module.forward, group_of.get(id(module)) or _Group([module]))
    for module in gated:
        module.forward = functools.partial(_gated_forward, module, module.forward)
    try:
        yield list(chosen)
    finally:
        for module in (*chosen.values(), *gated):
            del module.forward


def _is_plain(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.merged or module.disable_adapters or len(module.active_adapters) != 1:
        return False
    (name,) = module.active_adapters
    base = module.base_layer
    return (
        name in module.lora_A
        and name not in module.lora_variant
        and module.lora_B[name].bias is None
        and not module.fan_in_fan_out
        and not any(p.requires_grad for p in base.parameters())
        and (type(base) is nn.Linear or (type(base) is NF4Linear and base.compute_dtype is None))
    )


def _is_gated(module: Any, plain: Collection[nn.Module]) -> bool:
    """Is it Llama's MLP, down(silu(gate(x)) * up(x)), and does its forward give those very bits?"""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not callable(getattr(module, "act_fn", None)) or not all(any(p is q for q in plain) for p in parts):
        return False
    gate, up, down = parts
    weight = gate.base_layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    x = torch.linspace(-2, 3, 2 * gate.in_features).view(2, -1).to(dtype)
    was = module.training
    module.eval()  # no dropout, nothing drawn
    try:
        with torch.no_grad():
            return torch.equal(module(x), down(F.silu(gate(x)) * up(x)))
    finally:
        module.train(was)


def _sharing(network: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Which of `layers` are given the very same tensor in one pass over the network, in the order in which they are called."""
    if not layers or not any(p.dtype.is_floating_point for p in network.parameters()):
        return []
    seen: list[tuple[Tensor, list[nn.Module]]] = []  # inputs stay referenced, so that no two are taken for one

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if isinstance(x, Tensor):
            if not seen or seen[-1][0] is not x:
                seen.append((x, []))
            seen[-1][1].append(module)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    was = [m for m in network.modules() if m.training]
    network.eval()  # no dropout, nothing drawn
    try:
        with torch.no_grad():
            network(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module in was:
            module.training = True
    calls = [m for _, members in seen for m in members]
    return [members for _, members in seen if len(members) > 1 and all(calls.count(m) == 1 for m in members)]


def _takes_part(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class _Group:
    """Layers that were seen to share an input. The first one called computes for all; the others, given the same x, take theirs."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members: list[Any] = list(members)
        self.given: Tensor | None = None
        self.version = 0
        self.waiting: dict[int, Tensor] = {}

    def output(self, module: Any, x: Tensor) -> Tensor:
        if self.given is x and self.version == x._version and id(module) in self.waiting:
            y = self.waiting.pop(id(module))
        else:
            together = self.members if all(_takes_part(m) and not m.disable_adapters for m in self.members) else [module]
            outputs = dict(zip(map(id, together), project(together, x), strict=True))
            y = outputs.pop(id(module))
            self.given, self.version, self.waiting = x, x._version, outputs
        if not self.waiting:
            self.given = None
        return y


def _forward(module: Any, plain: Callable[..., Tensor], group: _Group, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not _takes_part(module) or args or kwargs or module.disable_adapters:
        return plain(x, *args, **kwargs)
    return group.output(module, x)


def _gated_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parts = [module.gate_proj, module.up_proj, module.down_proj]
    if not _takes_part(module) or any(p.disable_adapters for p in parts):
        return plain(x)
    rows = x.reshape(-1, x.shape[-1])
    y = _Gated.apply(rows, *_adapters(parts))
    return y.view(*x.shape[:-1], y.shape[-1])


def project(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """The outputs of plain LoRA `layers` for one x [..., in], as one autograd function."""
    outputs = _Projections.apply(x.reshape(-1, x.shape[-1]), *_adapters(layers))
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _adapters(layers: Sequence[Any]) -> tuple[Any, ...]:
    """What the functions below take of each layer: (base, scale, dropout) of all of them, then every A and B."""
    facts, parameters = [], []
    for layer in layers:
        (name,) = layer.active_adapters
        facts.append((layer.base_layer, layer.scaling[name], getattr(layer.lora_dropout[name], "p", 0.0)))
        parameters += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return facts, *parameters


def _base(base: Any, x: Tensor) -> Tensor:
    return kernels.forward(x, base.quantised, base.bias) if isinstance(base, NF4Linear) else F.linear(x, base.weight, base.bias)


def _base_backward(base: Any, dy: Tensor) -> Tensor:
    return kernels.backward(dy, base.quantised) if isinstance(base, NF4Linear) else dy @ base.weight


def _forward_of(x: Tensor, facts: Sequence[Any], parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """x [n, in] -> outputs [n, out_i], h = x [A_1; A_2; ...]^T [n, sum of r_i], a mask [n, in] for each layer with dropout.

    Each B is scaled while it is cast: a skinny product in bf16 runs at two thirds of a wide one's speed, scaling its result
    would be a pass of its own.
    """
    masks = [_mask(x, dropout) for _, _, dropout in facts]
    if any(m is not None for m in masks):
        h = torch.cat([_dropped(x, m, f[2]) @ A.to(x.dtype).T for m, f, A in zip(masks, facts, parameters[::2], strict=True)], 1)
    else:
        h = x @ _stacked(parameters, x.dtype).T
    outputs, first = [], 0
    for (base, scale, _), B in zip(facts, parameters[1::2], strict=True):
        y = _base(base, x)
        outputs.append(y.addmm_(h[:, first : first + B.shape[1]], (B * scale).to(x.dtype).T))
        first += B.shape[1]
    return outputs, h, [m for m in masks if m is not None]


def _backward_of(
    dys: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor,
    facts: Sequence[Any],
    parameters: Sequence[Tensor],
    masks: Sequence[Tensor],
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx [n, in] where `wanted`, then dA and dB of each layer in f32. An output that nobody used has no gradient."""
    dh = torch.zeros_like(h) if any(dy is None for dy in dys) else torch.empty_like(h)
    dBs, first = [], 0
    for dy, (_, scale, _), B in zip(dys, facts, parameters[1::2], strict=True):
        span = slice(first, first + B.shape[1])
        first += B.shape[1]
        if dy is None:
            dBs.append(torch.zeros_like(B))
        else:
            dh[:, span] = dy @ (B * scale).to(dy.dtype)
            dBs.append((dy.T @ h[:, span]).to(B.dtype).mul_(scale))
    ranks = [A.shape[0] for A in parameters[::2]]
    dx = None
    if wanted:
        for dy, (base, _, _) in zip(dys, facts, strict=True):
            if dy is not None:
                part = _base_backward(base, dy)
                dx = part if dx is None else dx.add_(part)
        dx = torch.zeros_like(x) if dx is None else dx
    if not masks:
        dAs = list((dh.T @ x).to(parameters[0].dtype).split(ranks))
        if dx is not None:
            dx.addmm_(dh, _stacked(parameters, x.dtype))
    else:
        dAs, left = [], iter(masks)
        for dhi, (_, _, dropout), A in zip(dh.split(ranks, 1), facts, parameters[::2], strict=True):
            mask = next(left) if dropout else None
            dAs.append((dhi.T @ _dropped(x, mask, dropout)).to(A.dtype))
            if dx is not None:
                dx += _dropped(dhi @ A.to(x.dtype), mask, dropout)
    return dx, [g for pair in zip(dAs, dBs, strict=True) for g in pair]


class _Projections(torch.autograd.Function):
    """x [n, in], then A f32 [r, in] and B f32 [out, r] of each layer -> its output [n, out] in x's dtype.

    Keeps x, x [A_1; A_2; ...]^T and, with dropout, one byte a value and layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, facts: Sequence[Any], *parameters: Tensor) -> tuple[Tensor, ...]:
        outputs, h, masks = _forward_of(x, facts, parameters)
        ctx.save_for_backward(x, h, *parameters, *masks)
        ctx.facts = facts
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, *rest = ctx.saved_tensors
        count = 2 * len(ctx.facts)
        dx, gradients = _backward_of(dys, x, h, ctx.facts, rest[:count], rest[count:], ctx.needs_input_grad[0])
        return dx, None, *gradients


class _Gated(torch.autograd.Function):
    """x [n, in], then A and B of gate, up and down -> down(silu(gate(x)) * up(x)) [n, out].

    Keeps x, gate, up and the adapters' inner values; the gated product is made again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, facts: Sequence[Any], *parameters: Tensor) -> Tensor:
        (gate, up), h, masks = _forward_of(x, facts[:2], parameters[:4])
        (y,), inner, further = _forward_of(ops.swiglu(gate, up), facts[2:], parameters[4:])
        ctx.save_for_backward(x, gate, up, h, inner, *parameters, *masks, *further)
        ctx.facts = facts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, h, inner, *rest = ctx.saved_tensors
        parameters, masks = rest[:6], rest[6:]
        shared = sum(dropout > 0 for _, _, dropout in ctx.facts[:2])
        given, of_down = _backward_of([dy], ops.swiglu(gate, up), inner, ctx.facts[2:], parameters[4:], masks[shared:], True)
        assert given is not None
        dgate, dup = ops.swiglu_backward(given, gate, up)
        del given
        dx, of_both = _backward_of([dgate, dup], x, h, ctx.facts[:2], parameters[:4], masks[:shared], ctx.needs_input_grad[0])
        return dx, None, *of_both, *of_down


def _stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A_1; A_2; ...] in `dtype`."""
    return torch.cat([A.to(dtype) for A in parameters[::2]]) if len(parameters) > 2 else parameters[0].to(dtype)


def _mask(x: Tensor, dropout: float) -> Tensor | None:
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _dropped(x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return x if mask is None else x * mask * (1 / (1 - dropout))
