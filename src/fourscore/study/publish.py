"""The run folder as people and programs read it: copies, under fixed names, of what finished steps wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from fourscore.files import atomic_file, atomic_folder, hash_file, hash_folder
from fourscore.study.steps import Finished

REPORT = ("report.html", "report.json", "model-card.md")


def places(done: Mapping[str, Finished]) -> Iterator[tuple[str, str, Finished]]:
    """(published name, name in the step's folder, step) for every file that is published."""
    for name, step in done.items():
        word, _, rest = name.partition("-")
        for output in step.record["outputs"]:
            if word == "data" and output == "check.json":
                yield "check.json", output, step
            elif word == "plan" and output == "plan.json":
                yield "plan.json", output, step
            elif word == "train" and output == "train.json":
                yield f"train-{rest}.json", output, step
            elif word == "evaluate" and output.startswith("items/"):
                yield f"items/{rest}/{output.removeprefix('items/')}", output, step
            elif word == "evaluate" and output == "measures.json":
                yield f"measures/{rest}.json", output, step
            elif word == "residual" and output.startswith("base/") and "verdict" in done:
                yield output, output, step
            elif word == "floor" and output.startswith("items/"):
                yield f"items/floor/{output.removeprefix('items/')}", output, step
            elif word == "verdict" or word == "report":
                yield output, output, step


def publish(run: Path, done: Mapping[str, Finished]) -> None:
    """Bring the published files up to date. Each is replaced whole or not at all."""
    wanted = {name: (step.folder / output, step.record["outputs"][output]) for name, output, step in places(done)}
    _publish_folders(run, done)
    for name, (source, digest) in wanted.items():
        target = run / name
        if not target.is_file() or not (_is_one_file(source, target) or hash_file(target) == digest):
            with open(source, "rb") as reading, atomic_file(target, "wb") as writing:
                shutil.copyfileobj(reading, writing)
    if "report" in done:
        _remove_strangers(run, set(wanted))


def retract(run: Path, step: str) -> None:
    """Take away what the step about to run may change: an old verdict must not stand beside new measurements."""
    for name in REPORT if step == "report" else (*REPORT, "verdict.json"):
        (run / name).unlink(missing_ok=True)
    if step != "report":
        for folder in ("adapter", "base"):
            shutil.rmtree(run / folder, ignore_errors=True)


def _publish_folders(run: Path, done: Mapping[str, Finished]) -> None:
    """The adapter's folder and that of its own base, each whole: a new configuration must never stand beside old weights."""
    if "verdict" not in done:
        return
    source, target = done["verdict"].folder / "adapter", run / "adapter"
    if not target.is_dir() or hash_folder(target) != hash_folder(source):
        with atomic_folder(target) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    if "residual" not in done:
        shutil.rmtree(run / "base", ignore_errors=True)
        return
    source, target = done["residual"].folder / "base", run / "base"
    if not _same_files(source, target):
        with atomic_folder(target) as part:
            shutil.copytree(source, part, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A second name for a file, which may be as large as a model; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _same_files(source: Path, target: Path) -> bool:
    """Is every file of one folder in the other, by another name or by its bytes?"""
    names = {f.relative_to(source) for f in source.rglob("*") if f.is_file()}
    if not target.is_dir() or names != {f.relative_to(target) for f in target.rglob("*") if f.is_file()}:
        return False
    return all(_is_one_file(source / n, target / n) or hash_file(source / n) == hash_file(target / n) for n in names)


def _is_one_file(one: Path, other: Path) -> bool:
    return one.exists() and os.path.samefile(one, other)


def _remove_strangers(run: Path, wanted: set[str]) -> None:
    """What an earlier version of the study published must not stand beside this one's results."""
    there = [path for folder in ("items", "measures", "adapter", "base") for path in (run / folder).rglob("*") if path.is_file()]
    for path in [*there, *run.glob("train-*.json")]:
        if path.relative_to(run).as_posix() not in wanted:
            path.unlink()
