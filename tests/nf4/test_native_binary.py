"""The kernels' own tests (native/tests), which need no Python: under sanitizers here, and for aarch64 under emulation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


def run(*command: str | Path, limit: int = 600) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    own = Path(sys.executable).with_name("cmake")  # the package index's, where the system has none
    cmake = str(own) if own.exists() else shutil.which("cmake")
    assert cmake, "no cmake; pip install 'fourscore[test]' brings one"
    switches = ("-DFOURSCORE_PYTHON=OFF", "-DFOURSCORE_TESTS=ON", "-DCMAKE_BUILD_TYPE=None")
    run(cmake, "-S", ROOT, "-B", folder, *switches, *options)
    run(cmake, "--build", folder, "--parallel", "2")
    return folder / "kernel_tests"


def counts(output: str) -> tuple[int, int, list[str], str]:
    """Checks, failures, backends and how memory was watched, from the last line."""
    found = re.fullmatch(r"(\d+) checks, (\d+) failed; backends (.*); (.*)", output.splitlines()[-1])
    assert found, output
    return int(found[1]), int(found[2]), found[3].split(", "), found[4]


def test_the_kernels_under_sanitizers(tmp_path: Path) -> None:
    from fourscore.nf4 import kernels

    checks, failed, backends, memory = counts(run(build(tmp_path, "-DSANITIZE=ON")))
    assert (failed, memory) == (0, "sanitizers on")
    assert [*backends, "torch"] == kernels.available()
    assert checks > 1000 * len(backends)


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(QEMU)),
    reason="no aarch64 compiler and emulator: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_the_neon_kernels_in_emulation(tmp_path: Path) -> None:
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}")
    binary = build(tmp_path, *target, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    checks, failed, backends, _ = counts(run(QEMU, binary, "--brief"))
    assert (failed, backends) == (0, ["neon", "scalar"])
    assert checks > 2000
