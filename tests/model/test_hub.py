"""Models of the hub, spoken to over HTTP: a small server answers as the hub does."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourscore.files import FourscoreError, hash_file, read_json
from fourscore.model import describe, pull

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, `owner/tiny`, whose files are those of a folder."""

    protocol_version = "HTTP/1.1"
    files: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.server.asked.append(path)  # type: ignore[attr-defined]
        folder: Path = self.server.folder  # type: ignore[attr-defined]
        if path.startswith("/api/models/owner/tiny/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": hash_file(f)[:40]} for f in sorted(folder.iterdir())
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
            self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}).encode())
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            file = folder / path.rsplit("/", 1)[1]
            self.answer(file.read_bytes(), {"ETag": f'"{hash_file(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    serving.asked = []  # type: ignore[attr-defined]
    serving.folder = tmp_path / "repository"  # type: ignore[attr-defined]
    serving.folder.mkdir()  # type: ignore[attr-defined]
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{serving.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path / "home"))
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


def test_a_hub_model_is_fetched_without_its_pickles(hub: http.server.ThreadingHTTPServer, tiny_llama: Path) -> None:
    for file in tiny_llama.iterdir():
        (hub.folder / file.name).symlink_to(file)  # type: ignore[attr-defined]
    (hub.folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # type: ignore[attr-defined]
    folder = pull("owner/tiny", source="hub")
    assert (folder / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    assert not list(folder.glob("*.bin"))
    record = read_json(folder / "fourscore.json")
    assert (record["source"], record["revision"], record["licence"]) == ("hub", COMMIT, "mit")
    assert record["files"]["model.safetensors"] == hash_file(tiny_llama / "model.safetensors")
    assert describe(folder).licence == "mit"
    asked = len(hub.asked)  # type: ignore[attr-defined]
    assert pull("owner/tiny") == folder
    assert len(hub.asked) == asked  # type: ignore[attr-defined]


def test_a_model_that_is_only_pickles_is_refused_before_anything_is_fetched(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"x")  # type: ignore[attr-defined]
    (hub.folder / "config.json").write_text("{}")  # type: ignore[attr-defined]
    with pytest.raises(FourscoreError, match=r"owner/tiny: its weights are pickles, which are never loaded"):
        pull("owner/tiny")
    assert [f.name for f in (tmp_path / "home" / "models").iterdir()] == [".owner--tiny.lock"]


def test_a_model_that_the_hub_does_not_have(hub: http.server.ThreadingHTTPServer) -> None:
    with pytest.raises(FourscoreError, match="no such public model on the hub"):
        pull("owner/other")


def test_files_other_than_the_pinned_ones_are_refused(hub: http.server.ThreadingHTTPServer, tiny_llama: Path, tmp_path: Path) -> None:
    from fourscore.model.names import HubSource, ModelInfo
    from fourscore.model.sources import _from_hub

    place = tmp_path / "home" / "models" / "tiny"
    for file in tiny_llama.iterdir():
        (hub.folder / file.name).symlink_to(file)  # type: ignore[attr-defined]
    source = HubSource("owner/tiny", COMMIT, {"config.json": hash_file(tiny_llama / "config.json"), "model.safetensors": "0" * 64})
    info = ModelInfo("tiny", "Tiny", "MIT", 1, 1, "", hub=source)
    with pytest.raises(FourscoreError, match=r"tiny: wrong SHA-256 of model\.safetensors: expected 0{64}"):
        _from_hub(info, place, None)
    assert not list(place.parent.iterdir())


def test_a_hub_that_is_switched_off_or_away_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOURSCORE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FourscoreError, match=r"^owner/tiny: the model hub cannot be reached \(.*\)\. Check the network"):
        pull("owner/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FourscoreError, match=r"^owner/tiny: the model hub is switched off \(HF_HUB_OFFLINE\)"):
        pull("owner/tiny")
