"""evidence.jsonl: one line a finished step, each holding the hash of the line before it.

Changing any record, or the order of the lines, breaks every hash that follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, atomic_file, canonical_json, hash_file, hash_json, read_jsonl
from fourscore.study.steps import RECORD, Finished

FIRST = "0" * 64


def read_chain(run: Path) -> list[dict[str, Any]]:
    """The lines of the chain, empty when there is none yet."""
    path = run / "evidence.jsonl"
    return read_jsonl(path) if path.exists() else []


def append(run: Path, done: Finished) -> None:
    """Chain a finished step, unless its record already is. A crash between the two is mended by calling this again."""
    chain = read_chain(run)
    digest = hash_file(done.folder / RECORD)
    newest = {line["folder"]: line["record"] for line in chain}
    if newest.get(done.folder.name) == digest:
        return
    line = {"previous": hash_json(chain[-1]) if chain else FIRST, "step": done.name, "folder": done.folder.name, "record": digest}
    with atomic_file(run / "evidence.jsonl", "wb") as file:
        for entry in [*chain, line]:
            file.write(canonical_json(entry) + b"\n")


def check_chain(run: Path) -> list[str]:
    """What is wrong with the chain and the files it vouches for, one line each; empty when all is well."""
    try:
        chain = read_chain(run)
    except FourscoreError as error:
        return [str(error)]
    if not chain:
        return ["evidence.jsonl: missing or empty"]
    wrong = []
    previous = FIRST
    for number, line in enumerate(chain, 1):
        if line.get("previous") != previous:
            wrong.append(f"evidence.jsonl:{number}: the chain is broken here (the line before was changed, added or removed)")
        previous = hash_json(line)
    newest = {line.get("folder"): line for line in chain}  # a step that was deleted and done again has a later line
    for line in newest.values():
        wrong += _check_step(run, line)
    return wrong


def _check_step(run: Path, line: dict[str, Any]) -> list[str]:
    folder = run / "steps" / str(line.get("folder"))
    record = folder / RECORD
    if not record.is_file():
        return [f"steps/{folder.name}: its record is missing"]
    if hash_file(record) != line.get("record"):
        return [f"steps/{folder.name}/{RECORD}: changed since it was chained"]
    import json

    outputs: dict[str, str] = json.loads(record.read_text())["outputs"]
    wrong = []
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"steps/{folder.name}/{name}: missing")
        elif hash_file(path) != digest:
            wrong.append(f"steps/{folder.name}/{name}: changed since it was written")
    extra = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - set(outputs) - {RECORD}
    return wrong + [f"steps/{folder.name}/{name}: not among the step's outputs" for name in sorted(extra)]
