"""The fast path: the forward pass of Llama-like decoders in C++ (native/decoder.cpp), over a paged cache.

It computes what transformers' modelling code computes, rounding to the hidden states' dtype at the same places. A request's bits
depend on its own tokens alone (and on its adapter): not on what else is in a batch, on how its tokens were cut into calls, on
forks, or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fourscore.engine.families import TYPES, describe
from fourscore.engine.pages import Cache, Pages
from fourscore.files import FourscoreError
from fourscore.nf4 import NF4Linear, kernels

__all__ = ["Cache", "FastRunner", "Request", "supported"]

ROWS = 1024  # tokens computed at a time: more only cost memory

# A cache, the tokens that come next, of how many of them (the last ones) logits are wanted, the adapter's name.
Request = tuple[Cache, Sequence[int], int, str | None]
_native: Any = kernels._native


def supported(model: Any) -> str | None:
    """None when the fast path runs this model (or network), else the reason why not."""
    found = describe(model)
    return found if isinstance(found, str) else None


class FastRunner:
    """Runs one network. Its weights are read where they are, and must not be replaced.

    cache_bytes: most memory for the cache (None: no limit). limit: most tokens of a sequence. pages: the cache's pages.
    """

    def __init__(self, model: Any, cache_bytes: int | None = None) -> None:
        found = describe(model)
        if isinstance(found, str):
            raise FourscoreError(f"the fast path does not run this model: {found}", todo="run it through transformers")
        self._kept: list[Any] = []  # what the decoder reads and nobody else holds
        self._description = d = found
        self._head = self._linear(d.head)
        sizes = (d.hidden, d.heads, d.groups, d.width, d.inner)
        self._kept.append(d.embedding)
        self._decoder = _native.Decoder(
            sizes,
            d.scale,
            d.attention_cap,
            d.activation,
            TYPES[d.dtype],
            d.embedding.data_ptr(),
            d.embedding_scale,
            self._norm(d.last),
            self._head,
            d.logit_cap,
        )
        ropes = list(d.ropes)
        for block in d.blocks:
            parts = [self._linear(layer) for layer in block.linears.values()]
            fused = len(parts) == 4
            qkv, out, gate_up, down = (parts[:1], parts[1], parts[2:3], parts[3]) if fused else (parts[:3], parts[3], parts[4:6], parts[6])
            rope = -1 if block.rope is None else ropes.index(block.rope)
            self._decoder.add_layer([self._norm(n) for n in block.norms], qkv, out, gate_up, down, rope, block.window)
        self.limit, self.vocabulary = d.limit, d.head.out_features
        self._rope_places = 0
        self._rope_tables: list[Tensor] = []
        self._reach(min(self.limit, ROWS))
        size = self._decoder.page_bytes()
        self.pages = Pages(size, _native.PAGE, None if cache_bytes is None else cache_bytes // size)
        self._adapters: dict[str, int] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self._description.dtype

    def new(self) -> Cache:
        """An empty cache for one sequence."""
        return Cache()

    def fork(self, cache: Cache, tokens: int) -> Cache:
        """A cache of the first `tokens` tokens of another one, whose full pages it shares."""
        if not 0 <= tokens <= cache.length:
            raise FourscoreError(f"cannot fork at token {tokens} of {cache.length}", where="FastRunner.fork")
        return self.pages.fork(cache, tokens)

    def free(self, cache: Cache) -> None:
        """Give a cache's pages back. The cache is empty afterwards and can be used again."""
        self.pages.free_all(cache)

    def extend(self, requests: Sequence[Request]) -> list[Tensor]:
        """Put tokens into caches, all requests together; f32 logits [keep_last_n, vocabulary] of each request's last tokens.

        A request that does not fit (in the model's length, or in the cache's memory) is a FourscoreError, and no cache changes.
        """
        self._check(requests)
        caches = [request[0] for request in requests]
        try:
            for cache, ids, _, _ in requests:
                self.pages.grow(cache, len(ids))
        except FourscoreError:
            for cache in caches:
                self.pages.shrink(cache)
            raise
        self._reach(max((cache.length + len(ids) for cache, ids, _, _ in requests), default=0))
        logits = [torch.empty((keep, self.vocabulary), dtype=torch.float32) for _, _, keep, _ in requests]
        batch: list[tuple[int, int, int]] = []  # request, its first and its last token, of those computed together
        room = ROWS
        for i, (_, ids, _, _) in enumerate(requests):
            at = 0
            while at < len(ids):
                end = min(len(ids), at + room)
                batch.append((i, at, end))
                room -= end - at
                at = end
                if not room:
                    self._forward(requests, batch, logits)
                    batch, room = [], ROWS
        if batch:
            self._forward(requests, batch, logits)
        return logits

    def _check(self, requests: Sequence[Request]) -> None:
        if len({id(request[0]) for request in requests}) < len(requests):
            raise FourscoreError("one cache stands in two requests of a batch", where="FastRunner.extend")
        for cache, ids, keep, adapter in requests:
            if not ids or not 0 <= keep <= len(ids):
                raise FourscoreError(f"{keep} logits of {len(ids)} tokens were asked for", where="FastRunner.extend")
            if cache.length + len(ids) > self.limit:
                raise FourscoreError(f"{cache.length + len(ids)} tokens are more than the model's {self.limit}", todo="shorten the text")
            if not (min(ids) >= 0 and max(ids) < self.vocabulary):
                raise FourscoreError(f"a token is not one of {self.vocabulary} words", where="FastRunner.extend")
            if adapter is not None and adapter not in self._adapters:
                raise FourscoreError(f"no adapter named `{adapter}`", todo=f"known: {', '.join(self._adapters) or 'none'}")

    def _forward(self, requests: Sequence[Request], batch: list[tuple[int, int, int]], logits: list[Tensor]) -> None:
        ids: list[int] = []
        spans: list[tuple[int, ...]] = []
        keep: list[int] = []
        goes_to: list[tuple[int, int, int]] = []  # request, its first row of these, their number
        for i, at, end in batch:
            cache, tokens, wanted, adapter = requests[i]
            number = -1 if adapter is None else self._adapters[adapter]
            spans.append((len(ids), end - at, cache.length, cache.table.ctypes.data, number))
            first = max(at, len(tokens) - wanted)  # the first of these tokens whose logits are wanted
            if first < end:
                keep.extend(range(len(ids) + first - at, len(ids) + end - at))
                goes_to.append((i, first - (len(tokens) - wanted), end - first))
            ids.extend(tokens[at:end])
            cache.length += end - at
        ids_, spans_, keep_ = (np.array(x, dtype=np.int64) for x in (ids, spans, keep))
        alone = len(goes_to) == 1 and goes_to[0][2] == len(logits[goes_to[0][0]])
        out = logits[goes_to[0][0]] if alone else torch.empty((len(keep), self.vocabulary), dtype=torch.float32)
        places = (ids_.ctypes.data, len(ids), spans_.ctypes.data, len(spans), keep_.ctypes.data, len(keep), out.data_ptr())
        self._decoder.forward(*places, torch.get_num_threads())
        if not alone:
            row = 0
            for i, at, count in goes_to:
                logits[i][at : at + count] = out[row : row + count]
                row += count

    def _reach(self, places: int) -> None:
        """Angles for the first `places` places, as transformers computes them."""
        if places <= self._rope_places:
            return
        self._rope_places = places = min(self.limit, max(places, 2 * self._rope_places))
        self._rope_tables = []
        for number, (frequencies, scaling) in enumerate(self._description.ropes.values()):
            angles = torch.arange(places)[:, None].float() * frequencies
            cos, sin = ((f * scaling).to(self.dtype).float().contiguous() for f in (angles.cos(), angles.sin()))
            self._rope_tables += [cos, sin]
            self._decoder.set_rope(number, cos.data_ptr(), sin.data_ptr(), 2 * len(frequencies))

    def _norm(self, module: Any) -> tuple[int, float, bool]:
        """A norm as the decoder takes it."""
        if module is None:
            return (0, 0.0, True)
        weight = (module.weight.detach().float() + self._description.norm_offset).contiguous()
        self._kept.append(weight)
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return (weight.data_ptr(), float(epsilon), not self._description.norm_offset)

    def _linear(self, layer: nn.Linear) -> Any:
        """A linear layer as the decoder takes it."""
        bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
        address = 0 if bias is None else bias.data_ptr()
        if isinstance(layer, NF4Linear):
            self._kept += [bias, layer.quantised]
            return _native.packed_linear(kernels.addresses(layer.quantised), address)
        weight = layer.weight.detach()
        self._kept += [bias, weight]
        return _native.dense_linear(weight.data_ptr(), TYPES[weight.dtype], *weight.shape, address)
