"""The differentiable product: right, batch-invariant, and with gradients that nothing takes away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.nf4 import kernels

# Rounding of the result, of one input and one weight; sums are in f32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(rows: int, out: int, features: int, dtype: torch.dtype, block: int = 64, double: bool = True, seed: int = 0):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    q = nf4.quantize(torch.randn((out, features), generator=g) * features**-0.5, block, double)
    x, bias = torch.randn((rows, features), generator=g).to(dtype), torch.randn(out, generator=g).to(dtype)
    dy = torch.randn((rows, out), generator=g).to(dtype)
    return q, x, bias, dy


def assert_close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype) -> None:
    """Within rounding of the result, and of f32 sums of terms whose magnitudes add up to `magnitude`."""
    error = (got.double() - want).abs()
    assert bool((error <= TOLERANCE[dtype] * want.abs() + 2e-6 * magnitude + 1e-30).all()), float((error / (want.abs() + 1e-6)).max())


def check(q: nf4.NF4Tensor, x: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor) -> None:
    """Forward and backward against f64 with the weight as it is dequantised to x's dtype."""
    w = nf4.dequantize(q, x.dtype).double()
    want = x.double() @ w.t() + (0 if bias is None else bias.double())
    assert_close(nf4.linear(x, q, bias), want, x.double().abs() @ w.t().abs() + 1, x.dtype)
    assert_close(kernels.backward(dy, q), dy.double() @ w, dy.double().abs() @ w.abs() + 1, x.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("rows", "out", "features"),
    [(1, 192, 576), (3, 8, 64), (6, 50, 1088), (7, 49, 2176), (40, 130, 576), (515, 20, 128), (2, 7, 33), (30, 9, 97)],
)
def test_products_are_right(each_backend: str, rows: int, out: int, features: int, dtype: torch.dtype) -> None:
    q, x, bias, dy = case(rows, out, features, dtype)
    check(q, x, bias, dy)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    out=st.integers(1, 60),
    features=st.one_of(st.integers(1, 200), st.integers(1, 20).map(lambda n: 64 * n)),
    block=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    backend=st.sampled_from([b for b in kernels.available() if b != "torch"]),
    seed=st.integers(0, 2**31),
)
def test_products_are_right_for_any_shape(
    rows: int, out: int, features: int, block: int, double: bool, biased: bool, dtype: torch.dtype, backend: str, seed: int
) -> None:
    q, x, bias, dy = case(rows, out, features, dtype, block, double, seed)
    with kernels.use(backend):
        check(q, x, bias if biased else None, dy)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("out", "features"), [(192, 576), (50, 1088), (64, 2304), (9, 97), (30, 200)])
def test_a_row_does_not_see_its_neighbours_or_the_threads(
    each_native: str, out: int, features: int, dtype: torch.dtype, threads: None
) -> None:
    q, x, bias, dy = case(1030, out, features, dtype)
    torch.set_num_threads(1)
    y, dx = nf4.linear(x, q, bias), kernels.backward(dy, q)
    for n in (2, 3):
        torch.set_num_threads(n)
        assert torch.equal(nf4.linear(x, q, bias), y)
        assert torch.equal(kernels.backward(dy, q), dx)
    for start, count in [(0, 1), (1029, 1), (511, 2), (3, 3), (10, 4), (700, 5), (1, 6), (2, 7), (500, 40)]:
        rows = slice(start, start + count)
        assert torch.equal(nf4.linear(x[rows], q, bias), y[rows]), (start, count)
        assert torch.equal(kernels.backward(dy[rows], q), dx[rows]), (start, count)


def test_a_bad_row_spoils_itself_only(each_native: str) -> None:
    q, x, _, _ = case(9, 64, 128, torch.bfloat16)
    clean = nf4.linear(x, q)
    x[4, 5], x[6, 7] = float("nan"), float("inf")
    y = nf4.linear(x, q)
    assert y[4].isnan().all()
    assert not y[6].isfinite().any()
    rest = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(y[rest], clean[rest])


def test_strides_and_leading_dimensions(each_native: str) -> None:
    q, x, bias, _ = case(24, 40, 128, torch.bfloat16)
    y = nf4.linear(x, q, bias)
    assert torch.equal(nf4.linear(x.view(2, 3, 4, 128), q, bias), y.view(2, 3, 4, 40))
    assert torch.equal(nf4.linear(x[::3], q, bias), y[::3])
    assert torch.equal(nf4.linear(x.t().contiguous().t(), q, bias), y)
    assert torch.equal(nf4.linear(x[0].expand(5, 128), q, bias), y[:1].expand(5, 40))
    assert nf4.linear(x[:0], q, bias).shape == (0, 40)
    assert torch.equal(nf4.linear(x[3], q, bias), y[3])


def test_gradient_check_in_f64(each_backend: str) -> None:
    q, x, bias, _ = case(3, 5, 70, torch.float64)
    x.requires_grad_()
    bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: nf4.linear(x, q, b), (x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_a_dense_layer(each_backend: str, dtype: torch.dtype) -> None:
    q, x, bias, dy = case(11, 40, 192, dtype)
    w = nf4.dequantize(q, dtype)
    ours, dense = ([t.clone().requires_grad_() for t in (x, bias)] for _ in range(2))
    nf4.linear(ours[0], q, ours[1]).backward(dy)
    torch.nn.functional.linear(dense[0], w, dense[1]).backward(dy)
    for a, b in zip(ours, dense, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad, b.grad)


def test_nothing_but_the_packed_weight_waits_for_backward(each_backend: str) -> None:
    q, x, _, _ = case(4, 64, 128, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nf4.linear(x.requires_grad_(), q)
    assert kept == []
    y.sum().backward()


def test_gradients_survive_an_evaluation_in_the_middle_of_training(each_backend: str) -> None:
    """bitsandbytes loses them on CPUs with bf16 instructions: after one eval forward its layer stays repacked."""
    dense = torch.nn.Linear(128, 64).bfloat16()
    layer = nf4.NF4Linear.from_linear(dense).train()
    x = torch.randn((5, 128)).bfloat16()

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf).float().square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    before, bytes_before = gradient(), layer.weight.clone()
    layer.eval()
    with torch.inference_mode():
        for rows in (1, 5):
            layer(x[:rows])
    layer(x)
    assert torch.equal(gradient(), before)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    layer.train()
    assert torch.equal(gradient(), before)
    assert torch.equal(layer.weight, bytes_before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(each_backend: str, reentrant: bool) -> None:
    q, x, bias, dy = case(6, 64, 128, torch.bfloat16)
    plain, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    nf4.linear(plain, q, bias).backward(dy)
    checkpoint(lambda t: nf4.linear(t, q, bias), again, use_reentrant=reentrant).backward(dy)
    assert plain.grad is not None
    assert again.grad is not None
    assert torch.equal(plain.grad, again.grad)


def test_a_second_derivative_is_refused(each_backend: str) -> None:
    q, x, _, _ = case(2, 8, 64, torch.float32)
    x.requires_grad_()
    (first,) = torch.autograd.grad(nf4.linear(x, q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("x", [torch.ones((2, 63)), torch.ones((2, 64), dtype=torch.int64)])
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(FourscoreError, match="64 features"):
        nf4.linear(x, nf4.quantize(torch.ones((4, 64))))
