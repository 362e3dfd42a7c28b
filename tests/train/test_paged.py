"""bitsandbytes' AdamW in place of torch's: the same steps, and a state that survives a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourscore.train.paged import paged, put_state, state_tensors, to_bitsandbytes


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(device)) for s in ((8, 64), (40, 8))]


def walk(adamw: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for group in adamw.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for i, w in enumerate(weights):
            w.grad = torch.sin(w.detach() * (3 + step) + i)
        adamw.step()


def test_on_a_cpu_nothing_changes() -> None:
    adamw = torch.optim.AdamW(parameters(), fused=True)
    assert paged(adamw) is adamw


def both(device: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer, list[nn.Parameter], torch.optim.Optimizer]:
    ours, theirs = parameters(device), parameters(device)
    plain = torch.optim.AdamW(ours, lr=1e-2, weight_decay=0.1)
    return ours, plain, theirs, to_bitsandbytes(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1))


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: this path has not been run here")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_it_takes_the_steps_of_adamw(device: str) -> None:
    ours, plain, theirs, other = both(device)
    walk(plain, ours, range(5))
    walk(other, theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.equal(a, parameters(device)[0] if a.shape == (8, 64) else parameters(device)[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["torch", "bitsandbytes"])
def test_its_state_goes_into_a_checkpoint_and_back(kind: str, device: str) -> None:
    ours, plain, theirs, other = both(device)
    weights, adamw = (ours, plain) if kind == "torch" else (theirs, other)
    assert state_tensors(adamw, weights[0]) == {}
    walk(adamw, weights, range(3))
    kept = [{k: v.clone() for k, v in state_tensors(adamw, w).items()} for w in weights]
    values = [w.detach().clone() for w in weights]
    walk(adamw, weights, range(3, 6))

    ours, plain, theirs, other = both(device)
    again, resumed = (ours, plain) if kind == "torch" else (theirs, other)
    with torch.no_grad():
        for w, value in zip(again, values, strict=True):
            w.copy_(value)
    for w, kinds in zip(again, kept, strict=True):
        put_state(resumed, w, kinds)
    walk(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
