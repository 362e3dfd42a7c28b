"""What a study reads from outside: the base model and the data file, by what they contain and not by their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourscore.spec import Study


@dataclass(frozen=True)
class Inputs:
    """base: the base model's transformers directory. base_sha256, source_sha256: over the model's files; of the data file."""

    base: Path
    base_sha256: str
    source_sha256: str


def find_inputs(study: Study) -> Inputs:
    """Fetch what is missing, and hash what is there."""
    from fourscore.model import base_sha256, pull

    base = pull(study.model.name, study.model.source, study.model.revision)
    return Inputs(base, base_sha256(base), source_sha256(study))


def source_sha256(study: Study) -> str:
    """SHA-256 of the data file as it is now; of a `wheel:` source the wheel's, which every fetch checks."""
    from fourscore.data.sources import read_source
    from fourscore.files import FourscoreError, hash_file

    source = study.data.source
    if source.startswith("wheel:") and study.data.sha256:
        return study.data.sha256
    if source.startswith(("wheel:", "hub:")):
        return read_source(source, study.data.sha256).sha256
    if not Path(source).is_file():
        raise FourscoreError("no such data file", where=source, todo="check `data.source`; it is looked for beside the study file")
    return hash_file(source)
