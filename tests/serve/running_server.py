"""A real server in a process of its own, over a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Running:
    """A server: its address, its process, the file that its log goes to."""

    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def running(model: Path, folder: Path, *options: str) -> Iterator[Running]:
    """`fourscore serve` on a free port, until the block ends."""
    log = folder / "log.jsonl"
    words = [sys.executable, "-m", "fourscore.cli", "serve", str(model), "--port", "0", "--json", *options]
    with open(log, "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, text=True)
        try:
            while True:
                lines = log.read_text().splitlines()
                if lines and log.read_text().endswith("\n"):
                    break
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
                raise AssertionError((folder / "stderr").read_text())
            first = json.loads(lines[0])
            assert "url" in first, first["error"]
            yield Running(first["url"], process, log)
        finally:
            process.kill()
            process.wait()
