"""NF4: weights in 4 bits, bit for bit as bitsandbytes writes them, on plain CPUs.

q = nf4.quantize(w)                 # [out, in] -> NF4Tensor
y = nf4.linear(x, q)                # differentiable in x
nf4.replace_linears(network)        # every linear layer of a decoder, in place
AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4.NF4Config())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fourscore.nf4.codec import NF4Tensor, dequantize, quantize
from fourscore.nf4.kernels import backend
from fourscore.nf4.layer import NF4Linear, replace_linears
from fourscore.nf4.linear import linear

if TYPE_CHECKING:
    from fourscore.nf4.transformers_quantizer import NF4Config as NF4Config
    from fourscore.nf4.transformers_quantizer import load_prequantized as load_prequantized

__all__ = ["NF4Config", "NF4Linear", "NF4Tensor", "backend", "dequantize", "linear", "load_prequantized", "quantize", "replace_linears"]


def __getattr__(name: str) -> Any:
    # transformers is slow to import and not needed for the kernels.
    if name in ("NF4Config", "load_prequantized"):
        from fourscore.nf4 import transformers_quantizer

        return getattr(transformers_quantizer, name)
    raise AttributeError(f"module 'fourscore.nf4' has no attribute '{name}'")
