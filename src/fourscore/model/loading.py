"""From a transformers directory to a network: dense, or quantised to NF4 one layer at a time, or NF4 from the file.

Weights are memory-mapped. The 4-bit path quantises each layer as transformers hands out its weight: no second layer is ever
dense, whatever the dtype of the file, and every layer's pages go back to the system once it is quantised, so that peak memory
says what this form of the model needs. NF4 weights of a file stay in the mapped file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fourscore.files import FourscoreError, read_json
from fourscore.model.device import Device, place
from fourscore.model.folder import check_folder, weight_files
from fourscore.model.names import PROVENANCE, ModelInfo, describe
from fourscore.model.pages import release_freed, release_pages
from fourscore.model.sources import pull
from fourscore.progress import Bar, say, track

Weights = Literal["nf4", "bf16", "f32"]
RELEASE_BYTES = 16 << 20  # of dense weights read before memory is given back, which takes a millisecond
_DTYPES = {"nf4": torch.bfloat16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A loaded model.

    network: transformers' CausalLM, or a PeftModel around it. quantised: names of the layers in NF4. kept: names of the
    matrices left in 16 bit. disk_bytes: what these weights take in a file in this form (codes, scales, tables, 16-bit rest;
    tied weights once; without the adapter).
    """

    network: Any
    tokenizer: Any
    path: Path
    weights: str
    info: ModelInfo | None
    quantised: list[str]
    kept: list[str]
    disk_bytes: int
    adapter: Path | None = None
    block_size: int | None = field(default=None, kw_only=True)
    double_quant: bool | None = field(default=None, kw_only=True)


def compute_dtype() -> torch.dtype:
    """What this machine multiplies 16-bit weights in: bfloat16 where the CPU has the instructions, else float32."""
    from fourscore.machine import has_bf16

    return torch.bfloat16 if has_bf16() else torch.float32


def load(
    name_or_path: str | Path,
    weights: Weights = "nf4",
    adapter: Path | None = None,
    *,
    block_size: int | None = None,
    double_quant: bool | None = None,
    trainable: bool = False,
    device: Device = "auto",
) -> Model:
    """Load a model: a catalog name, a hub name or a folder, fetched when need be.

    weights: `nf4` (what is not quantised stays bfloat16), `bf16` or `f32`. A folder that bitsandbytes or fourscore wrote in
    NF4 loads as nf4 with the block size of its file. adapter: a PEFT folder made for this very base, or for what was split from it and
    stands beside the adapter. block_size, double_quant: as the adapter was trained where not given, else 64 and True. trainable:
    training mode and trainable adapter; the weights of the base are frozen either way. device: `auto` is the GPU where torch sees one
    and bitsandbytes is installed, else the CPU. Errors: unknown weights, damaged files, pickles, a foreign adapter, mixture-of-experts
    weights with nf4.
    """
    if weights not in _DTYPES:
        raise FourscoreError(f"no weights `{weights}`", todo=f"use {', '.join(_DTYPES)}")
    path, trained = check_folder(pull(name_or_path)), dict[str, Any]()
    if adapter is not None:
        from fourscore.model.adapter import attach, base_of, record_of

        path, trained = check_folder(base_of(Path(adapter), path)), record_of(Path(adapter))
    block_size = block_size or trained.get("block_size") or 64
    if double_quant is None:
        double_quant = trained.get("double_quant") is not False
    tokenizer = load_tokenizer(path)
    with _quiet_loading():
        network, quantised, held = _network(path, weights, block_size, double_quant)
    network = place(network, device, weights)
    network.requires_grad_(False)
    network.train(trainable)
    info = describe(path) if (path / PROVENANCE).exists() else None
    size, double = held if held else (None, None)
    model = Model(
        network, tokenizer, path, weights, info, quantised, _kept(network), form_bytes(network), block_size=size, double_quant=double
    )
    if adapter is None:
        return model
    return attach(model, Path(adapter), trainable)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory; code that the directory brings along is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FourscoreError(
            f"its tokenizer cannot be read ({_first_line(error)})", where=str(path), todo="fetch the model again"
        ) from error


def _network(path: Path, weights: str, block_size: int, double_quant: bool) -> tuple[Any, list[str], tuple[int, bool] | None]:
    config = read_json(path / "config.json")
    if config.get("quantization_config"):
        return _prequantised(path, weights, config["quantization_config"])
    if weights == "nf4":
        network = _quantised(path, block_size, double_quant)
        return network, _nf4_layers(network), (block_size, double_quant)
    network = _from_pretrained(path, _DTYPES[weights])
    if weights == "f32":
        release_pages(weight_files(path))
    return network, [], None


