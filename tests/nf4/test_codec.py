"""Codes, scales and values: equal to bitsandbytes' own on the same weights, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes import functional as theirs
from hard_weights import weights
from hypothesis import given, settings
from hypothesis import strategies as st

from fourscore import nf4
from fourscore.files import FourscoreError
from fourscore.nf4 import codec, kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def their_values(packed: torch.Tensor, state: theirs.QuantState, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' dequantised weight. As one row: with rows that are no multiple of the block its AVX-512 kernel takes wrong scales."""
    state.dtype, state.shape = dtype, torch.Size((1, like.numel()))
    return theirs.dequantize_4bit(packed, state).view(like.shape)


def same_values(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal; but on a CPU with bf16 instructions bitsandbytes takes subnormals for zero in bf16, in whole vectors of 16 only.

    So does our 'avx512-bf16'; the other backends keep them, as bitsandbytes does elsewhere.
    """
    if ours.dtype == torch.bfloat16 and (kernels.backend() != "avx512-bf16" or ours.numel() % 16):
        ours, theirs = (torch.where(t.abs() <= 2.0**-126, 0.0, t) for t in (ours, theirs))
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "block"), [(24, 128, 64), (7, 33, 64), (5, 96, 32), (3, 640, 256)])
def test_codes_scales_and_values_are_bitsandbytes(each_backend: str, dtype: torch.dtype, rows: int, columns: int, block: int) -> None:
    for name, w in weights(dtype, rows, columns).items():
        packed, state = theirs.quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=False)
        q = nf4.quantize(w, block, double_quant=False)
        assert torch.equal(q.packed, packed), name
        assert torch.equal(q.absmax, state.absmax), name
        for out in DTYPES:
            assert same_values(nf4.dequantize(q, out), their_values(packed, state, w, out)), (name, out)


@pytest.mark.parametrize("rows", [1, 24, 300])
def test_double_quantisation_is_bitsandbytes_given_its_offset(each_backend: str, rows: int) -> None:
    for name, w in weights(torch.float32, rows, 704).items():
        if name == "huge":
            continue  # bitsandbytes' f32 mean overflows there
        packed, state = theirs.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        q = nf4.quantize(w, nested_offset=state.offset.item())
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.absmax, state.absmax), name
        assert torch.equal(q.nested_absmax, state.state2.absmax), name
        assert torch.equal(q.nested_code, state.state2.code), name
        for out in DTYPES:
            assert same_values(nf4.dequantize(q, out), their_values(packed, state, w, out)), (name, out)


def test_nested_codes_agree_on_many_values(each_backend: str) -> None:
    values = torch.randn(256 * 500, generator=torch.Generator().manual_seed(0))
    want, scales = torch.ops.bitsandbytes.quantize_blockwise(values, codec.nested_code(), 256)
    codes, absmax = kernels.nested_quantize(values, codec.nested_code(), 256)
    assert torch.equal(codes, want)
    assert torch.equal(absmax, scales)


def test_the_offset_is_the_exact_mean_whatever_the_threads(each_backend: str, threads: None) -> None:
    w = torch.randn((300, 640), generator=torch.Generator().manual_seed(1))
    offsets = set()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        offsets.add(nf4.quantize(w).nested_offset)
    exact = math.fsum(nf4.quantize(w, double_quant=False).absmax.tolist()) / (300 * 640 // 64)
    assert offsets == {torch.tensor(exact, dtype=torch.float64).float().item()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_named(each_backend: str, dtype: torch.dtype, bad: float) -> None:
    w = torch.ones((40, 100), dtype=dtype)
    w[39, 99] = w[17, 3] = bad
    with pytest.raises(FourscoreError, match=r"^model\.q_proj\.weight: the weight holds -?(nan|inf) at row 17, column 3"):
        nf4.quantize(w, name="model.q_proj.weight")


@pytest.mark.parametrize(
    ("w", "block"),
    [(torch.ones((2, 2), dtype=torch.float64), 64), (torch.ones(4), 64), (torch.ones((2, 2)), 48), (torch.ones((0, 4)), 64)],
)
def test_what_cannot_be_quantised_is_refused(w: torch.Tensor, block: int) -> None:
    with pytest.raises(FourscoreError):
        nf4.quantize(w, block)


def test_dequantise_writes_into_the_buffer_it_is_given(each_backend: str) -> None:
    q = nf4.quantize(torch.randn((8, 128)))
    buffer = torch.empty((8, 128), dtype=torch.float16)
    assert nf4.dequantize(q, torch.float16, out=buffer) is buffer
    assert torch.equal(buffer, nf4.dequantize(q, torch.float16))
    for wrong in (torch.empty((8, 128)), torch.empty((128, 8), dtype=torch.float16).t(), torch.empty((4, 256), dtype=torch.float16)):
        with pytest.raises(FourscoreError, match="buffer"):
            nf4.dequantize(q, torch.float16, out=wrong)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    block=st.sampled_from([32, 64, 128, 256]),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    strided=st.booleans(),
    n=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_backend_gives_the_same_bits(
    rows: int, columns: int, block: int, double: bool, dtype: torch.dtype, out: torch.dtype, strided: bool, n: int, seed: int
) -> None:
    w = torch.randn((rows, columns * 2), generator=torch.Generator().manual_seed(seed)).to(dtype)
    w = w[:, ::2] if strided else w[:, :columns]
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        results = []
        for backend in kernels.available():
            with kernels.use(backend):
                q = nf4.quantize(w, block, double)
                results.append((q.packed, q.absmax, torch.tensor(q.nested_offset), nf4.dequantize(q, out)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_size_is_4_127_bits_a_weight() -> None:
    q = nf4.quantize(torch.randn((1024, 4096)))
    assert 4.12 < q.nbytes * 8 / (1024 * 4096) < 4.13
