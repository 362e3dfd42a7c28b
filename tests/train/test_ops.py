"""The operations of a training step compute what torch computes in f64, rounded once, on every backend this machine has."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fourscore.files import FourscoreError
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


def test_the_exponential_is_right_to_three_units_in_the_last_place(backend):
    """The soft-max of [0, x] for x under -18 is e^x in f32; torch's own is held to the same."""
    x = -torch.linspace(18, 87.3, 40_001)
    logits = torch.stack((torch.zeros_like(x), x), 1)
    losses = ops.nats_(logits, torch.zeros(len(x), dtype=torch.int64), gradient=True)
    wanted = x.double().exp()
    assert ((logits[:, 1].double() - wanted).abs() / wanted).max() < 3 * 2.0**-23
    assert losses.abs().max() == 0
    far = torch.tensor([[0.0, -104.0], [0.0, -1e30], [0.0, float("-inf")]])
    ops.nats_(far, torch.zeros(3, dtype=torch.int64), gradient=True)
    assert far[:, 1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 17), (2, 4099)])
def test_nats_and_their_gradient(backend, dtype, rows, vocabulary):
    torch.manual_seed(0)
    logits = (8 * torch.randn(rows, vocabulary)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    kept = logits.clone()
    torch.testing.assert_close(ops.nats_(kept, targets, gradient=False).double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ops.nats_(logits, targets, gradient=True).double(), wanted, rtol=1e-6, atol=1e-5)
    close(logits, gradient, 40 if dtype == torch.float32 else 1.1, floor=0.1 if dtype == torch.float32 else 1e-4)


def test_a_target_outside_the_vocabulary_is_refused():
    if kernels.backend() == "torch":
        pytest.skip("torch's gather refuses it itself")
    for wrong in (-1, 5):
        with pytest.raises(FourscoreError, match="do not fit logits"):
            ops.nats_(torch.zeros(1, 5), torch.tensor([wrong]), gradient=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 65), (40, 576)])
def test_rms_norm_and_its_gradient(backend, dtype, shape):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).mul(3).to(dtype) for _ in "xd")
    weight = torch.rand(shape[-1]).add(0.5).to(dtype)
    exact = x.double().requires_grad_()
    wanted = weight.double() * exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    (gradient,) = torch.autograd.grad(wanted, exact, dy.double())
    y, scale = ops.rms_norm(x, weight, 1e-5)
    close(y, wanted, 8 if dtype == torch.float32 else 2.1)
    close(ops.rms_norm_backward(dy, x, weight, scale), gradient, 16 if dtype == torch.float32 else 3, floor=1.0)


def llama_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "width", "angles"), [(1, 1, 1, 2, 1), (2, 3, 17, 64, 1), (3, 2, 65, 80, 3), (2, 1, 5, 18, 2)]
)
def test_rope_is_llama_s_bit_for_bit(backend, dtype, batch, heads, length, width, angles):
    torch.manual_seed(0)
    x = torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2).requires_grad_()
    at = 10 * torch.randn(angles, length, width)
    cos, sin = at.cos().to(dtype), at.sin().to(dtype)
    dy = torch.randn(batch, heads, length, width).to(dtype)
    wanted = llama_rope(x, cos, sin)
    (gradient,) = torch.autograd.grad(wanted, x, dy)
    assert torch.equal(ops.rope(x.detach(), cos, sin), wanted)
    assert torch.equal(ops.rope(dy, cos, sin, back=True), gradient)
