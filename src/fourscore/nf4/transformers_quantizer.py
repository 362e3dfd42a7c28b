"""NF4 as one of transformers' quantisation methods: `from_pretrained(..., quantization_config=NF4Config())`.

What is saved names bitsandbytes in config.json, so that transformers with bitsandbytes loads it too; `load_prequantized`
reads such a directory, ours or theirs, without bitsandbytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourscore.files import FourscoreError, read_json
from fourscore.nf4.codec import quantize
from fourscore.nf4.layer import NF4Linear, replace_linears
from fourscore.nf4.layout import PARTS, from_tensors

METHOD = "fourscore_nf4"


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """How to quantise while loading. block_size: weights a scale. double_quant: 8-bit scales. skip: layers left dense.

    on_layer (set it on the object; not kept in files) is called when a layer is quantised, with the bytes of its dense weight
    and the number of layers.
    """

    on_layer: Callable[[int, int], None] | None = None

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        skip: tuple[str, ...] | list[str] = ("lm_head",),
        compute_dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        # from_pretrained of a saved directory hands the method's name back in; anything else is a slip of the caller's.
        unknown = ignored.keys() - {"quant_method"}
        if unknown:
            raise FourscoreError(
                f"NF4Config knows no {', '.join(sorted(unknown))}", todo="it takes block_size, double_quant, skip, compute_dtype"
            )
        self.quant_method: Any = METHOD
        self.block_size, self.double_quant, self.skip, self.compute_dtype = block_size, double_quant, tuple(skip), compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """The same settings as bitsandbytes writes them (the block size stands beside each weight)."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.compute_dtype or torch.bfloat16).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(self.skip),
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


# transformers swallows what goes wrong while a weight is converted, and says only that something did.
_failures: ContextVar[list[FourscoreError] | None] = ContextVar("failures", default=None)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Load inside this block, and an error of ours that transformers swallowed is raised as it was."""
    found: list[FourscoreError] = []
    before = _failures.set(found)
    try:
        yield
    except Exception:
        if found:
            raise found[0] from None
        raise
    finally:
        _failures.reset(before)


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except FourscoreError as error:
        if (found := _failures.get()) is not None:
            found.append(error)
        raise


class _Quantise(ConversionOps):
    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        # transformers looks for this name: without it the scales would be cast to the model's dtype on their way here.
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **__: Any) -> dict[str, Any]:
        config = cast(NF4Config, self.hf_quantizer.quantization_config)
        if failures := _failures.get():  # transformers goes on after an error: the other layers need no quantising any more
            raise failures[0]
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            layer: Any = get_module_from_name(model, name)[0]
            with _noted():
                layer.set_quantised(quantize(dense, config.block_size, config.double_quant, name=name))
            setattr(layer, "_is_hf_initialized", True)  # noqa: B010
            result[name] = layer.weight
            if config.on_layer is not None:
                config.on_layer(dense.nbytes, cast(NF4Quantizer, self.hf_quantizer).layers)
        return result


class _Deserialise(ConversionOps):
    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        # transformers looks for this name: without it the scales would be cast to the model's dtype on their way here.
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, full_layer_name: str = "", **__: Any) -> dict[str, Any]:
        tensors = {key.removeprefix("weight").removeprefix("."): v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        layer: Any = get_module_from_name(model, full_layer_name)[0]
        if len(tensors) == 1 and not isinstance(layer, NF4Linear):
            return {"weight": tensors[""]}
        with _noted():
            if not isinstance(layer, NF4Linear):
                raise FourscoreError("a quantised weight for a layer that is not linear", where=full_layer_name, todo="use weights: bf16")
            layer.set_quantised(from_tensors(tensors, where=full_layer_name))
        setattr(layer, "_is_hf_initialized", True)  # noqa: B010 (transformers' own mark: nothing here is to be drawn at random)
        return {"weight": layer.weight}


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Puts NF4Linear layers into the empty network and fills them as the weights arrive."""

    requires_calibration = False
    layers = 0  # how many it puts in
    serialized_names = {"weight": ["weight", *[f"weight.{part}" for part in PARTS if part]]}  # noqa: RUF012 (transformers' own shape)

    @property
    def quantized_element_size(self) -> float:
        return 0.5

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config = cast(NF4Config, self.quantization_config)
        names = replace_linears(
            model, skip=config.skip, block_size=config.block_size, double_quant=config.double_quant, compute_dtype=config.compute_dtype
        )
        self.layers = len(names)
        for name in names:  # a weight that the file lacks must be reported, not drawn at random: bytes cannot be
            setattr(model.get_submodule(name), "_is_hf_initialized", True)  # noqa: B010
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, NF4Linear) and module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
                nn.init.zeros_(module.bias)  # as transformers would have
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        layer, key = get_module_from_name(model, param_name)
        return isinstance(layer, NF4Linear) and key == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialise}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def is_prequantized(path: str | Path) -> bool:
    """Does this transformers directory hold bitsandbytes NF4 weights?"""
    facts = read_json(Path(path) / "config.json").get("quantization_config") or {}
    return facts.get("quant_method") == "bitsandbytes" and bool(facts.get("load_in_4bit") or facts.get("_load_in_4bit"))


def prequantized_config(path: str | Path) -> Any:
    """The configuration that lets transformers read bitsandbytes NF4 weights (ours or theirs) through `NF4Quantizer`.

    Other kinds of quantisation are a FourscoreError.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    facts = getattr(config, "quantization_config", None) or {}
    if not is_prequantized(path) or facts.get("bnb_4bit_quant_type") != "nf4":
        raise FourscoreError(
            f"not NF4 weights of bitsandbytes ({facts or 'not quantised'})",
            where=str(path),
            todo="load it with weights: nf4 from its 16-bit original",
        )
    skip = facts.get("llm_int8_skip_modules") or ["lm_head"]
    config.quantization_config = {"quant_method": METHOD, "double_quant": bool(facts.get("bnb_4bit_use_double_quant")), "skip": skip}
    return config


def load_prequantized(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model from a directory of bitsandbytes NF4 weights (ours or theirs), without bitsandbytes.

    Codes and scales stay where they are, in the mapped file; they are read when they are used. dtype: of the weights that are
    not quantised. Other kinds of quantisation are a FourscoreError.
    """
    with own_errors():
        return AutoModelForCausalLM.from_pretrained(path, config=prequantized_config(path), dtype=dtype)
