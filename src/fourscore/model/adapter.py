"""LoRA adapters as PEFT keeps them: made with a seed, saved with the hash of their base, read without opening a pickle."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fourscore.files import FourscoreError, atomic_folder, read_json, write_json
from fourscore.model.device import seeded
from fourscore.model.folder import base_sha256, safetensors_header
from fourscore.model.loading import Model
from fourscore.model.names import PROVENANCE
from fourscore.progress import say
from fourscore.spec import NEW_BASE, Train

if TYPE_CHECKING:
    from peft import LoraConfig

    from fourscore.data import Row

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_BASE = "base"  # the folder beside an adapter's that holds the base which was split for it


def add_lora(model: Model, settings: Train, seed: int, rows: Sequence[Row] | None = None) -> Model:
    """A fresh LoRA adapter on a model, in training mode: float32 parameters, everything else frozen.

    The same seed gives the same parameters bit for bit, whatever form the base has (A: Kaiming uniform as in PEFT, B: zero; or as
    `settings.init` says; rows: the training rows, which `eva` reads). The output layer is never a target. The caller's random state
    is untouched. Errors: a target that names no linear layer; a start that this base, rank or lack of rows does not allow.
    """
    from peft import get_peft_model
    from peft.peft_model import PeftModel

    if isinstance(model.network, PeftModel):
        raise FourscoreError("this model has an adapter already", where=str(model.adapter or model.path), todo="load it without one")
    if settings.init in NEW_BASE:
        raise FourscoreError(
            f"`init: {settings.init}` begins with a base of its own",
            where="train.init",
            todo="make both with `fourscore.model.split_base`, and load its adapter on its base",
        )
    if settings.init == "eva" and not rows:
        raise FourscoreError("`init: eva` reads the training rows, and none are given", where="add_lora", todo="pass rows=")
    config = lora_config(model, settings)
    with seeded(seed, model.network):
        with peft_seam():
            network = cast(nn.Module, get_peft_model(model.network, config))
        # PEFT draws in the order of a set and rounds to the base's dtype: drawn again, on the CPU, so that only the seed decides
        for name, parameter in sorted(network.named_parameters()):
            if "lora_" in name:
                parameter.data = parameter.data.float()
                if "lora_A" in name:
                    parameter.data = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5)).to(parameter.device)
                elif "lora_B" in name:
                    nn.init.zeros_(parameter)
        model = replace(model, network=network, adapter=None)
        _start(model, settings, seed, rows)
    network.train()
    return model


def _start(model: Model, settings: Train, seed: int, rows: Sequence[Row] | None) -> None:
    """Write A and B as `settings.init` wants them, then DoRA's magnitudes, which follow from them."""
    from fourscore.model import initialise
    from fourscore.model.dora import reset_magnitudes

    if settings.init == "loftq":
        initialise.start_at_quantisation_error(model)
    elif settings.init == "eva":
        with peft_seam():
            initialise.start_along_data(model, rows or (), seed)
    config = model.network.peft_config["default"]
    config.base_model_name_or_path = base_name(model)
    config.init_lora_weights, config.eva_config = True, None  # whoever loads the adapter must not start it again
    if settings.method == "dora":
        reset_magnitudes(model.network)


def lora_config(model: Model, settings: Train) -> LoraConfig:
    """The settings as PEFT keeps them."""
    from peft import EvaConfig, LoraConfig

    eva = settings.init == "eva"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT computes with it as a float
        lora_dropout=settings.dropout,
        target_modules=target_names(model.network, settings.targets),
        task_type="CAUSAL_LM",
        bias="none",
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        init_lora_weights="eva" if eva else True,
        eva_config=EvaConfig() if eva else None,
    )


def target_names(network: nn.Module, targets: str | list[str]) -> list[str]:
    """What PEFT is told: the endings of the linear layers that `targets` names, sorted; the output layer is never among them."""
    from fourscore.nf4.layer import matching_names

    output = cast(Any, network).get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m is not output]
    chosen = set(matching_names(names, targets))
    if not chosen:
        raise FourscoreError("no linear layer to adapt", where="train.targets", todo="check the model")
    endings = sorted({n.rsplit(".", 1)[-1] for n in chosen})
    # short endings where they mean the same layers, else full names; PEFT matches endings among all modules
    every = [n for n, m in network.named_modules() if any(n == e or n.endswith(f".{e}") for e in endings)]
    return endings if set(every) == chosen else sorted(chosen)


@contextmanager
def peft_seam() -> Iterator[None]:
    """PEFT makes or loads adapters inside the block: its DoRA layers as ours, and without warnings that no user can mend.

    (PEFT 0.21 asks transformers for a property that transformers renamed, and advises on EVA's memory what cannot be set here.)
    """
    from fourscore.model.dora import tiled_dora

    with warnings.catch_warnings(), tiled_dora():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*eva initialization used with low_cpu_mem_usage.*")
        yield


