"""What a transformers directory must hold, checked before anything is loaded from it; and its hash.

Knows the layout of safetensors files (8 bytes of header length, JSON header, data) and needs no torch to check them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, hash_file, hash_json, read_json

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HASHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "vocab.*", "merges.txt", "spiece.model", "tekken.json",
)  # fmt: skip
_AGAIN = "fetch it again (delete the folder and run `fourscore pull`)"


def safetensors_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file whose size agrees with them; else FourscoreError."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FourscoreError(f"truncated safetensors file: {size:,} bytes hold not even its header", where=str(path), todo=_AGAIN)
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FourscoreError(f"damaged safetensors header ({error})", where=str(path), todo=_AGAIN) from None
    if size != expected:
        word = "truncated" if size < expected else "damaged"
        raise FourscoreError(f"{word} safetensors file: {size:,} bytes where its header says {expected:,}", where=str(path), todo=_AGAIN)
    return header


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a model directory, every one that its index names. Pickled weights are refused, never opened."""
    root = Path(path)
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (root / name).is_file():
                raise FourscoreError(f"the index names `{name}`, which is not there", where=str(root), todo=_AGAIN)
        if names:
            return [root / name for name in names]
    if single.is_file():
        return [single]
    if pickles := sorted(f.name for pattern in _PICKLES for f in root.glob(pattern)):
        raise FourscoreError(
            f"the weights are pickles ({pickles[0]}), which can run code when opened and are never loaded",
            where=str(root),
            todo="get the safetensors version of this model, or convert it where you trust it",
        )
    if ggufs := sorted(f.name for f in root.glob("*.gguf")):
        raise FourscoreError(
            f"holds a GGUF file ({ggufs[0]}) and no safetensors weights", where=str(root), todo="use its transformers directory"
        )
    raise FourscoreError("no model.safetensors in this folder", where=str(root), todo="give the folder of a transformers model")


def check_folder(path: str | Path) -> Path:
    """Errors unless the folder holds a configuration, a tokenizer and whole safetensors weights. Cheap: reads headers only."""
    root = Path(path)
    if not (root / "config.json").is_file():
        raise FourscoreError("no config.json in this folder", where=str(root), todo="give the folder of a transformers model")
    read_json(root / "config.json")
    index = root / "model.safetensors.index.json"
    held: set[str] = set()
    for file in weight_files(root):
        held |= safetensors_header(file).keys()
    if index.exists() and (lacking := sorted(read_json(index)["weight_map"].keys() - held)):
        raise FourscoreError(f"{lacking[0]} stands in the index and in no file ({len(lacking)} such)", where=str(root), todo=_AGAIN)
    if not any((root / name).is_file() for name in _TOKENIZER):
        raise FourscoreError("no tokenizer in this folder", where=str(root), todo="put the model's tokenizer.json beside its weights")
    return root


_hashes: dict[tuple[Any, ...], str] = {}


def base_sha256(path: str | Path) -> str:
    """SHA-256 over weights, configuration and tokenizer of a model directory: names and hashes of the files, in order.

    Anything else in the folder (fourscore.json, a readme, generation settings) does not count. The same bytes give the same
    hash in every place; within one process an unchanged file is read once.
    """
    root = Path(path)
    files = {f for pattern in _HASHED for f in root.glob(pattern) if f.is_file()}
    return hash_json({f.name: _hash_once(f) for f in sorted(files)})


def _hash_once(path: Path) -> str:
    stat = path.stat()
    key = (path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key not in _hashes:
        _hashes[key] = hash_file(path)
    return _hashes[key]
