"""What is to be served: a run of a study, or a model and adapters; and whether these are the bytes that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fourscore.files import FourscoreError, hash_file, read_json

if TYPE_CHECKING:
    from fourscore.engine import Engine

WEIGHTS = "adapter_model.safetensors"  # what the report's hash of an adapter is taken over


@dataclass(frozen=True)
class Served:
    """One name of /v1/models. adapter: its name in the engine, None for the base. verdict: the study's, where it judged this one."""

    id: str
    adapter: str | None
    base_sha256: str
    adapter_sha256: str | None
    verified: bool
    verdict: str | None = None


@dataclass(frozen=True)
class Source:
    """Everything to load. faults: where the bytes differ from the evaluated ones; empty for a model that no study judged.

    notes: what whoever starts the server should read. evaluated: a study stands behind it.
    """

    base: Path
    weights: Literal["nf4", "bf16", "f32"]
    block_size: int
    double_quant: bool
    adapters: Mapping[str, Path]
    models: tuple[Served, ...]
    evaluated: bool = False
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def engine(self) -> Engine:
        """Load the model with its adapters."""
        from fourscore.engine import Engine
        from fourscore.model import load

        model = load(self.base, self.weights, block_size=self.block_size, double_quant=self.double_quant)
        return Engine(model, adapters=dict(self.adapters))


def find_source(
    what: str, adapters: Mapping[str, Path], weights: Literal["nf4", "bf16", "f32"] | None = None, *, unverified: bool = False
) -> Source:
    """A run folder (it has an evidence.jsonl or a report.json), else a model. Bytes that differ from the evaluated ones are an error.

    unverified: serve them all the same; each fault is then told, and /v1/models says so.
    """
    folder = Path(what)
    if (folder / "evidence.jsonl").is_file() or (folder / "report.json").is_file():
        if adapters or weights:
            raise FourscoreError("a run names its adapter and its weights", where=what, todo="leave out --adapter and --weights")
        source = _of_run(folder)
    else:
        source = _of_model(what, adapters, weights or "nf4")
    if source.faults and not unverified:
        more = f" (and {len(source.faults) - 1} more)" if len(source.faults) > 1 else ""
        raise FourscoreError(
            f"not the bytes that were evaluated: {source.faults[0]}{more}",
            where=what,
            todo="run the study again, or serve it with --unverified",
        )
    return source


