"""NF4 on CUDA: the bytes are bitsandbytes' own. What needs a GPU is skipped without one; the rest runs their code on the CPU."""

from __future__ import annotations

import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.model.device import choose_device, describe_device, on_gpu, peak_gpu_bytes
from fourscore.nf4 import cuda, kernels

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: this path has not been run here")
SHAPES = [(24, 192, 64), (33, 64, 32), (130, 256, 128), (600, 128, 64)]


def weight(out: int, features: int, block: int, double: bool, dtype: torch.dtype = torch.bfloat16) -> nf4.NF4Tensor:
    g = torch.Generator().manual_seed(out)
    return nf4.quantize((torch.randn((out, features), generator=g) * 0.05).to(dtype), block, double)


def same_weight(a: nf4.NF4Tensor, b: nf4.NF4Tensor) -> bool:
    pairs = [(a.packed, b.packed), (a.absmax, b.absmax), (a.nested_absmax, b.nested_absmax), (a.nested_code, b.nested_code)]
    facts = [(q.shape, q.dtype, q.block_size, q.nested_offset, q.nested_block_size, q.double_quant) for q in (a, b)]
    return facts[0] == facts[1] and all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("out", "features", "block"), SHAPES)
def test_a_weight_goes_to_params4bit_and_back_bit_for_bit(out: int, features: int, block: int, double: bool) -> None:
    q = weight(out, features, block, double)
    theirs = cuda.to_params4bit(q)
    assert theirs.data_ptr() == q.packed.data_ptr()  # no copy, nothing quantised again
    assert same_weight(cuda.from_params4bit(theirs), q)
    want = nf4.dequantize(q, torch.bfloat16)
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), want)
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.to("cpu").data, theirs.to("cpu").quant_state), want)


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_that_they_quantised_comes_over_bit_for_bit(double: bool) -> None:
    layer = bnb.nn.Linear4bit(192, 40, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    q = cuda.from_params4bit(layer.weight)
    assert torch.equal(nf4.dequantize(q, torch.float32), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    again = cuda.to_params4bit(q)
    ours, theirs = again.quant_state.as_dict(packed=True), layer.weight.quant_state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_weights_that_are_not_plain_nf4_are_refused() -> None:
    dense = bnb.nn.Params4bit(torch.ones((8, 64)), quant_type="nf4")
    with pytest.raises(FourscoreError, match="layer: the weight is not quantised yet"):
        cuda.from_params4bit(dense, "layer")
    with pytest.raises(FourscoreError, match="in fp4, not NF4"):
        cuda.from_params4bit(bnb.nn.Linear4bit(64, 8, bias=False, quant_type="fp4").to("cpu").weight)


@pytest.mark.parametrize("double", [True, False])
def test_their_layer_computes_with_our_weight(double: bool) -> None:
    q = weight(48, 128, 64, double)
    layer = bnb.nn.Linear4bit(128, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = cuda.to_params4bit(q)
    x = torch.randn((5, 128), requires_grad=True)
    torch.testing.assert_close(layer.train()(x), nf4.linear(x, q), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("out", "features", "block"), SHAPES)
def test_what_a_gpu_would_run_gives_the_products(out: int, features: int, block: int, double: bool, dtype: torch.dtype) -> None:
    """The functions that kernels.py hands a CUDA weight to, here on the CPU: against f64 on the same rounded weights."""
    q = weight(out, features, block, double)
    x, dy, bias = torch.randn((7, features)).to(dtype), torch.randn((7, out)).to(dtype), torch.randn(out).to(dtype)
    w = nf4.dequantize(q, dtype if dtype != torch.float64 else torch.float32).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}[dtype]
    y, dx = cuda.forward(x, q, bias), cuda.backward(dy, q)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    torch.testing.assert_close(y.double(), x.double() @ w.T + bias.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.double(), dy.double() @ w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("before", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantising_through_them_gives_our_values(before: torch.dtype, dtype: torch.dtype) -> None:
    """Whatever dtype the weight had before: one rounding, to the dtype asked for."""
    q = weight(40, 192, 64, True, before)
    assert torch.equal(cuda.dense(q, dtype), nf4.dequantize(q, dtype))


def test_kernels_hand_a_weight_on_a_gpu_to_bitsandbytes() -> None:
    """A dry run with shapes alone: torch's fake tensors claim to be on a GPU (autograd itself wants a real one)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        packed = torch.empty((24 * 192 // 2, 1), dtype=torch.uint8, device="cuda")
        q = nf4.NF4Tensor(packed, torch.empty(72, device="cuda"), (24, 192), torch.bfloat16)
        y = nf4.linear(torch.empty((2, 3, 192), dtype=torch.bfloat16, device="cuda"), q)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), torch.bfloat16, "cuda")
        dx = kernels.backward(torch.empty((6, 24), dtype=torch.bfloat16, device="cuda"), q)
        assert (dx.shape, dx.dtype, dx.device.type) == ((6, 192), torch.bfloat16, "cuda")
        with pytest.raises(FourscoreError, match="the input is on cpu, the weight on cuda"):
            nf4.linear(torch.empty((2, 192)), q)
        with pytest.raises(FourscoreError, match="[Qq]uantise on the CPU"):
            nf4.quantize(torch.empty((4, 64), device="cuda"))


def test_devices_that_are_not_there_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOURSCORE_DEVICE", raising=False)
    with pytest.raises(FourscoreError, match="no device `tpu`"):
        choose_device("tpu")
    assert choose_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        assert peak_gpu_bytes() is None
        with pytest.raises(FourscoreError, match="device: torch finds no CUDA device"):
            choose_device("cuda")


def test_the_environment_decides_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURSCORE_DEVICE", "cpu")
    assert not on_gpu()
    assert describe_device() == {"device": "cpu", "kernels": nf4.backend()}
    monkeypatch.setenv("FOURSCORE_DEVICE", "gpu")
    with pytest.raises(FourscoreError, match="FOURSCORE_DEVICE: no device `gpu`"):
        on_gpu()
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        monkeypatch.setenv("FOURSCORE_DEVICE", "cuda")
        with pytest.raises(FourscoreError, match="FOURSCORE_DEVICE: torch finds no CUDA device"):
            on_gpu()


def test_a_cpu_study_never_imports_bitsandbytes() -> None:
    code = (
        "import sys, torch\n"
        "from fourscore import nf4; from fourscore.model.device import place; from fourscore.nf4 import cuda\n"
        "layer = place(nf4.NF4Linear.from_linear(torch.nn.Linear(64, 8)), 'cpu', 'nf4'); layer(torch.ones(2, 64)); cuda.is_installed()\n"
        "print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_on_a_gpu_is_the_layer_on_the_cpu(dtype: torch.dtype) -> None:
    layer = nf4.NF4Linear.from_linear(torch.nn.Linear(192, 40))
    x = torch.randn((5, 192)).to(dtype)
    want, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    leaf = x.cuda().requires_grad_()
    y = layer.cuda()(leaf)
    torch.testing.assert_close(y.cpu(), want, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), kernels.backward(torch.ones_like(want), layer.cpu().quantised), rtol=2e-2, atol=2e-2)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
