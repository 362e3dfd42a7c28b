"""Fetching one file over HTTP so that it is whole and verified, or absent: resumed, retried, with progress.

Uses the standard library only. Proxies come from the usual variables; the certificates from PIP_CERT, REQUESTS_CA_BUNDLE,
CURL_CA_BUNDLE or SSL_CERT_FILE, in this order, else from the system.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError, disk_error, hash_file
from fourscore.progress import say, track

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.5, 2.0, 5.0)  # seconds before the second, third and fourth try
CHUNK = 1 << 20
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class RefusedError(FourscoreError):
    """The server wants credentials that the address does not carry (401, 403, 407)."""


class _RestartError(Exception):
    """The part on disk does not belong to what the server has now."""


def download(url: str, target: Path, sha256: str, *, title: str, todo: str = "") -> Path:
    """Fetch `url` (http, https or file) to `target` when its bytes have the hash `sha256`.

    What has arrived is kept in `<target>.part` between runs and continued with a Range request. A wrong hash removes it.
    Errors: no network after four tries, a status that retrying does not mend, a wrong hash, a full disk; one line each.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(target, title):
        if target.exists():
            if hash_file(target) == sha256:
                return target
            say(f"{title}: the cached copy is damaged, fetching it again")
            target.unlink()
        part = target.with_name(target.name + ".part")
        resumed = part.exists() and part.stat().st_size > 0
        try:
            _fetch(url, part, title, todo)
            found = hash_file(part)
            if found != sha256 and resumed:  # the part may stem from another file: once more from the start
                part.unlink()
                _fetch(url, part, title, todo)
                found = hash_file(part)
        except OSError as error:
            raise disk_error(error, part) from error
        if found != sha256:
            part.unlink()
            raise FourscoreError(
                f"wrong SHA-256: expected {sha256}, the download has {found}; it was removed",
                where=title,
                todo="check the pinned hash, or what stands between this machine and the package index",
            )
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    return target


@contextlib.contextmanager
def one_at_a_time(target: Path, title: str) -> Iterator[None]:
    """One process at a time makes `target` (a file or a folder); the others wait and then find it."""
    lock = target.with_name("." + target.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{title}: another process is at it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    # the lock file stays: removing it would let two processes hold two different ones


def _fetch(url: str, part: Path, title: str, todo: str) -> None:
    if urllib.parse.urlsplit(url).scheme == "file":
        source = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        shutil.copyfile(source, part)
        return
    for attempt in range(len(PAUSES) + 1):
        try:
            return _try_once(url, part, title)
        except _RestartError:
            part.unlink(missing_ok=True)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 407):
                raise RefusedError(f"the server refuses the download (HTTP {error.code})", where=title, todo=todo) from None
            if error.code not in _TRANSIENT or attempt == len(PAUSES):
                raise FourscoreError(f"the server answers HTTP {error.code} ({error.reason})", where=title, todo=todo) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError) as error:
            if attempt == len(PAUSES):
                reason = getattr(error, "reason", None) or error
                raise FourscoreError(f"the download failed ({reason}); what arrived is kept", where=title, todo=todo) from None
        time.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
    raise FourscoreError("the server does not agree with itself on the size of the file", where=title, todo=todo)


def _try_once(url: str, part: Path, title: str) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fourscore", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after the part: it is complete, or foreign
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            raise _RestartError from None
        raise
    with answer:
        if have and answer.status != 206:
            have = 0  # the server sends the whole file
        if have and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _RestartError
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file, track(title, (total or 0) / 1e6, "MB") as bar:
            bar.resume_at(have / 1e6)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.advance(len(chunk) / 1e6)
    arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise ConnectionError(f"the connection broke at {arrived:,} of {total:,} bytes")


def _opener() -> Any:
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=_certificates())]
    if proxy := os.environ.get("PIP_PROXY"):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers)


def _certificates() -> ssl.SSLContext:
    for variable in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(variable)
        if path and Path(path).exists():
            folder = Path(path).is_dir()
            return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
    return ssl.create_default_context()  # OpenSSL itself reads SSL_CERT_FILE and SSL_CERT_DIR
