"""The operations of a training step compute what torch computes in f64, rounded once, on every backend this machine has."""

import pytest
import torch
import torch.nn.functional as F

from fourscore.nf4 import kernels
from fourscore.train import ops

BACKENDS = kernels.available()
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a unit in the last place, relative


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.use(request.param):
        yield request.param


def close(got: torch.Tensor, wanted: torch.Tensor, roundings: float, floor: float = 1e-6) -> None:
    """Within so many roundings of got's dtype: of each value, and, where sums cancel, of `floor` times the largest."""
    epsilon = roundings * EPSILON[got.dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=epsilon, atol=epsilon * floor * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (63, 65), (9, 5000)])
def test_swiglu_and_its_gradients(backend, dtype, shape):
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(shape).mul(s).to(dtype) for s in (6, 1, 1))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    wanted = F.silu(g) * u
    dgate, dup = torch.autograd.grad(wanted, (g, u), dy.double())
    roundings = 6 if dtype == torch.float32 else 1.01 if backend != "torch" else 3
    close(ops.swiglu(gate, up), wanted, roundings)
    got_gate, got_up = ops.swiglu_backward(dy, gate, up)
    close(got_gate, dgate, 2 * roundings, floor=1.0)
    close(got_up, dup, roundings)


def test_swiglu_of_extreme_gates(backend):
    gate = torch.tensor([-1e4, -120.0, -88.0, -0.0, 0.0, 88.0, 120.0, 1e4, float("nan")])
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(ops.swiglu(gate, up), F.silu(gate) * up, equal_nan=True)


def test_swiglu_gives_the_same_bits_for_any_number_of_threads(backend):
    torch.manual_seed(0)
    gate, up = torch.randn(300, 401), torch.randn(300, 401)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.swiglu(gate, up)
        torch.set_num_threads(3)
        assert torch.equal(ops.swiglu(gate, up), one)
    finally:
        torch.set_num_threads(before)
