"""Files are whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourscore.files import FourscoreError, atomic_file, atomic_folder, canonical_json, hash_json, locked, read_json, read_jsonl, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("2")
        raise RuntimeError
    assert (tmp_path / "f" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["f"]


def test_nan_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_canonical_json_is_one_text_whatever_the_order():
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}'.encode()
    # printf '{"a":1}' | sha256sum
    assert hash_json({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(FourscoreError, match=r"a\.jsonl:3: not JSON"):
        read_jsonl(tmp_path / "a.jsonl")


def test_a_lock_is_held_and_released(tmp_path: Path):
    with locked(tmp_path / "lock", "this run"):
        code = f"from fourscore.files import locked\nwith locked({str(tmp_path / 'lock')!r}, 'this run'): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"this run is in use by process {os.getpid()}" in other.stderr
    with locked(tmp_path / "lock", "this run"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made by mounting a tiny tmpfs, which only root may do")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True).returncode != 0:
        pytest.skip("this container may not mount a tmpfs")
    try:
        write_json(tmp_path / "a.json", [1])
        with pytest.raises(FourscoreError, match="the disk is full.*nothing was lost"), atomic_file(tmp_path / "a.json", "wb") as file:
            file.write(bytes(200_000))
        assert read_json(tmp_path / "a.json") == [1]
        assert os.listdir(tmp_path) == ["a.json"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
