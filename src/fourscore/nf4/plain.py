"""NF4 in plain torch: what runs where the C++ extension is absent, and what the C++ is tested against.

Every function takes and gives the tensors the C++ does; roundings are the same one by one. Only `linear` differs: torch's
matrix product does not keep one order of summation, so rows are not batch-invariant on this backend.
"""

from __future__ import annotations

import torch

# arXiv 2305.14314, appendix E: quantiles of N(0, 1), zero exact, scaled to [-1, 1].
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
CODE = torch.tensor(NF4_VALUES, dtype=torch.float32)
# A value on a midpoint takes the lower code.
MIDPOINTS = (CODE[:-1] + CODE[1:]) / 2
# The last block, when it is cut short, is divided by its absmax and others multiplied by the reciprocal: bitsandbytes'
# rounding. It also keeps this floor as that block's absmax.
FLOOR = 1e-38


def quantize(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """flat: [n] float -> packed u8 [ceil(n / 2), 1], absmax f32 [ceil(n / block_size)], index of the first non-finite value or -1."""
    values = flat.float()
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        return torch.empty(0), torch.empty(0), int(torch.argmin(finite.to(torch.uint8)))
    whole = values.numel() // block_size * block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if whole else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=FLOOR)).unsqueeze(1)).view(-1)
    if whole < values.numel():
        last = values[whole:].abs().max().clamp(min=FLOOR)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, values[whole:] / last])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = torch.bucketize(scaled, MIDPOINTS, out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax, -1


def nested_quantize(values: torch.Tensor, table: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values: f32 [n] -> u8 codes of `table` (f32 [256], sorted) [n], absmax f32 [ceil(n / block_size)].

    As bitsandbytes does it: a value in [-1, 1] is first rounded to one of 65,536 steps, and the step has a code.
    """
    steps = -1.0 + (2.0 * torch.arange(65536, dtype=torch.float32)) / 65535
    code_of_step = torch.bucketize(steps, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax).unsqueeze(1)).clamp(-1, 1)
    # f64 here rounds once, to f32, as the fused multiply-add of the original does.
    step = (((scaled + 1.0) * 0.5).double() * 65535 + 0.5).float().nan_to_num(0).long()
    codes = torch.where((absmax == 0).unsqueeze(1), torch.zeros((), dtype=torch.uint8), code_of_step[step])
    return codes.view(-1)[:n].contiguous(), absmax


def nested_dequantize(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, offset: float, block_size: int) -> torch.Tensor:
    """u8 codes [n] -> f32 [n]: table value times its block's absmax, plus the offset."""
    n = codes.numel()
    scale = absmax.repeat_interleave(block_size)[:n] if n > 1 else absmax[:1]
    return table[codes.int()] * scale + offset


def dequantize(packed: torch.Tensor, scales: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """packed codes and f32 scales -> values, written into `out` (any shape, any float dtype)."""
    n = out.numel()
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[:n]
    values = CODE[codes.int()]
    values *= scales.repeat_interleave(block_size)[:n]
    out.copy_(values.view(out.shape))