def adapter_options(given: list[str]) -> dict[str, Path]:
    """name=folder, as the command line has them; a folder alone is named after its last part."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name
        if not name or name in found:
            raise FourscoreError(f"{'two adapters are' if name else 'an adapter is'} named `{name}`", where=text, todo="use name=folder")
        found[name] = path
    return found


def _of_model(what: str, adapters: Mapping[str, Path], weights: Literal["nf4", "bf16", "f32"]) -> Source:
    from fourscore.model import base_sha256, check_adapter, pull

    base = pull(what)
    name, digest = _name_of(what), base_sha256(base)
    models = [Served(name, None, digest, None, False)]
    for adapter, folder in adapters.items():
        if adapter == name:
            raise FourscoreError(f"the adapter is named like its base, `{name}`", where=str(folder), todo="give it another name")
        check_adapter(folder, base)
        models.append(Served(adapter, adapter, digest, hash_file(folder / WEIGHTS), False))
    return Source(base, weights, 64, True, dict(adapters), tuple(models))


def _of_run(run: Path) -> Source:
    """A run: the adapter that ships, on the base and with the 4-bit settings that its study measured it with."""
    from fourscore.model import base_sha256
    from fourscore.spec import NEW_BASE, read_study
    from fourscore.study import evidence
    from fourscore.study.inputs import find_inputs

    study = read_study(run / "study.yaml")
    report = read_json(run / "report.json")
    shipped, hashes = report["verdict"].get("shipped") or {}, report["reproduce"]["hashes"]
    if not (run / "adapter" / WEIGHTS).is_file():
        raise FourscoreError("this run has no adapter to serve", where=str(run), todo="finish the study with `fourscore run`")
    faults = [*evidence.check_chain(run), *_published_faults(run)]
    if study.digest() != report["study"]["digest"]:
        faults.append("study.yaml: changed since the report was written")
    base = find_inputs(study).base
    digest, adapter_digest = base_sha256(base), hash_file(run / "adapter" / WEIGHTS)
    if digest != hashes.get("base model"):
        faults.append(f"the base model's files: {digest[:12]}, evaluated was {str(hashes.get('base model'))[:12]}")
    if adapter_digest != shipped.get("adapter_sha256"):
        faults.append(f"adapter/{WEIGHTS}: {adapter_digest[:12]}, evaluated was {str(shipped.get('adapter_sha256'))[:12]}")
    name, verdict = study.study, report["verdict"]["verdict"]
    tuned = Served(name, name, digest, adapter_digest, not faults, verdict)
    models: tuple[Served, ...] = (Served(_name_of(study.model.name), None, digest, None, not faults), tuned)
    if study.train.init in NEW_BASE:  # its adapter works on what is left of the base, which nobody judged alone
        base, models = _residual(run), (tuned,)
    form = study.model
    notes = [*_other_environment(run)] + ([f"the study's verdict was {verdict}"] if verdict != "PASS" else [])
    adapters = {name: run / "adapter"}
    return Source(base, "nf4", form.block_size, form.double_quant, adapters, models, True, tuple(faults), notes=tuple(notes))


def _published_faults(run: Path) -> list[str]:
    """The report, the verdict and the adapter in the run folder must be what the newest finished steps wrote."""
    wanted: dict[str, str] = {}
    for record in _records(run):
        if record["step"] == "verdict":
            wanted |= {name: digest for name, digest in record["outputs"].items() if name == "verdict.json" or name.startswith("adapter/")}
        elif record["step"] == "report":
            wanted["report.json"] = record["outputs"].get("report.json", "")
    faults = [] if "report.json" in wanted else ["report.json: no finished step wrote it"]
    for name, digest in wanted.items():
        if not (run / name).is_file():
            faults.append(f"{name}: missing")
        elif hash_file(run / name) != digest:
            faults.append(f"{name}: changed since it was published")
    there = {path.relative_to(run).as_posix() for path in (run / "adapter").rglob("*") if path.is_file()}
    return faults + [f"{name}: not among the files that were evaluated" for name in sorted(there - wanted.keys())]


def _records(run: Path) -> list[dict[str, Any]]:
    """The records of the chain that the report follows from, in order; a broken chain is told by `check_chain`."""
    from fourscore.study import evidence

    try:
        folders = dict.fromkeys(line["folder"] for line in evidence.read_chain(run))
        records = [read_json(run / "steps" / folder / "record.json") for folder in folders]
    except (FourscoreError, KeyError, TypeError):
        return []
    digest = hash_file(run / "report.json")
    reports = [r for r in records if r["step"] == "report" and r["outputs"].get("report.json") == digest]
    if not reports:
        return []
    keys = {needed["key"] for needed in reports[-1]["needs"].values()}
    return [r for r in records if r["key"] in keys or r is reports[-1]]


def _other_environment(run: Path) -> list[str]:
    """Versions and kernels that differ from those which measured: rounding may, too."""
    from fourscore.nf4 import backend
    from fourscore.study import environment

    then: dict[str, Any] = next((r["environment"] for r in _records(run) if r["step"].startswith("evaluate-qlora")), {})
    now = {**environment.versions(), "kernels": backend()}
    before = {**then.get("versions", {}), "kernels": then.get("kernels")}
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) not in (None, now[name])]
    return [f"measured with other versions, so that rounding may differ: {', '.join(changed)}"] if changed else []


def _residual(run: Path) -> Path:
    found = [r for r in _records(run) if r["step"] == "residual"]
    folder = next(run.glob(f"steps/residual-{found[0]['key'][:12]}/base"), None) if found else None
    if folder is None:
        raise FourscoreError("the base of this run's adapter is missing", where=str(run / "steps"), todo="run the study again")
    return folder


def _name_of(model: str) -> str:
    """A catalog or hub name as it is; a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model
