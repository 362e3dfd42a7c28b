"""Products with dense matrices: right for any shape, layout and dtype, and a row's bits its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourscore.files import FourscoreError
from fourscore.nf4 import dense, kernels

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def matrix(rows: int, columns: int, dtype: torch.dtype, turned: bool, seed: int) -> torch.Tensor:
    """[rows, columns] cut out of a larger one; `turned`: a column's values are neighbours in memory."""
    x = torch.randn((rows + 2, columns + 3), generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x.T.contiguous().T if turned else x
    return x[1 : rows + 1, 2 : columns + 2]


@settings(max_examples=60, deadline=None)
@given(
    m=st.one_of(st.integers(1, 40), st.just(530)),
    n=st.integers(1, 150),
    k=st.one_of(st.integers(1, 90), st.sampled_from([128, 640, 1025, 2100])),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    turned=st.tuples(*[st.booleans()] * 3),
    scale=st.sampled_from([1.0, -0.5, 2.0]),
    biased=st.booleans(),
    add=st.booleans(),
    threads=st.integers(1, 3),
    backend=st.sampled_from(kernels.available()),
    seed=st.integers(0, 2**31),
)
def test_products_are_right_for_any_shape_and_layout(
    m: int, n: int, k: int, dtypes: tuple, turned: tuple, scale: float, biased: bool, add: bool, threads: int, backend: str, seed: int
) -> None:
    a, b = matrix(m, k, dtypes[0], turned[0], seed), matrix(n, k, dtypes[1], turned[1], seed + 1)
    before = matrix(m, n, dtypes[2], turned[2], seed + 2)
    bias = torch.randn(n) if biased else None
    exact_b = b.to(dtypes[0]).double()
    want = scale * (a.double() @ exact_b.T) + (bias.double() if bias is not None else 0) + (before.double() if add else 0)
    magnitude = abs(scale) * (a.double().abs() @ exact_b.abs().T) + before.double().abs() + 4
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with kernels.use(backend):
            got = dense.product(a, b, before, scale=scale, bias=bias, add=add)
    finally:
        torch.set_num_threads(was)
    assert got is before
    # torch rounds after every operation, in a's dtype.
    result = ROUNDING[dtypes[2]] * want.abs() + (0 if backend != "torch" else 4 * max(ROUNDING[d] for d in dtypes) * magnitude)
    assert bool(((got.double() - want).abs() <= result + 3e-6 * magnitude).all())


@pytest.mark.parametrize("backend", [b for b in kernels.available() if b != "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(192, 576), (50, 70), (16, 1088), (1, 33), (133, 2112)])
def test_a_row_does_not_see_its_neighbours_the_threads_or_the_layout(backend: str, dtype: torch.dtype, n: int, k: int) -> None:
    x, w = matrix(530, k, dtype, False, 0), matrix(n, k, dtype, False, 1)
    was = torch.get_num_threads()
    try:
        with kernels.use(backend):
            torch.set_num_threads(1)
            y = dense.product(x, w)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(dense.product(x, w), y)
            for rows in (slice(0, 1), slice(529, 530), slice(3, 5), slice(100, 103), slice(7, 15), slice(200, 217), slice(20, 61)):
                assert torch.equal(dense.product(x[rows], w), y[rows]), rows
            assert torch.equal(dense.product(x.T.contiguous().T, w), y)
            assert torch.equal(dense.product(x, w.T.contiguous().T), y)
            assert torch.equal(dense.product(x, w.float()), y)
            assert torch.equal(dense.linear(x.view(2, 265, k) if x.is_contiguous() else x[None], w).view(530, n), y)
    finally:
        torch.set_num_threads(was)


def test_nothing_beside_the_result_is_written() -> None:
    out = torch.full((9, 40), 7.0)
    dense.product(torch.ones((5, 64)), torch.ones((21, 64)), out[2:7, 3:24])
    want = torch.full((9, 40), 7.0)
    want[2:7, 3:24] = 64.0
    assert torch.equal(out, want)


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5), None), ((2, 3), (4, 3), (2, 5)), ((2, 3, 1), (4, 3), None)])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple) -> None:
    a, b, out = (None if s is None else torch.ones(s) for s in shapes)
    with pytest.raises(FourscoreError, match="is no product"):
        dense.product(a, b, out)


def test_other_dtypes_and_empty_products_go_through_torch() -> None:
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5)
    assert torch.equal(dense.product(a, b), a @ b.double().T)
    assert dense.product(torch.ones(0, 5), torch.ones(4, 5)).shape == (0, 4)
    assert torch.equal(dense.product(torch.ones(2, 0), torch.ones(4, 0)), torch.zeros(2, 4))


@pytest.mark.parametrize("backend", [b for b in kernels.available() if b != "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 1024, 2048])
def test_few_rows_read_a_contiguous_weight_into_the_same_bits(backend: str, dtype: torch.dtype, k: int) -> None:
    """Weights whose rows lie whole kilobytes apart are read another way."""
    x, w = torch.randn((20, k)).to(dtype), torch.randn((96, k)).to(dtype)
    with kernels.use(backend):
        y = dense.product(x, w)
        assert bool(((y.double() - x.double() @ w.double().T).abs() <= 0.02 * k**0.5).all())
        for count in (1, 2, 3, 4, 5, 8):
            assert torch.equal(dense.product(x[:count], w), y[:count])