def base_name(model: Model) -> str:
    """What an adapter calls its base: the hub's name where there is one, else the catalog's or the folder's last part."""
    if model.info is None:
        return model.path.name
    return model.info.hub.repository if model.info.hub else model.info.name


def save_adapter(model: Model, folder: Path) -> Path:
    """Write the adapter as PEFT does (adapter_config.json, adapter_model.safetensors) and fourscore.json beside it, atomically.

    fourscore.json: `base_sha256` of the base's files, `base`, `weights` (the form it was trained on), block size; and of a base that was
    split for its adapters `split_from`, the name and hash of what it was before.
    """
    from peft.peft_model import PeftModel

    if not isinstance(model.network, PeftModel):
        raise FourscoreError("this model has no adapter to save", where=str(folder), todo="make one with `add_lora`")
    record = {
        "base": base_name(model),
        "base_sha256": base_sha256(model.path),
        "base_source": model.info.source if model.info else "folder",
        "weights": model.weights,
        "block_size": model.block_size,
        "double_quant": model.double_quant,
    }
    if (origin := record_of(model.path).get("split_from")) is not None:
        record["split_from"] = origin
    with atomic_folder(folder) as part:
        model.network.save_pretrained(str(part), save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's template says nothing: the report writes the model card
        config = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        if isinstance(config.get("target_modules"), list):
            config["target_modules"].sort()  # PEFT writes a set in any order
        config["base_model_name_or_path"] = base_name(model)
        write_json(part / CONFIG, config)
        write_json(part / PROVENANCE, record)
    return folder


def check_adapter(folder: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """The adapter's configuration, if the folder holds a whole PEFT adapter in safetensors, made for the base at `base`.

    Errors: missing files, pickled or truncated weights, a `base_sha256` in fourscore.json other than the base's.
    """
    root = Path(folder)
    if not (root / CONFIG).is_file():
        raise FourscoreError(f"not an adapter: no {CONFIG}", where=str(root), todo="give the folder that training wrote")
    config: dict[str, Any] = read_json(root / CONFIG)
    if not (root / WEIGHTS).is_file():
        if (root / "adapter_model.bin").exists():
            what = "the adapter is a pickle, which can run code when opened and is never loaded"
            raise FourscoreError(what, where=str(root), todo="save it as safetensors where you trust it")
        raise FourscoreError(f"not an adapter: no {WEIGHTS}", where=str(root), todo="give the folder that training wrote")
    safetensors_header(root / WEIGHTS)
    if base is not None and (record := record_of(root)):
        wanted, found = record.get("base_sha256"), base_sha256(base)
        if wanted != found:
            raise FourscoreError(
                f"the adapter was made for another base ({record.get('base')}, {str(wanted)[:12]}), this one is {found[:12]}",
                where=str(root),
                todo="load it on the base it was trained on",
            )
    return config


def record_of(folder: Path) -> dict[str, Any]:
    """What fourscore.json in a folder says; empty where there is none."""
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}


def base_of(adapter: Path, asked: Path) -> Path:
    """The base to load for an adapter: the folder asked for, or what was split from it for this adapter and stands beside it as `base`.

    A FourscoreError where such a base is wanted and is not there.
    """
    record = record_of(adapter)
    origin = record.get("split_from")
    if origin is None or base_sha256(asked) != origin["sha256"]:
        return asked
    own = adapter.parent / OWN_BASE
    if own.is_dir() and base_sha256(own) == record["base_sha256"]:
        say(f"{adapter}: works on the base that was split for it, {own}")
        return own
    raise FourscoreError(
        f"the adapter works on a base of its own ({record['base']}, {record['base_sha256'][:12]}), "
        + ("and the one beside it is another" if own.is_dir() else "which is not beside it"),
        where=str(own),
        todo=f"put the run's `{OWN_BASE}` folder there, or load that base by its path",
    )


def attach(model: Model, folder: Path, trainable: bool = False) -> Model:
    """The model with the adapter of a PEFT folder on it. Every weight of the file must find its place, and every place its weight."""
    from peft import PeftModel, get_peft_model_state_dict

    check_adapter(folder, model.path)
    held = safetensors_header(folder / WEIGHTS).keys()
    try:
        with peft_seam():
            network = PeftModel.from_pretrained(model.network, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise FourscoreError(f"the adapter does not fit the model ({line})", where=str(folder), todo="load it on its own base") from error
    wanted = get_peft_model_state_dict(network, save_embedding_layers=False).keys()
    if odd := sorted(held ^ wanted):
        raise FourscoreError(
            f"{len(odd)} weights of the adapter do not fit the model ({odd[0]})", where=str(folder), todo="load it on its own base"
        )
    network.train(trainable)
    return replace(model, network=network, adapter=folder)
