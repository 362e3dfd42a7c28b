"""What a network can do, found by trying on a few random tokens, so that no list of architectures decides it.

The bound on the relative root-mean-square difference of the logits is three times the square root of the dtype's epsilon
(1e-3 in f32, 0.27 in bf16). Rounding stays below it (SmolLM2-135M in bf16, 30 layers on random tokens: up to 0.09); a mask or
a position that a network ignores goes far above (the logits of other tokens differ by about 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourscore.engine.packing import packs
from fourscore.engine.runner import Runner, can_shrink

TOKENS = 48


def packing_fault(runner: Runner) -> str | None:
    """Why sequences must not be packed, or None when a small pack gives the logits of each sequence by itself."""
    length = min(TOKENS, runner.reach or TOKENS, runner.limit or TOKENS)
    if runner.recurrent:
        return "it has recurrent layers"
    if length < 8:
        return f"its attention reaches only {length} tokens"
    tokens = _random(runner, 2 * length)
    half, third = length // 2, length // 3
    sequences = [tokens[:half], tokens[:third] + tokens[half : half + third], tokens[length : length + third]]
    (pack,) = packs(sequences, budget=2 * length)
    try:
        got = runner.packed(pack, list(range(len(pack.ids))))
        for member, path in zip(pack.members, pack.paths, strict=True):
            error = _difference(got[path], runner.plain(sequences[member], len(path)))
            if not error <= _bound(runner):
                return f"its logits differ by {error:.1%} when sequences are packed"
    except Exception as error:  # whatever a network raises at inputs that it was not made for
        return f"its attention takes no mask per token ({type(error).__name__})"
    return None


def caching_fault(runner: Runner) -> str | None:
    """Why prompts must not be decoded in a padded batch with a cache, or None when prefill and one step give the plain logits."""
    length = min(TOKENS, runner.limit or TOKENS) // 4
    if length < 2:
        return f"it takes only {runner.limit} tokens"
    tokens = _random(runner, 2 * length + 2)
    long, short = tokens[: 2 * length], tokens[length : 2 * length - 1]
    padding = len(long) - len(short)
    try:
        cache = runner.new_cache()
        ids = torch.tensor([long, [0] * padding + short], device=runner.device)
        mask = torch.tensor([[1] * len(long), [0] * padding + [1] * len(short)], device=runner.device)
        first = runner.extend(ids, mask, cache)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=-1)
        second = runner.extend(ids.new_tensor([tokens[-2:-1], tokens[-1:]]), mask, cache)
        tries = [(first[0], long), (first[1], short), (second[0], [*long, tokens[-2]]), (second[1], [*short, tokens[-1]])]
        if can_shrink(cache):
            cache.batch_select_indices(torch.tensor([1], device=runner.device))
            third = runner.extend(ids.new_tensor([tokens[:1]]), torch.cat([mask, mask.new_ones(2, 1)], dim=-1)[1:], cache)
            tries.append((third[0], [*short, tokens[-1], tokens[0]]))
        for got, sequence in tries:
            error = _difference(got, runner.plain(sequence, 1)[0])
            if not error <= _bound(runner):
                return f"its logits differ by {error:.1%} with a cache and padding"
    except Exception as error:
        return f"its cache is of another kind ({type(error).__name__})"
    return None


def _random(runner: Runner, count: int) -> list[int]:
    return torch.randint(0, runner.vocabulary, (count,), generator=torch.Generator().manual_seed(4)).tolist()


def _difference(got: Tensor, want: Tensor) -> float:
    """Root-mean-square difference over the spread of the wanted logits."""
    return float((got.float() - want.float()).square().mean().sqrt() / want.float().std().clamp_min(1e-30))


def _bound(runner: Runner) -> float:
    return 3 * float(torch.finfo(runner.dtype).eps ** 0.5)
