"""Weights that are hard to quantise."""

from __future__ import annotations

import torch

from fourscore.nf4.plain import MIDPOINTS


def weights(dtype: torch.dtype, rows: int = 24, columns: int = 128) -> dict[str, torch.Tensor]:
    """Random, constant, zero, tiny, subnormal, huge, with ties on the midpoints, and with the last block cut short."""
    generator = torch.Generator().manual_seed(rows * columns)
    normal = torch.randn((rows, columns), generator=generator, dtype=torch.float64)
    half = dtype == torch.float16
    # Sums of two neighbouring code values, halved: exactly between codes where the dtype can hold them.
    ties = torch.ones(rows * columns, dtype=torch.float64)
    ties[: rows * columns // 2] = MIDPOINTS.double().repeat(rows * columns)[: rows * columns // 2]
    return {
        name: w.to(dtype)
        for name, w in {
            "random": normal * 0.02,
            "constant": torch.full_like(normal, -0.3),
            "zero": torch.zeros_like(normal),
            "half zero": torch.where(torch.arange(columns) < columns // 2, normal, 0.0),
            "tiny": normal * (1e-7 if half else 1e-37),
            "subnormal": normal * (6e-8 if half else 1e-40),
            "around the floor": normal.clamp(-3, 3) * (1e-6 if half else 1e-38),
            "huge": normal.clamp(-3, 3) * (2e4 if half else 1e38),
            "ties": ties.view(rows, columns),
        }.items()
    }
