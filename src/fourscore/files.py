"""Files that are whole or absent: errors people can act on, hashes, atomic writes, locks.

Everything fourscore writes goes to a temporary name in the same folder and is renamed when it is complete, so a killed
process never leaves something that looks finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


class FourscoreError(Exception):
    """An error the user can mend: what was found, where, and what to do next. The command line exits with `code`."""

    code = 1

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        todo = self.todo[:1].upper() + self.todo[1:]
        return " ".join(part if part[-1] in ".?!" else part + "." for part in (line, todo) if part)


def cache_dir() -> Path:
    """Where models and data sources are kept: $FOURSCORE_HOME, else ~/.cache/fourscore."""
    home = os.environ.get("FOURSCORE_HOME")
    return Path(home) if home else Path.home() / ".cache" / "fourscore"


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN. What hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def hash_json(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: str | Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `path`, sorted by path."""
    root = Path(path)
    return {f.relative_to(root).as_posix(): hash_file(f) for f in sorted(root.rglob("*")) if f.is_file()}


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on a clean exit it is flushed to disk and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it is renamed to `path`, replacing what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
        part.chmod(0o755)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / "was")
        os.replace(part, path)
        if old is not None:
            shutil.rmtree(old)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def disk_error(error: OSError, path: Path) -> FourscoreError:
    """An OSError of writing `path`, as a line for the user."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FourscoreError("the disk is full", where=str(path), todo="free some space and run the same command again; nothing was lost")
    return FourscoreError(f"cannot be written ({error.strerror or error})", where=str(path), todo="check the path and its rights")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON for people (indented, sorted keys), atomically. NaN is an error."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a FourscoreError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FourscoreError("missing file", where=str(path), todo="run the step that writes it again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FourscoreError(f"not readable as JSON ({error})", where=str(path), todo="delete it and run the step again") from None


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a JSONL file; a broken line is a FourscoreError with its number."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise FourscoreError(f"not JSON ({error.msg})", where=f"{path}:{number}", todo="mend that line") from None
    except FileNotFoundError:
        raise FourscoreError("no such file", where=str(path), todo="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FourscoreError(f"cannot be read ({error})", where=str(path), todo="save it as UTF-8 text, one JSON object a line") from None
    return rows


@contextlib.contextmanager
def locked(path: str | Path, what: str) -> Iterator[int]:
    """Hold an exclusive lock on the file `path`; a FourscoreError at once when another process holds it.

    Yields the file descriptor: a child process that inherits it holds the lock as long as it lives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise FourscoreError(
                f"{what} is in use" + (f" by process {holder}" if holder else ""),
                where=str(path.parent),
                todo="wait for it, or stop that process",
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.seek(0)
            file.truncate()
