"""The catalog: short names of models, with licence, size, sources and what a reader must know. Imports neither torch nor transformers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, read_json

PROVENANCE = "fourscore.json"


@dataclass(frozen=True)
class HubSource:
    """A repository of the model hub at a pinned commit; `sha256` names files whose hash is known beforehand."""

    repository: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WheelSource:
    """A file inside a published wheel."""

    package: str
    version: str
    sha256: str
    member: str
    note: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a model. `source` is None for a catalog entry, else where these very weights came from.

    licence: SPDX expression, None when unknown. parameters: tied weights once. bytes: 16-bit weights on disk.
    """

    name: str
    title: str
    licence: str | None
    parameters: int | None
    bytes: int | None
    note: str
    hub: HubSource | None = None
    wheel: WheelSource | None = None
    source: str | None = None
    revision: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Where it can be fetched, in the order in which `auto` tries."""
        return tuple(s for s, there in (("hub", self.hub), ("wheel", self.wheel)) if there is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and the report."""
        return asdict(self) | {"sources": list(self.sources)}


@cache
def _entries() -> dict[str, ModelInfo]:
    text = Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8")
    entries = {}
    for name, entry in tomllib.loads(text).items():
        hub, wheel = entry.pop("hub", None), entry.pop("wheel", None)
        entries[name] = ModelInfo(name=name, hub=HubSource(**hub) if hub else None, wheel=WheelSource(**wheel) if wheel else None, **entry)
    return entries


def catalog() -> list[ModelInfo]:
    """Every model of the catalog, in the file's order; the note speaks of every source."""
    return [describe(name) for name in _entries()]


def entry(name: str) -> ModelInfo | None:
    """The catalog's entry of that name (upper and lower case alike), or None."""
    return _entries().get(name.lower())


def unknown(name: str) -> FourscoreError:
    """The error for a name that is neither in the catalog, nor a hub name, nor a folder."""
    return FourscoreError(
        f"no model `{name}`: it is not in the catalog ({', '.join(_entries())}), no folder, and no hub name `owner/model`",
        todo="check the spelling, or give the path of a transformers folder",
    )


def from_source(info: ModelInfo, source: str, revision: str | None = None) -> ModelInfo:
    """The entry as it stands for weights from one source: with the note that belongs to them."""
    extra = info.wheel.note if source == "wheel" and info.wheel else ""
    return replace(info, source=source, revision=revision, note=" ".join(t for t in (info.note, extra) if t))


def describe(name: str | Path) -> ModelInfo:
    """What is known of a catalog name, a pulled folder (its fourscore.json), another folder, or a hub name.

    A catalog name's note speaks of every source; a pulled folder's note of the weights in it.
    """
    path = Path(name)
    if (known := entry(str(name))) is not None:
        extra = f" From the wheel: {known.wheel.note}" if known.wheel and known.wheel.note else ""
        return replace(known, note=known.note + extra)
    if path.is_dir():
        if (path / PROVENANCE).exists():
            return _from_provenance(read_json(path / PROVENANCE))
        return ModelInfo(name=path.name, title=path.name, licence=None, parameters=None, bytes=None, note="", source="folder")
    if is_hub_name(str(name)):
        hub = HubSource(str(name))
        return ModelInfo(name=str(name), title=str(name), licence=None, parameters=None, bytes=None, note="", hub=hub)
    raise unknown(str(name))


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form `owner/model`."""
    parts = name.split("/")
    return len(parts) == 2 and all(p and not p.startswith((".", "~")) and all(c.isalnum() or c in "._-" for c in p) for p in parts)


def _from_provenance(record: dict[str, Any]) -> ModelInfo:
    known = entry(record["name"])
    return ModelInfo(
        name=record["name"],
        title=known.title if known else record["name"],
        licence=record["licence"],
        parameters=record["parameters"],
        bytes=known.bytes if known else None,
        note=record["note"],
        hub=known.hub if known else (HubSource(record["repository"], record["revision"]) if record["repository"] else None),
        wheel=known.wheel if known else None,
        source=record["source"],
        revision=record["revision"],
    )
