"""Downloads: whole and verified, or absent; continued where they broke."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourscore.files import FourscoreError
from fourscore.model import download as downloads
from fourscore.model.download import download

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(BODY).hexdigest()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves BODY with Range. /plain ignores ranges, /break closes the line half-way once, /shy refuses."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))  # type: ignore[attr-defined]
        if self.path == "/shy":
            self.send_error(403)
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match and self.path != "/plain" else 0
        if start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        if self.path == "/break" and not start:
            self.wfile.write(BODY[: len(BODY) // 2])
            self.close_connection = True
            return
        self.wfile.write(BODY[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    serving.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


def address(server: http.server.ThreadingHTTPServer, path: str = "/file") -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


def visible(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if not f.name.endswith(".lock"))


def test_a_file_arrives_and_a_second_call_asks_nobody(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    assert download(address(server), target, SHA, title="t").read_bytes() == BODY
    download(address(server), target, SHA, title="t")
    assert len(server.asked) == 1
    assert visible(tmp_path) == ["model.bin"]


def test_half_a_file_of_an_earlier_run_is_continued(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").write_bytes(BODY[:300_000])
    download(address(server), tmp_path / "model.bin", SHA, title="t")
    assert server.asked == [("/file", "bytes=300000-")]
    assert (tmp_path / "model.bin").read_bytes() == BODY


def test_a_broken_line_is_taken_up_again(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    download(address(server, "/break"), tmp_path / "model.bin", SHA, title="t")
    assert server.asked == [("/break", None), ("/break", f"bytes={len(BODY) // 2}-")]


def test_a_server_without_ranges_sends_it_all_again(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").write_bytes(BODY[:1000])
    download(address(server, "/plain"), tmp_path / "model.bin", SHA, title="t")
    assert (tmp_path / "model.bin").read_bytes() == BODY


def test_a_whole_part_is_not_fetched_again(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").write_bytes(BODY)
    download(address(server), tmp_path / "model.bin", SHA, title="t")
    assert (tmp_path / "model.bin").read_bytes() == BODY


@pytest.mark.parametrize("part", [b"another file" * 20, BODY + b"more"], ids=["foreign", "too long"])
def test_the_part_of_another_file_does_not_spoil_it(server: http.server.ThreadingHTTPServer, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "model.bin.part").write_bytes(part)
    download(address(server), tmp_path / "model.bin", SHA, title="t")
    assert (tmp_path / "model.bin").read_bytes() == BODY


def test_a_wrong_hash_leaves_nothing_behind(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match=rf"wrong SHA-256: expected 0{{64}}, the download has {SHA}"):
        download(address(server), tmp_path / "model.bin", "0" * 64, title="t")
    assert visible(tmp_path) == []


def test_a_damaged_copy_in_the_cache_is_replaced(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(BODY[:-1] + b"x")
    download(address(server), tmp_path / "model.bin", SHA, title="t")
    assert (tmp_path / "model.bin").read_bytes() == BODY


@pytest.mark.parametrize(("path", "says"), [("/shy", "HTTP 403"), ("/gone", "HTTP 404")])
def test_a_refusal_is_not_asked_for_again(server: http.server.ThreadingHTTPServer, tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(FourscoreError, match=says):
        download(address(server, path), tmp_path / "model.bin", SHA, title="t")
    assert len(server.asked) == 1


def test_no_server_is_one_clear_line_and_keeps_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSES", (0.01,))
    (tmp_path / "model.bin.part").write_bytes(BODY[:10])
    with pytest.raises(FourscoreError, match=r"^llm 1\.0: the download failed \(.*refused.*\); what arrived is kept\. Run it again\.$"):
        download("http://127.0.0.1:9/file", tmp_path / "model.bin", SHA, title="llm 1.0", todo="run it again")
    assert visible(tmp_path) == ["model.bin.part"]


def test_a_full_disk_is_one_clear_line(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").symlink_to("/dev/full")
    with pytest.raises(FourscoreError, match="the disk is full"):
        download(address(server), tmp_path / "model.bin", SHA, title="t")
