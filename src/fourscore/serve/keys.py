"""Keys of a server: a JSON file that holds a hash of each, never the key.

A key is 256 random bits, so that one SHA-256 is enough: there is no dictionary to try. The file is read again when it changes,
so that a key can be made or removed while the server runs.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, locked, read_json, write_json

FORMAT = "fourscore keys 1"
PREFIX = "fs-"
NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True)
class Key:
    """One key as kept. Limits: None means no limit. tokens_per_day: prompt and answer together, by UTC days."""

    name: str
    sha256: str
    created: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


def new_key(path: Path, name: str, requests_per_minute: int | None = None, tokens_per_day: int | None = None) -> str:
    """Make a key, keep its hash in the file (made when missing, readable by its owner alone) and return it: it is shown once."""
    if not NAME.fullmatch(name):
        raise FourscoreError(f"not a name for a key: {name!r}", todo="use 1 to 64 letters, digits or . _ @ -")
    for what, limit in (("--requests-per-minute", requests_per_minute), ("--tokens-per-day", tokens_per_day)):
        if limit is not None and limit < 1:
            raise FourscoreError(f"a limit of {limit}", where=what, todo="give at least 1, or leave it out for no limit")
    with locked(path.with_name(f".{path.name}.lock"), "the key file"):
        keys = read_keys(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise FourscoreError(f"there is a key named `{name}` already", where=str(path), todo="remove it first, or choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _write(path, [*keys, Key(name, _hash(secret), created, requests_per_minute, tokens_per_day)])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Forget a key; a server that runs refuses it from its next request on."""
    with locked(path.with_name(f".{path.name}.lock"), "the key file"):
        keys = read_keys(path)
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            raise FourscoreError(f"no key named `{name}`", where=str(path), todo="`fourscore key list` shows them")
        _write(path, kept)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; a file of another kind is a FourscoreError."""
    told = read_json(path) if path.exists() else None
    if told is None:
        raise FourscoreError("no such key file", where=str(path), todo="make a first key with `fourscore key new NAME`")
    try:
        if told["format"] != FORMAT:
            raise ValueError
        return [Key(**entry) for entry in told["keys"]]
    except (TypeError, KeyError, ValueError):
        raise FourscoreError("not a key file of this version", where=str(path), todo="make one with `fourscore key new NAME`") from None


def _write(path: Path, keys: list[Key]) -> None:
    write_json(path, {"format": FORMAT, "keys": [asdict(key) for key in keys]})
    os.chmod(path, 0o600)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class KeyRing:
    """The keys of a running server."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: Any = None
        self._keys: list[Key] = []
        self._refresh()

    def find(self, secret: str) -> Key | None:
        """The key that `secret` is, or None. Every kept hash is compared, each in constant time."""
        self._refresh()
        digest = _hash(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        """Read the file when it changed. One that is gone or broken while serving lets nobody in."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError:
            stamp = None
        if stamp is None or stamp != self._stamp:
            first = self._stamp is None
            self._keys, self._stamp = [], stamp or ()
            try:
                self._keys = read_keys(self.path)
            except FourscoreError:
                if first:
                    raise
