"""A step: a pure function of its inputs' hashes that writes one folder and one record.

A step's folder is named after its key. The key covers the part of the study the step reads, the outputs of the steps it
needs, and the environment (versions, kernels, dtype, threads). The folder is filled under a name that starts with a dot
and renamed when its record is complete, so a folder with a final name is a finished step, always.

Some outputs are measured (seconds, joules) and differ from run to run; they are hashed into the record but are not part
of any later key. What a later step may depend on is listed in `Step.pure`.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourscore.files import hash_folder, hash_json, read_json, write_json
from fourscore.spec import Study

RECORD = "record.json"


@dataclass(frozen=True)
class Context:
    """What a running step sees: its name, the study, the base model's folder, its own folder to fill, the finished folders."""

    step: str
    study: Study
    base: Path
    out: Path
    folders: Mapping[str, Path]
    run: Path


@dataclass(frozen=True)
class Step:
    """One node of the graph. `settings` are the parts of the study that its result depends on.

    `pure`: outputs that are the same on every run, the only ones a later key holds; a `measured` step reads the others too.
    """

    name: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    work: Callable[[Context], None]
    pure: tuple[str, ...] = ("*",)
    title: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Finished:
    """A finished step: its folder, and its record as written."""

    name: str
    folder: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def result_hash(self) -> str:
        """Hash of the outputs that later steps may depend on."""
        return str(self.record["result"])

    def hash_for(self, step: Step) -> str:
        """What `step` depends on: this step's result, or all of its outputs where `step` reads measured values too."""
        return hash_json(self.record["outputs"]) if step.measured else self.result_hash


def step_key(step: Step, needs: Mapping[str, Finished], environment: Mapping[str, Any]) -> str:
    """SHA-256 over everything the step's result depends on, in hex."""
    return hash_json(
        {
            "step": step.name,
            "settings": dict(step.settings),
            "needs": {name: needs[name].hash_for(step) for name in step.needs},
            "environment": dict(environment),
        }
    )


def folder_of(run: Path, step: Step, key: str) -> Path:
    """Where the finished step stands."""
    return run / "steps" / f"{step.name}-{key[:12]}"


def work_folder_of(run: Path, step: Step, key: str) -> Path:
    """Where the step works until it is finished. It survives a crash: a step may resume from what it finds there."""
    return run / "steps" / f".{step.name}-{key[:12]}.part"


def find_finished(run: Path, step: Step, key: str) -> Finished | None:
    """The finished step of this key, or None."""
    folder = folder_of(run, step, key)
    if not (folder / RECORD).is_file():
        return None
    return Finished(step.name, folder, read_json(folder / RECORD))


def finish(
    run: Path, step: Step, key: str, needs: Mapping[str, Finished], environment: Mapping[str, Any], seconds: float, resumed: bool
) -> Finished:
    """Write the record of a step whose work is done and give its folder the final name.

    seconds: of this process; `resumed` says that an earlier one had begun the step.
    """
    work, folder = work_folder_of(run, step, key), folder_of(run, step, key)
    (work / RECORD).unlink(missing_ok=True)
    sweep(work)
    outputs = hash_folder(work)
    record = {
        "step": step.name,
        "key": key,
        "settings": dict(step.settings),
        "needs": {name: {"key": needs[name].record["key"], "result": needs[name].hash_for(step)} for name in step.needs},
        "environment": dict(environment),
        "outputs": outputs,
        "result": result_hash(step, outputs),
        "seconds": round(seconds, 3),
        "resumed": resumed,
    }
    for name in outputs:
        _flush_to_disk(work / name)
    write_json(work / RECORD, record)
    if folder.exists():  # without a readable record it is nobody's result
        shutil.rmtree(folder)
    os.replace(work, folder)
    return Finished(step.name, folder, record)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left behind."""
    for path in sorted(folder.rglob(".*")):
        if path.name.endswith((".part", ".old")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def result_hash(step: Step, outputs: Mapping[str, str]) -> str:
    """Hash over the outputs that match the step's `pure` patterns."""
    return hash_json({name: digest for name, digest in outputs.items() if any(fnmatch.fnmatch(name, p) for p in step.pure)})


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
