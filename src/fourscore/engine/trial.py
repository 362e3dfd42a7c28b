"""What a network can do, found by trying on a few random tokens, so that no list of architectures decides it.

Differences are root-mean-square differences of the logits over their spread. Rounding makes up to 0.4 of it in bf16 (SmolLM2,
random tokens, another order of the same sums) and 1e-5 in f32, so the comparison with the plain path can be sharp only in f32
(1e-3; 0.5 in 16 bits, where the logits of other tokens differ by about 1). What must not matter (a neighbour's tokens, what
stands in the padding) and what must (the positions) is therefore tried by changing it between two calls of equal shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fourscore.engine.packing import packs
from fourscore.engine.runner import Runner, can_shrink

TOKENS = 80


def packing_fault(runner: Runner) -> str | None:
    """Why sequences must not be packed, or None when a small pack gives the logits of each sequence by itself."""
    if runner.recurrent:
        return "it has recurrent layers"
    part = min(TOKENS, runner.reach or TOKENS, runner.limit or TOKENS) // 5
    if part < 2:
        return f"its attention reaches only {runner.reach} tokens"
    tokens = _random(runner, 5 * part)
    # Two branches of one beginning, the longer first, and a sequence that shares nothing.
    tokens[part], tokens[3 * part] = sorted((tokens[part], tokens[3 * part]))
    first, second, third = tokens[: 3 * part], tokens[:part] + tokens[3 * part : 4 * part], tokens[4 * part :]
    (pack,) = packs([first, second, third], budget=5 * part)
    path = dict(zip(pack.members, pack.paths, strict=True))
    places = list(range(len(pack.ids)))
    try:
        got = runner.packed(pack, places)
        for number, sequence in enumerate((first, second, third)):
            error = _difference(got[path[number]], runner.plain(sequence, len(sequence)))
            if not error <= _bound(runner):
                return f"its logits differ by {error:.1%} when sequences are packed"
        branch = set(path[0][part:])
        others = [place for place in places if place not in branch]
        changed = replace(pack, ids=[(t + (i in branch)) % runner.vocabulary for i, t in enumerate(pack.ids)])
        leak = _difference(runner.packed(changed, places)[others], got[others])
        if not leak <= _rounding(runner):
            return f"its logits differ by {leak:.1%} when a neighbour changes"
        end = set(path[1][part:])
        moved = runner.packed(replace(pack, positions=[p + 2 * (i in end) for i, p in enumerate(pack.positions)]), places)
        if torch.equal(moved, got):
            return "it takes the positions of tokens from their order"
    except Exception as error:  # whatever a network raises at inputs that it was not made for
        return f"its attention takes no mask per token ({type(error).__name__})"
    return None


def caching_fault(runner: Runner) -> str | None:
    """Why prompts must not be decoded in a padded batch with a cache, or None when prefill and one step give the plain logits."""
    length = min(TOKENS, runner.limit or TOKENS, runner.rope_switch or TOKENS) // 4
    if length < 2:
        return "it takes only a few tokens"
    tokens = _random(runner, 2 * length + 2)
    long, short = tokens[: 2 * length], tokens[length : 2 * length - 1]
    padding = len(long) - len(short)
    mask = torch.tensor([[1] * len(long), [0] * padding + [1] * len(short)], device=runner.device)
    try:
        cache = runner.new_cache()
        first = runner.extend(torch.tensor([long, [0] * padding + short], device=runner.device), mask, cache)
        other = runner.extend(torch.tensor([long, [5] * padding + short], device=runner.device), mask, runner.new_cache())
        leak = _difference(other[1], first[1])
        if not leak <= _rounding(runner):
            return f"its logits differ by {leak:.1%} with what stands in the padding"
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=-1)
        second = runner.extend(mask.new_tensor([tokens[-2:-1], tokens[-1:]]), mask, cache)
        tries = [(first[0], long), (first[1], short), (second[0], [*long, tokens[-2]]), (second[1], [*short, tokens[-1]])]
        if can_shrink(cache):
            cache.batch_select_indices(torch.tensor([1], device=runner.device))
            third = runner.extend(mask.new_tensor([tokens[:1]]), torch.cat([mask, mask.new_ones(2, 1)], dim=-1)[1:], cache)
            tries.append((third[0], [*short, tokens[-1], tokens[0]]))
        for got, sequence in tries:
            error = _difference(got, runner.plain(sequence, 1)[0])
            if not error <= _bound(runner):
                return f"its logits differ by {error:.1%} with a cache and padding"
    except Exception as error:
        return f"its cache is of another kind ({type(error).__name__})"
    return None


def chunking_fault(runner: Runner) -> str | None:
    """Why a sequence must be computed at once, or None when two chunks, the second after a cache, give the plain logits."""
    if runner.recurrent or runner.rope_switch is not None:
        return "its state or its rotary frequencies depend on the whole sequence"
    length = min(TOKENS, runner.limit or TOKENS)
    tokens = _random(runner, length)
    cut = length * 2 // 3
    try:
        cache = runner.new_cache()
        got = [runner.after(tokens[:cut], cache, cut, cut), runner.after(tokens[cut:], cache, length, length - cut)]
        error = _difference(torch.cat(got), runner.plain(tokens, length))
    except Exception as error_of_network:
        return f"it takes no tokens after a cache ({type(error_of_network).__name__})"
    return None if error <= _bound(runner) else f"its logits differ by {error:.1%} after a cache"


def _random(runner: Runner, count: int) -> list[int]:
    return torch.randint(0, runner.vocabulary, (count,), generator=torch.Generator().manual_seed(4)).tolist()


def _difference(got: Tensor, want: Tensor) -> float:
    """Root-mean-square difference over the spread of the wanted logits."""
    return float((got.float() - want.float()).square().mean().sqrt() / want.float().std().clamp_min(1e-30))


def _bound(runner: Runner) -> float:
    """Between computations of different shapes."""
    return 1e-3 if runner.dtype in (torch.float32, torch.float64) else 0.5


def _rounding(runner: Runner) -> float:
    """Between computations of the same shape: no difference but in mixtures of experts, whose parts have no fixed shape."""
    return 2 * float(torch.finfo(runner.dtype).eps ** 0.5)
