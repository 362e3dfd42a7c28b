"""The weights of a transformers directory by name, and a copy of the directory with some of them changed.

Both go tensor by tensor over memory-mapped files, and give the pages back: memory holds the tensor at hand, not the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fourscore import nf4
from fourscore.files import FourscoreError, atomic_file, read_json, write_json
from fourscore.model.folder import safetensors_header, weight_files
from fourscore.model.names import PROVENANCE
from fourscore.model.pages import release_pages
from fourscore.nf4.layout import PARTS, from_tensors

INDEX = "model.safetensors.index.json"
_COPIED = (".json", ".jinja", ".txt", ".model")  # tokenizer, template, generation settings; never pickles or code
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_QUANT_PARTS = tuple(f".weight.{part}" for part in PARTS if part)


class Weights:
    """The tensors of a transformers directory. A layer that is NF4 in the file reads as dequantised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = weight_files(path)
        self._headers = {file: safetensors_header(file) for file in self.files}
        self._home = {name: file for file, header in self._headers.items() for name in header}

    def names(self, file: Path) -> list[str]:
        """The dense tensors of one file, in the file's order; the scales of quantised ones left out."""
        header = self._headers[file]
        return sorted((n for n in header if not n.endswith(_QUANT_PARTS)), key=lambda n: header[n]["data_offsets"])

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def is_quantised(self, name: str) -> bool:
        """Is this weight NF4 in the file?"""
        return f"{name}.absmax" in self._home

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the file has it (memory-mapped), NF4 as f32."""
        if not self.is_quantised(name):
            return self._read(name)
        parts = {part: self._read(f"{name}.{part}" if part else name) for part in PARTS if not part or f"{name}.{part}" in self._home}
        return nf4.dequantize(from_tensors(parts, where=name), torch.float32)

    def layer(self, name: str) -> Tensor:
        """The weight of the linear layer `name`; a FourscoreError where the file keeps it under another name."""
        if f"{name}.weight" not in self._home:
            raise FourscoreError(
                f"the weights of layer {name} do not stand in the file under that name", where=str(self.path), todo="use another model"
            )
        return self[f"{name}.weight"]

    def release(self) -> None:
        """Give the pages read so far back to the system."""
        release_pages(self.files)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def skeleton(path: Path) -> Any:
    """The network of a transformers directory without weights: its layers and their names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_shapes(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of the linear layers that NF4 would quantise, with [out, in]."""
    from fourscore.nf4.layer import linear_names

    layers: dict[str, Any] = {name: network.get_submodule(name) for name in linear_names(network)}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def rewrite(
    base: Path, out: Path, change: Callable[[str, Tensor], Tensor | None], *, dtype: torch.dtype = torch.bfloat16, told: dict[str, Any]
) -> None:
    """Copy the directory `base` to the empty folder `out` with its floating weights in `dtype`.

    change: (name, tensor as the file has it) -> the new tensor in any float dtype, rounded once; or None to keep it. Names, shards,
    tied weights, tokenizer and template stay. told: what fourscore.json of the copy says.
    """
    weights = Weights(base)
    for file in weights.files:
        names = weights.names(file)
        entries = {name: _entry(weights, name, dtype) for name in names}
        with atomic_file(out / file.name, "wb") as target:
            for part in _file_parts(entries, _changed(weights, names, change)):
                target.write(part)
    if (base / INDEX).exists():
        index = read_json(base / INDEX)
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.endswith(_QUANT_PARTS)}
        index["metadata"] = {"total_size": sum((out / f.name).stat().st_size for f in weights.files)}
        write_json(out / INDEX, index)
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    write_json(out / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    for file in base.iterdir():
        wanted = file.suffix in _COPIED or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_file() and wanted and file.name not in ("config.json", INDEX, PROVENANCE):
            shutil.copy(file, out / file.name)
    write_json(out / PROVENANCE, told)


def provenance(base: Path, name: str, source: str, note: str) -> dict[str, Any]:
    """What fourscore.json says of a directory made from `base`: its licence and size stay, its weights are no longer the hub's."""
    from fourscore.model.names import describe

    info = describe(base)
    kept = {"licence": info.licence, "parameters": info.parameters}
    return {"name": name, **kept, "note": note, "source": source, "repository": None, "revision": None}


def _changed(weights: Weights, names: Iterable[str], change: Callable[[str, Tensor], Tensor | None]) -> Iterator[Tensor]:
    for name in names:
        tensor = weights[name]
        new = change(name, tensor)
        if new is not None and new.shape != tensor.shape:
            raise FourscoreError(f"{name} is {list(tensor.shape)}, its change {list(new.shape)}", where=str(weights.path))
        yield tensor if new is None else new
        del tensor, new
        weights.release()


def _entry(weights: Weights, name: str, dtype: torch.dtype) -> tuple[torch.dtype, list[int]]:
    tensor = weights[name]
    return (dtype if tensor.is_floating_point() else tensor.dtype), list(tensor.shape)


def _file_parts(entries: dict[str, tuple[torch.dtype, list[int]]], tensors: Iterable[Tensor]) -> Iterator[Any]:
    """A safetensors file: header length, header padded to 8 bytes, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        if dtype not in _DTYPE_NAMES:
            raise FourscoreError(f"{name} is {dtype}", todo="only floating weights can be copied")
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for (dtype, _), tensor in zip(entries.values(), tensors, strict=True):
        yield tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
