"""PiSSA and OLoRA: an adapter that starts as the main part of the weights, and the base that lacks it.

The base is an ordinary 16-bit directory, quantised like any other when it is loaded; the adapter names it by its hash, and both say
what it was split from. What the new base loses when it is rounded to 16 and to 4 bits is lost in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from fourscore.files import FourscoreError, atomic_folder
from fourscore.model.adapter import OWN_BASE, add_lora, save_adapter
from fourscore.model.dora import reset_magnitudes
from fourscore.model.folder import base_sha256, check_folder
from fourscore.model.initialise import lora_layers, principal
from fourscore.model.loading import load
from fourscore.model.names import describe
from fourscore.model.rewrite import Weights, linear_shapes, provenance, rewrite, skeleton
from fourscore.nf4.layer import matching_names
from fourscore.progress import track
from fourscore.spec import NEW_BASE, Train


def split_base(base: Path, settings: Train, out: Path) -> tuple[Path, Path]:
    """Split the base as `settings.init` (`pissa` or `olora`) says; gives the folders of the new base and of the adapter, in `out`.

    Together they compute what `base` did, within the rounding of the new base to 16 bit. The same base and settings give the same
    bytes. Errors: another init; a base without 16-bit weights; a rank that a layer does not have.
    """
    if settings.init not in NEW_BASE:
        raise FourscoreError(f"`init: {settings.init}` leaves the base as it is", where="train.init", todo="use `add_lora`")
    kind = cast(Literal["pissa", "olora"], settings.init)
    base = check_folder(base)
    weights, network = Weights(base), skeleton(base)
    targets = set(matching_names(list(linear_shapes(network)), settings.targets))
    if any(weights.is_quantised(f"{name}.weight") for name in targets):
        raise FourscoreError(f"`init: {kind}` needs the 16-bit weights", where=str(base), todo="give the folder that was quantised")
    scale = settings.alpha / (settings.rank**0.5 if settings.method == "rslora" else settings.rank)
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    name = f"{describe(base).name}-{kind}-r{settings.rank}"
    note = f"Not a model by itself: {describe(base).name} less the part with which a {kind} adapter of rank {settings.rank} starts."

    with track(f"split the base ({kind})", len(targets), "layers") as bar:

        def without_main_part(tensor: str, W: Tensor) -> Tensor | None:
            layer = tensor.removesuffix(".weight")
            if layer not in targets:
                return None
            W = W.float()
            halves[layer] = A, B = principal(W, settings.rank, scale, kind, name=layer)
            bar.advance()
            return torch.addmm(W, B, A, alpha=-scale)

        with atomic_folder(out / OWN_BASE) as part:
            origin = {"name": describe(base).name, "sha256": base_sha256(base)}
            rewrite(base, part, without_main_part, told=provenance(base, name, kind, note) | {"split_from": origin})
    if absent := sorted(targets - halves.keys()):
        raise FourscoreError(f"the weights of layer {absent[0]} do not stand in the file under that name", where=str(base))
    model = add_lora(load(out / OWN_BASE, weights="bf16", device="cpu"), settings.model_copy(update={"init": "lora"}), seed=0)
    for layer, (A, B) in halves.items():
        lora = lora_layers(model.network)[layer]
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = A, B
    reset_magnitudes(model.network)
    save_adapter(model, out / "adapter")
    return out / OWN_BASE, out / "adapter"
