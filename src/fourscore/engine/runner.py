"""The forward pass through transformers' own modelling code: the one place that knows a network's signature and limits.

The head runs only where logits are asked for, and it is the network's own (soft-caps and scales included): the positions go
in through `logits_to_keep`, and where a network lacks that, all logits are computed and the rest is thrown away.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fourscore.engine.packing import Pack

# Attention that reaches back only so far. Every name under which transformers' configurations keep such a reach.
REACH = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size", "sliding_windows")


class Runner:
    """Runs one network.

    limit: most tokens a sequence may have (None: no limit). reach: most tokens a pack may have, because attention is local
    beyond it or rotary frequencies change there; longer sequences run by themselves. recurrent: some layers carry a state.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        config = network.config.get_text_config()
        parameters = inspect.signature(network.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        self.takes_positions = "position_ids" in parameters
        self.limit = _first_int(config, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"))
        self.rope_switch = _rope_switch(config)
        reaches = [self.rope_switch, *(getattr(config, name, None) for name in REACH)]
        self.reach: int | None = min((r for r in reaches if isinstance(r, int) and r > 0), default=None)
        self.vocabulary = int(config.vocab_size)
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.new_cache().layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.network.get_input_embeddings().weight.dtype

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

    def new_cache(self) -> Cache:
        """An empty cache of the kinds that the network's layers want."""
        return DynamicCache(config=self.network.config)

    def extend(self, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Feed tokens [rows, n] after what the cache holds; the logits after the last one, f32 [rows, vocabulary].

        mask: [rows, all tokens so far], 0 on the padding at the left.
        """
        # The last place as an index, not as logits_to_keep=1: a slice is not contiguous, and torch then copies the whole
        # head once a row (2 GB for 8 rows of SmolLM2).
        kept = {"logits_to_keep": torch.tensor([ids.shape[1] - 1], device=self.device)} if self.keeps else {}
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]} if self.takes_positions else {}
        out = self.network(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions, **kept)
        return out.logits[:, -1].float()

    def after(self, ids: list[int], cache: Cache, total: int, keep: int) -> Tensor:
        """Feed one sequence's next tokens after what its cache holds, `total` tokens then; its last `keep` logits, f32 [keep, vocabulary].

        Unlike in `extend` nothing is padded, so there is no mask either.
        """
        rows = max(keep, 1)  # some networks stumble over no logits at all
        kept = {"logits_to_keep": torch.arange(len(ids) - rows, len(ids), device=self.device)} if self.keeps else {}
        positions = {"position_ids": torch.arange(total - len(ids), total, device=self.device)[None]} if self.takes_positions else {}
        mask = torch.ones(1, total, dtype=torch.long, device=self.device)
        inputs = torch.tensor([ids], device=self.device)
        out = self.network(input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **positions, **kept)
        return out.logits[0, out.logits.shape[1] - keep :].float()

    def _mask(self, pack: Pack) -> Tensor:
        """The pack's mask as added to attention scores: [1, 1, tokens, tokens], 0 or the lowest number of the dtype."""
        dtype = self.dtype
        hidden = ~pack.visible().to(self.device)
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def _first_int(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a whole number, or None."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)


def _rope_switch(config: Any) -> int | None:
    """The length beyond which rotary frequencies depend on the longest sequence of a batch (dynamic and longrope scaling)."""
    rope = getattr(config, "rope_parameters", None) or {}
    per_kind = [r for r in rope.values() if isinstance(r, dict)] or [rope]  # some networks have one set for each kind of layer
    ends = [
        r.get("original_max_position_embeddings") or _first_int(config, ("original_max_position_embeddings", "max_position_embeddings"))
        for r in per_kind
        if r.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((int(end) for end in ends if end), default=None)


def can_shrink(cache: Cache) -> bool:
    """Whether rows can leave a cache that is in use (recurrent states in transformers cannot)."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
