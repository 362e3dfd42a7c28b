"""Checkpoints: everything a run needs to go on to the same weights, bit for bit, as if it had never stopped.

A folder `step-<n>` holds safetensors and JSON (nothing is pickled). It appears under its name only when whole, and the
one before it goes only after that, so a kill at any moment leaves a usable checkpoint. A checkpoint of another run
(other settings, rows, seed, kernels or threads) is refused.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourscore.files import FourscoreError, atomic_folder, hash_file, read_json, write_json

PARTS = ("adapter", "best", "optimiser", "random")


@dataclass
class Checkpoint:
    """The state after `state["step"]` steps. Tensors by name; `state` is JSON: counters, losses, the best so far."""

    adapter: dict[str, Tensor]
    best: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, key: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write `folder/step-<n>` whole, then remove older ones. `key` says which run this is."""
    target = folder / f"step-{checkpoint.state['step']:08d}"
    with atomic_folder(target) as part:
        hashes = {}
        for name in PARTS:
            file = part / f"{name}.safetensors"
            save_file({k: v.contiguous() for k, v in getattr(checkpoint, name).items()}, file)
            _flush(file)
            hashes[file.name] = hash_file(file)
        write_json(part / "state.json", {"key": key, "state": checkpoint.state, "sha256": hashes})
    for older in _folders(folder):
        if older != target:
            shutil.rmtree(older)


def load_checkpoint(folder: Path, key: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint below `folder`, or None. One of another run, or a damaged one, is a FourscoreError."""
    found = _folders(folder)
    if not found:
        return None
    newest = found[-1]
    record = read_json(newest / "state.json")
    other = {k for k in key.keys() | record["key"].keys() if key.get(k) != record["key"].get(k)}
    if other:
        told = ", ".join(sorted(_tell(k, record["key"].get(k), key.get(k)) for k in other))
        raise FourscoreError(
            f"this checkpoint belongs to another run: {told}",
            where=str(newest),
            todo="go back to what it was started with, or delete that folder to start again",
        )
    parts = {}
    for name in PARTS:
        file = newest / f"{name}.safetensors"
        try:
            if hash_file(file) != record["sha256"][file.name]:
                raise FourscoreError("the checkpoint is damaged", where=str(file), todo="delete its folder to start again")
            parts[name] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise FourscoreError(f"the checkpoint is damaged ({error})", where=str(file), todo="delete its folder to start again") from None
    return Checkpoint(**parts, state=record["state"])


def remove_checkpoints(folder: Path) -> None:
    """Remove what `save_checkpoint` wrote, whole or half: the run is finished."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)


def random_state() -> dict[str, Tensor]:
    """torch's random streams, the only ones training draws from (dropout)."""
    return {"torch": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})}


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Undo of `random_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)) if folder.exists() else []


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tell(name: str, was: Any, now: Any) -> str:
    if isinstance(was, str | int | float | None) and isinstance(now, str | int | float | None) and len(f"{was}{now}") < 40:
        return f"{name} was {was}, is {now}"
    if isinstance(was, dict) and isinstance(now, dict):
        inner = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        return "; ".join(_tell(f"{name}.{k}", was.get(k), now.get(k)) for k in inner)
    return f"{name} differs"
