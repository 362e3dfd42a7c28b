"""NF4Linear, an nn.Linear whose weight is packed NF4, and the replacement of a network's linear layers by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fourscore.files import FourscoreError
from fourscore.nf4.codec import NF4Tensor, dequantize, packed_bytes, quantize
from fourscore.nf4.layout import PARTS, from_tensors, to_tensors
from fourscore.nf4.linear import linear


class NF4Linear(nn.Linear):
    """A linear layer with an NF4 weight: `weight` is the packed u8 parameter, frozen; the scales travel with it.

    A subclass of nn.Linear, so that PEFT wraps it as any other. The computation follows x's dtype (or `compute_dtype`, and the
    result comes back in x's). Casting the module casts the bias only. The state dict is bitsandbytes' layout.
    """

    weight: nn.Parameter
    _state: NF4Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer, to be filled by `load_state_dict`; see `from_linear` for a quantised one. dtype: the bias's."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant, self.compute_dtype = block_size, double_quant, compute_dtype
        packed = torch.empty((packed_bytes((out_features, in_features)), 1), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._state = None

    @classmethod
    def from_linear(
        cls,
        lin: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        *,
        name: str = "",
    ) -> NF4Linear:
        """Quantise a dense layer. Its bias is shared, not copied. name: the layer's, for errors."""
        layer = cls(
            lin.in_features, lin.out_features, False, "meta", block_size=block_size, double_quant=double_quant, compute_dtype=compute_dtype
        )
        layer.bias = lin.bias
        layer.set_quantised(quantize(lin.weight.data, block_size, double_quant, name=f"{name}.weight" if name else ""))
        return layer.train(lin.training)

    def set_quantised(self, q: NF4Tensor) -> None:
        """Take a quantised weight of this layer's shape."""
        if q.shape != (self.out_features, self.in_features):
            raise FourscoreError(
                f"an NF4 weight {list(q.shape)} does not fit a layer {self.out_features} x {self.in_features}",
                todo="load the layer's own weight",
            )
        self.weight = nn.Parameter(q.packed, requires_grad=False)
        self._state = q
        self.block_size, self.double_quant = q.block_size, q.double_quant

    @property
    def quantised(self) -> NF4Tensor:
        """The weight as an NF4Tensor (shares the parameter's memory)."""
        if self._state is None:
            raise FourscoreError("this NF4 layer has no weight yet", where=repr(self), todo="load a state dict or a dense layer into it")
        if self._state.packed is not self.weight.data and self._state.packed.data_ptr() != self.weight.data_ptr():
            self._state = replace(self._state, packed=self.weight.data)
        return self._state

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The weight [out, in] in f32, bf16 or f16."""
        return dequantize(self.quantised, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.compute_dtype is None or self.compute_dtype == x.dtype:
            return linear(x, self.quantised, self.bias)
        return linear(x.to(self.compute_dtype), self.quantised, self.bias).to(x.dtype)

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight comes from a dense layer or a file."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        if self._state is not None:
            # Scales are moved as bytes, so that a cast of the module cannot round them.
            def move(t: torch.Tensor | None) -> torch.Tensor | None:
                return None if t is None else fn(t.view(torch.uint8)).view(t.dtype)

            state = self._state
            absmax = move(state.absmax)
            assert absmax is not None
            self._state = replace(
                state, packed=self.weight.data, absmax=absmax, nested_absmax=move(state.nested_absmax), nested_code=move(state.nested_code)
            )
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._state is not None:
            for part, tensor in to_tensors(self.quantised).items():
                if part:
                    destination[f"{prefix}weight.{part}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {part: f"{prefix}weight{'.' + part if part else ''}" for part in PARTS}
        parts = {part: state_dict[key] for part, key in own.items() if key in state_dict}
        if "" in parts:
            if not local_metadata.get("assign_to_params_buffers", False):
                parts = {part: tensor.detach().clone() for part, tensor in parts.items()}
            try:
                self.set_quantised(from_tensors(parts, where=own[""]))
            except FourscoreError as error:
                error_msgs.append(str(error))
        rest = {key: tensor for key, tensor in state_dict.items() if key not in own.values()}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if "" in parts and own[""] in missing_keys:
            missing_keys.remove(own[""])

    def extra_repr(self) -> str:
        bits = "double quantised" if self.double_quant else "f32 scales"
        return f"{super().extra_repr()}, block_size={self.block_size}, {bits}"


def linear_names(network: nn.Module, skip: Iterable[str] = ("lm_head",)) -> list[str]:
    """Names of the dense linear layers, without those skipped and the network's output layer."""
    skipped = tuple(skip)
    find_output: Callable[[], nn.Module | None] | None = getattr(network, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None

    def is_skipped(name: str) -> bool:
        return any(name == s or name.endswith(f".{s}") or name.startswith(f"{s}.") for s in skipped)

    return [n for n, m in network.named_modules() if type(m) is nn.Linear and m is not output and not is_skipped(n)]


def matching_names(names: list[str], targets: str | list[str]) -> list[str]:
    """Those of `names` that a target names (the whole name or its last parts, as PEFT reads them); "all-linear" is every one."""
    if targets == "all-linear":
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            kinds = sorted({n.rsplit(".", 1)[-1] for n in names})
            raise FourscoreError(
                f"no linear layer is named '{target}'",
                where="targets",
                todo=f"layers here: {', '.join(kinds) or 'none'}" + (f" (such as {names[0]})" if names else ""),
            )
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)]


def check_experts(network: nn.Module) -> None:
    """A FourscoreError when weights sit in 3-D parameters (mixture-of-experts), which would silently stay in 16 bit."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point():
                raise FourscoreError(
                    f"a 3-D weight {list(parameter.shape)} (mixture-of-experts) cannot be quantised to NF4 yet",
                    where=f"{name}.{key}" if name else key,
                    todo="use weights: bf16 for this model",
                )


def replace_linears(
    network: nn.Module,
    *,
    skip: Iterable[str] = ("lm_head",),
    targets: str | list[str] = "all-linear",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Quantise the dense linear layers of a network in place, one at a time (each dense weight is freed); gives their names.

    Layers on the meta device become empty NF4Linear layers, to be filled by `load_state_dict`. Embeddings, the output layer and
    those in `skip` stay. A target that names no layer, no layer at all, a 3-D expert weight, or a NaN is a FourscoreError.
    """
    check_experts(network)
    names = matching_names(linear_names(network, skip), targets)
    if not names:
        raise FourscoreError("no linear layer to quantise", where=type(network).__name__, todo="check targets and skip")
    for name in names:
        parent_name, _, key = name.rpartition(".")
        parent = network.get_submodule(parent_name)
        dense = parent.get_submodule(key)
        assert isinstance(dense, nn.Linear)
        if dense.weight.is_meta:
            new = NF4Linear(
                dense.in_features,
                dense.out_features,
                dense.bias is not None,
                "meta",
                dense.weight.dtype,
                block_size=block_size,
                double_quant=double_quant,
                compute_dtype=compute_dtype,
            ).train(dense.training)
        else:
            new = NF4Linear.from_linear(dense, block_size, double_quant, compute_dtype, name=name)
        setattr(parent, key, new)
        del dense
    return names
