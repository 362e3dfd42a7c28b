"""From a transformers directory to a network: dense, or quantised to NF4 one layer at a time, or NF4 from the file.

Dense weights are memory-mapped: the 4-bit path never holds a dense copy of the model, and gives every layer's pages back to
the system once the layer is quantised, so that peak memory says what this form of the model needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fourscore.files import FourscoreError, read_json
from fourscore.model.folder import check_folder, weight_files
from fourscore.model.names import PROVENANCE, ModelInfo, describe
from fourscore.model.pages import release_pages
from fourscore.model.sources import pull
from fourscore.progress import say, track

Weights = Literal["nf4", "bf16", "f32"]
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
    block_size: int = 64,
    double_quant: bool = True,
    trainable: bool = False,
) -> Model:
    """Load a model: a catalog name, a hub name or a folder, fetched when need be.

    weights: `nf4` (what is not quantised stays bfloat16), `bf16` or `f32`. A folder that bitsandbytes or fourscore wrote in
    NF4 loads as nf4 with the block size of its file. adapter: a PEFT folder made for this very base. trainable: training mode and
    trainable adapter; the weights of the base are frozen either way. Errors: unknown weights, damaged files, pickles, a
    foreign adapter, mixture-of-experts weights with nf4.
    """
    if weights not in _DTYPES:
        raise FourscoreError(f"no weights `{weights}`", todo=f"use {', '.join(_DTYPES)}")
    path = check_folder(pull(name_or_path))
    tokenizer = load_tokenizer(path)
    with _quiet_loading():
        network, quantised, held = _network(path, weights, block_size, double_quant)
    network.requires_grad_(False)
    network.train(trainable)
    info = describe(path) if (path / PROVENANCE).exists() else None
    size, double = held if held else (None, None)
    model = Model(
        network, tokenizer, path, weights, info, quantised, _kept(network), form_bytes(network), block_size=size, double_quant=double
    )
    if adapter is None:
        return model
    from fourscore.model.adapter import attach

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
    network = _dense(path, _DTYPES[weights])
    if weights != "nf4":
        if weights == "f32":
            release_pages(weight_files(path))
        return network, [], None
    return network, _quantise(network, path, block_size, double_quant), (block_size, double_quant)


def _dense(path: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        # attention: transformers takes torch's fused one wherever the architecture allows it (Gemma 2 does not)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
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


def _quantise(network: Any, path: Path, block_size: int, double_quant: bool) -> list[str]:
    from fourscore.nf4 import replace_linears
    from fourscore.nf4.layer import check_experts, linear_names

    check_experts(network)
    names = linear_names(network)
    if not names:
        raise FourscoreError("no linear layer to quantise", where=str(path), todo="use weights: bf16")
    files = weight_files(path)
    done: list[str] = []
    with track("quantise to NF4", len(names), "layers") as bar:
        for name in names:
            done += replace_linears(network, targets=[name], block_size=block_size, double_quant=double_quant)
            release_pages(files)
            bar.advance()
    return done


def _prequantised(path: Path, weights: str, facts: dict[str, Any]) -> tuple[Any, list[str], tuple[int, bool]]:
    if weights != "nf4":
        raise FourscoreError(
            f"holds quantised weights ({facts.get('quant_method')}), not {weights}",
            where=str(path),
            todo="use weights: nf4, or the original",
        )
    from fourscore.nf4 import NF4Linear, load_prequantized

    try:
        network = load_prequantized(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FourscoreError(
            f"transformers cannot load it ({_first_line(error)})", where=str(path), todo="quantise the original again"
        ) from error
    layers = {n: m for n, m in network.named_modules() if isinstance(m, NF4Linear)}
    if not layers:
        raise FourscoreError("holds no NF4 weight although its config.json says so", where=str(path), todo="quantise the original again")
    first = next(iter(layers.values()))
    return network, list(layers), (first.block_size, first.double_quant)


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
    """transformers' own bar would stand beside ours, also where output is meant for machines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
