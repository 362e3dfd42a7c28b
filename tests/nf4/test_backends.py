"""Choosing the kernels: FOURSCORE_KERNELS, a missing extension, threads after a fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.nf4 import kernels


def run(code: str, forced: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "FOURSCORE_KERNELS"} | ({"FOURSCORE_KERNELS": forced} if forced else {})
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_the_extension_is_built_and_the_best_backend_is_chosen() -> None:
    assert kernels.available()[-2:] == ["scalar", "torch"]
    assert run("from fourscore import nf4; print(nf4.backend())").stdout.strip() == kernels.available()[0]


@pytest.mark.parametrize("name", ["scalar", "torch"])
def test_the_environment_forces_a_backend(name: str) -> None:
    code = "import torch; from fourscore import nf4; nf4.linear(torch.ones(2, 64), nf4.quantize(torch.ones(3, 64))); print(nf4.backend())"
    assert run(code, name).stdout.strip() == name


def test_an_impossible_backend_is_an_error() -> None:
    failed = run("from fourscore import nf4", "neon512")
    assert failed.returncode == 1
    assert "FOURSCORE_KERNELS asks for the kernels 'neon512', which do not run here. Choose one of" in failed.stderr
    with pytest.raises(FourscoreError, match="neon512"), kernels.use("neon512"):
        pass


def test_without_the_extension_plain_torch_does_the_work() -> None:
    code = (
        "import sys; sys.modules['fourscore.nf4._native'] = None\n"
        "import torch; from fourscore import nf4\n"
        "y = nf4.linear(torch.ones(2, 64), nf4.quantize(torch.ones(3, 64), double_quant=False)); print(nf4.backend(), y.tolist())"
    )
    assert run(code).stdout.strip() == f"torch {[[64.0] * 3] * 2}"


def test_bitsandbytes_is_never_imported() -> None:
    code = "import sys, torch; from fourscore import nf4; nf4.quantize(torch.ones(2, 64)); print('bitsandbytes' in sys.modules)"
    assert run(code).stdout.strip() == "False"


def test_threads_start_again_after_a_fork(each_native: str, threads: None) -> None:
    torch.set_num_threads(3)
    q, x = nf4.quantize(torch.randn((512, 1024))), torch.randn((64, 1024))
    want = nf4.linear(x, q)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(nf4.linear(x, q), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(nf4.linear(x, q), want)


def test_python_threads_may_call_at_once(each_native: str, threads: None) -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.set_num_threads(2)
    q, x = nf4.quantize(torch.randn((300, 1024))), torch.randn((40, 1024)).bfloat16()
    want = nf4.linear(x, q)
    with ThreadPoolExecutor(4) as callers:
        for got in callers.map(lambda _: nf4.linear(x, q), range(40)):
            assert torch.equal(got, want)