def _from_pretrained(path: Path, dtype: torch.dtype, **quantised: Any) -> Any:
    """transformers' own loading; weights that are missing or do not fit are errors."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from fourscore.nf4.transformers_quantizer import own_errors

    try:
        with own_errors():
            # attention: transformers takes torch's fused one wherever the architecture allows it (Gemma 2 does not)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **quantised
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FourscoreError(
            f"transformers cannot load it ({_first_line(error)})", where=str(path), todo="check that it is a causal language model"
        ) from error
    network, report = loaded
    _refuse_gaps(path, report)
    return network


def _refuse_gaps(path: Path, report: dict[str, Any]) -> None:
    """A weight that the file lacks would be drawn at random: an error. One that nothing takes is left out: said."""
    for key, what in (("missing_keys", "weights are missing from the file"), ("mismatched_keys", "weights have another shape")):
        if names := sorted(str(n) for n in report.get(key) or ()):
            raise FourscoreError(f"{len(names)} {what} ({names[0]})", where=str(path), todo="get a complete copy of the model")
    if names := sorted(str(n) for n in report.get("unexpected_keys") or ()):
        say(f"{path}: {len(names)} weights of the file have no place in the network and are left out ({names[0]}, ...)")


def _quantised(path: Path, block_size: int, double_quant: bool) -> Any:
    """Quantise every linear layer as transformers hands its weight out, so that no second layer is ever dense."""
    from fourscore.nf4 import NF4Config

    config = NF4Config(block_size, double_quant)
    files = weight_files(path)
    with contextlib.ExitStack() as stack:
        bar: Bar | None = None
        read = 0

        def on_layer(dense_bytes: int, layers: int) -> None:
            nonlocal bar, read
            bar = bar or stack.enter_context(track("quantise to NF4", layers, "layers"))
            read += dense_bytes
            if read >= RELEASE_BYTES:
                read = 0
                release_pages(files)
                release_freed()
            bar.advance()

        config.on_layer = on_layer
        network = _from_pretrained(path, torch.bfloat16, quantization_config=config)
        config.on_layer = None  # the network keeps its settings
    release_pages(files)
    release_freed()
    return network


def _prequantised(path: Path, weights: str, facts: dict[str, Any]) -> tuple[Any, list[str], tuple[int, bool]]:
    if weights != "nf4":
        raise FourscoreError(
            f"holds quantised weights ({facts.get('quant_method')}), not {weights}",
            where=str(path),
            todo="use weights: nf4, or the original",
        )
    from fourscore.nf4.transformers_quantizer import prequantized_config

    network = _from_pretrained(path, torch.bfloat16, config=prequantized_config(path))
    layers = _nf4_layers(network)
    if not layers:
        raise FourscoreError("holds no NF4 weight although its config.json says so", where=str(path), todo="quantise the original again")
    first = network.get_submodule(layers[0])
    return network, layers, (first.block_size, first.double_quant)


def _nf4_layers(network: nn.Module) -> list[str]:
    from fourscore.nf4 import NF4Linear

    return [n for n, m in network.named_modules() if isinstance(m, NF4Linear)]


def _kept(network: nn.Module) -> list[str]:
    """Names of the matrices in 16 bit (norms and biases, which are vectors, left out); tied ones once."""
    return [n for n, p in network.named_parameters() if p.dim() >= 2 and p.dtype in (torch.bfloat16, torch.float16)]


def form_bytes(network: nn.Module) -> int:
    """Bytes of all tensors that a file of this network would hold: tied weights once, every NF4 layer with its own tables."""
    from fourscore.nf4 import NF4Linear
    from fourscore.nf4.layout import to_tensors

    total = sum(p.numel() * p.element_size() for p in network.parameters())
    for module in network.modules():
        if isinstance(module, NF4Linear):
            total += sum(t.numel() * t.element_size() for part, t in to_tensors(module.quantised).items() if part)
    return total


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers' own bar and its table of odd weights would stand beside ours, also where output is meant for machines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logger = getLogger("transformers.modeling_utils")
    logger.addFilter(_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_no_report)
        if shown:
            logging.enable_progress_bar()


def _no_report(record: LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
