"""DoRA on a frozen base, dense or NF4, without ever holding a whole dequantised weight.

y = m / ||W + s B A|| * (W + s B A) x, the norm taken row by row and treated as a constant by the gradient (arXiv 2402.09353,
equation 5 and section 4.3). PEFT's own layer reads an NF4 layer's packed bytes as a dense weight, and computes B A densely at
every step. Here the norm is put together from parts that the kernels give: ||W||^2 once, tile by tile, and
||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 B (A A^T) B^T. The parameters and the files are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fourscore import nf4
from fourscore.nf4 import NF4Linear, NF4Tensor

TILE = 1 << 20  # weights held as f32 at a time: 4 MB


@contextmanager
def tiled_dora() -> Iterator[None]:
    """Inside the block, PEFT makes its DoRA layers in our class; the layers keep it afterwards.

    PEFT looks its variant up by name when a layer is made, and has no other seam that also reaches adapters which are loaded
    later onto layers that exist (`LoraConfig._register_custom_module` does not).
    """
    looked_up: Any = variants
    before = looked_up.DoraLinearVariant
    looked_up.DoraLinearVariant = _TiledVariant
    try:
        yield
    finally:
        looked_up.DoraLinearVariant = before


class _TiledVariant(DoraLinearVariant):
    """PEFT's variant with `TiledDora` as its layer; its forward (dropout included) stays PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        base = module.get_base_layer()
        if type(base) not in (nn.Linear, NF4Linear) or module.fan_in_fan_out:
            DoraLinearVariant.init(module, adapter_name, **kwargs)
            return
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = TiledDora(fan_in_fan_out=False)
        layer.reset(base, module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight, module.scaling[adapter_name])
        module.lora_magnitude_vector[adapter_name] = layer


class TiledDora(DoraLinearLayer):
    """The magnitudes of one layer's adapter (`weight`, f32 [out]), and what DoRA adds to the base's output."""

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__(fan_in_fan_out)
        self._base: tuple[Any, Tensor] | None = None
        self._whole: tuple[Any, Tensor] | None = None

    def reset(self, base: Any, A: Tensor, B: Tensor, scaling: float) -> None:
        """The magnitudes at which DoRA changes nothing: the norms as they are."""
        self.weight = nn.Parameter(self.weight_norm(base, A, B, scaling).clone(), requires_grad=True)

    def forward(
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Tensor | None = None, **_: Any
    ) -> Tensor:
        """To be added to the base's output. base_result: that output, where x is what it was computed from (no dropout)."""
        if base_result is None:
            base_result = _without_bias(x, base_layer)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        ratio = self.weight / self.weight_norm(base_layer, lora_A.weight, lora_B.weight, scaling)
        return (ratio - 1) * base_result + (ratio * scaling) * lora_B(lora_A(x))

    def weight_norm(self, base: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """||W + scaling B A|| of each row, f32 [out]; a constant to the gradient. Not computed again while nothing changes."""
        key = None if self.training else (_version(base.weight), _version(A), _version(B), scaling)
        if key is None or self._whole is None or self._whole[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # kept beyond a block of inference mode
                b = B.double()
                square = self._base_square(base) + 2 * scaling * (_rows_times(base, A.float()).double() * b).sum(1)
                square += scaling**2 * ((b @ (A.double() @ A.double().T)) * b).sum(1)
                self._whole = key, square.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_().float()
        return self._whole[1]

    def _base_square(self, base: Any) -> Tensor:
        """||W||^2 of each row, f64 [out]; the base is frozen, so this is computed once."""
        key = _version(base.weight)
        if self._base is None or self._base[0] != key:
            self._base = key, torch.cat([tile.double().square_().sum(1) for tile in weight_tiles(base)])
        return self._base[1]

    def train(self, mode: bool = True) -> TiledDora:
        """As in PEFT: whoever sets the mode may have changed the weights."""
        self._whole = None
        super().train(mode)
        return self


def reset_magnitudes(network: nn.Module) -> None:
    """Put every DoRA layer's magnitudes where they change nothing; for after A or B were written."""
    for module in network.modules():
        for name, layer in getattr(module, "lora_magnitude_vector", {}).items():
            wrapped: Any = module
            layer.reset(wrapped.get_base_layer(), wrapped.lora_A[name].weight, wrapped.lora_B[name].weight, wrapped.scaling[name])


def weight_tiles(base: Any) -> Iterator[Tensor]:
    """The rows of a linear layer's weight in order, as f32 tiles of about `TILE` weights."""
    if isinstance(base, NF4Linear):
        yield from _nf4_tiles(base.quantised)
    else:
        yield from (tile.float() for tile in base.weight.split(max(1, TILE // base.in_features)))


def _nf4_tiles(q: NF4Tensor) -> Iterator[Tensor]:
    """Tiles begin where a block of scales and a byte begin."""
    whole = math.lcm(q.block_size, q.in_features) // q.in_features
    step = max(1, TILE // q.in_features // whole) * whole
    scales = q.scales()
    for start in range(0, q.out_features, step):
        stop = min(q.out_features, start + step)
        first, last = start * q.in_features, stop * q.in_features
        blocks = scales[first // q.block_size : -(-last // q.block_size)]
        packed = q.packed[first // 2 : -(-last // 2)]
        yield nf4.dequantize(NF4Tensor(packed, blocks, (stop - start, q.in_features), q.dtype, q.block_size), torch.float32)


def _rows_times(base: Any, A: Tensor) -> Tensor:
    """W A^T in f32 [out, r]."""
    if isinstance(base, NF4Linear):
        return nf4.linear(A, base.quantised).T
    return torch.cat([tile @ A.T for tile in weight_tiles(base)])


def _without_bias(x: Tensor, base: Any) -> Tensor:
    """x W^T as the base computes it, in x's dtype."""
    if isinstance(base, NF4Linear):
        return nf4.linear(x, base.quantised)
    return F.linear(x.to(base.weight.dtype), base.weight).to(x.dtype)


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
