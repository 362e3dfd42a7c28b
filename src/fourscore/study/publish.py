"""The run folder as people and programs read it: copies, under fixed names, of what finished steps wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from fourscore.files import atomic_file, hash_file
from fourscore.study.steps import Finished


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
            elif word == "floor" and output.startswith("items/"):
                yield f"items/floor/{output.removeprefix('items/')}", output, step
            elif word == "verdict" or word == "report":
                yield output, output, step


def publish(run: Path, done: Mapping[str, Finished]) -> None:
    """Bring the published files up to date. Each is replaced whole or not at all."""
    wanted = {name: (step.folder / output, step.record["outputs"][output]) for name, output, step in places(done)}
    for name, (source, digest) in wanted.items():
        target = run / name
        if not target.is_file() or hash_file(target) != digest:
            with open(source, "rb") as reading, atomic_file(target, "wb") as writing:
                shutil.copyfileobj(reading, writing)
    for folder in ("items", "measures", "adapter"):
        _remove_strangers(run, folder, set(wanted), done)


def _remove_strangers(run: Path, folder: str, wanted: set[str], done: Mapping[str, Finished]) -> None:
    """What an earlier version of the study published must not stand beside this one's results."""
    if "report" not in done:
        return
    for path in sorted((run / folder).rglob("*")):
        if path.is_file() and path.relative_to(run).as_posix() not in wanted:
            path.unlink()
