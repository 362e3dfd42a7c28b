"""The forward pass through transformers' own modelling code: the one place that knows a network's signature and limits.

The head runs only where logits are asked for, and it is the network's own (soft-caps and scales included): the positions go
in through `logits_to_keep`, and where a network lacks that, all logits are computed and the rest is thrown away.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fourscore.engine.packing import Pack, packs

# Attention that reaches back only so far. Every name under which transformers' configurations keep such a reach.
REACH = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size", "sliding_windows")


class Runner:
    """Runs one network. `limit`: most tokens a sequence may have (None: no limit); `reach`: most tokens a pack may have."""

    def __init__(self, network: Any) -> None:
        self.network = network
        config = self.network.config.get_text_config()
        parameters = inspect.signature(network.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        self.limit = first_int(config, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"))
        self.reach = _reach(config)
        self.vocabulary = int(config.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the network's input goes."""
        return self.network.get_input_embeddings().weight.device

    def plain(self, ids: list[int], rows: int) -> Tensor:
        """The last `rows` logits of one sequence by itself: [rows, vocabulary]."""
        kept = {"logits_to_keep": rows} if self.keeps else {}
        logits = self.network(input_ids=torch.tensor([ids], device=self.device), use_cache=False, **kept).logits[0]
        return logits[-rows:]

    def packed(self, pack: Pack, places: list[int]) -> Tensor:
        """Logits at these flat places of a pack: [len(places), vocabulary]."""
        keep = torch.tensor(places, device=self.device)
        inputs: dict[str, Any] = {"logits_to_keep": keep} if self.keeps else {}
        if not pack.is_one_sequence:
            inputs["position_ids"] = torch.tensor([pack.positions], device=self.device)
            inputs["attention_mask"] = self._mask(pack)
        logits = self.network(input_ids=torch.tensor([pack.ids], device=self.device), use_cache=False, **inputs).logits[0]
        return logits if self.keeps else logits[keep]

    def _mask(self, pack: Pack) -> Tensor:
        """The pack's mask as added to attention scores: [1, 1, tokens, tokens], 0 or the lowest number of the dtype."""
        dtype = self.network.get_input_embeddings().weight.dtype
        hidden = ~pack.visible().to(self.device)
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def first_int(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a whole number, or None."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)


def _reach(config: Any) -> int | None:
    """Most tokens a pack may have so that neither a local attention nor a length-dependent rotary embedding sees a difference."""
    reaches = [value for name in REACH if isinstance(value := getattr(config, name, None), int) and value > 0]
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in str(rope) or "dynamic" in str(rope):
        reaches += [value for value in (first_int(config, ("original_max_position_embeddings", "max_position_embeddings")),) if value]
        reaches += [int(rope["original_max_position_embeddings"])] if "original_max_position_embeddings" in rope else []
    return min(reaches) if reaches else None


def packing_fault(runner: Runner) -> str | None:
    """Why this network must not be packed, found by trying: None when a small random pack gives the plain logits.

    The bound on the relative root-mean-square difference of the logits is the square root of the dtype's epsilon (3e-4 in f32,
    0.09 in bf16): rounding stays well below, a mask or a position that the network ignores goes far above.
    """
    generator = torch.Generator().manual_seed(4)
    length = min(48, runner.reach or 48, runner.limit or 48)
    if length < 8:
        return f"its attention reaches only {length} tokens"
    tokens = torch.randint(0, runner.vocabulary, (2 * length,), generator=generator).tolist()
    half, third = length // 2, length // 3
    sequences = [tokens[:half], tokens[:third] + tokens[half : half + third], tokens[length : length + third]]
    (pack,) = packs(sequences, budget=2 * length)
    try:
        got = runner.packed(pack, list(range(len(pack.ids)))).float()
        for member, path in zip(pack.members, pack.paths, strict=True):
            want = runner.plain(sequences[member], len(path)).float()
            error = (got[path] - want).square().mean().sqrt() / want.std().clamp_min(1e-30)
            bound = torch.finfo(runner.network.get_input_embeddings().weight.dtype).eps ** 0.5
            if not error <= bound:
                return f"its logits differ by {error:.1%} when sequences are packed"
    except Exception as error:
        return f"its attention takes no mask per token ({type(error).__name__})"
    return None
