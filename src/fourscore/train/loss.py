"""Cross-entropy over answer tokens without ever holding [B, T, vocabulary] logits.

The hidden states of answer positions are gathered just before the output head, inside the model's own forward, so that
whatever an architecture does around its head (a soft cap, a scale) still happens. Where the logits are shown to be the
head's output and nothing more, the vocabulary is worked through in chunks of positions, forward and backward at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourscore.files import FourscoreError
from fourscore.train.ops import nats_

CHUNK = 256  # positions whose logits exist at one time: 25 MB of bf16 at a vocabulary of 49,152; 128 cost 6% more, 64 twice that
SHOWN = 4  # positions on which the model's own logits are compared with its head's output


class AnswerLoss:
    """Sum of nats over answer tokens, differentiable. `network`: a transformers CausalLM, or PEFT's wrapper of one."""

    def __init__(self, network: nn.Module) -> None:
        inner = cast(Any, network)
        self.causal_lm: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        head = self.causal_lm.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise FourscoreError(f"{type(self.causal_lm).__name__} has no output head", todo="train a causal language model")
        self.head = head
        self.plain: bool | None = None if self._may_be_plain() else False

    def _may_be_plain(self) -> bool:
        config = self.causal_lm.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        frozen = not any(p.requires_grad for p in self.head.parameters())
        return type(self.head) is nn.Linear and frozen and getattr(config, "final_logit_softcapping", None) is None

    def __call__(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """input_ids i64 [B, T], positions i64 [n] into the flattened [B*T], targets i64 [n] -> f32 scalar, in nats.

        Source: the model's own logits at `positions`, soft-max in f32.
        """
        if self.plain is None:
            self.plain = self._shown_plain(input_ids, positions)
        hidden, logits = self._forward(input_ids, positions, everything=not self.plain)
        if not self.plain:
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        head = cast(nn.Linear, self.head)
        return cast(Tensor, _ChunkedNats.apply(hidden, head.weight, head.bias, targets))

    def _shown_plain(self, input_ids: Tensor, positions: Tensor) -> bool:
        """Are the model's logits exactly its head's output? Seen on a few positions of the first batch."""
        with torch.no_grad(), _without_dropout(self.causal_lm):
            hidden, logits = self._forward(input_ids, positions[:SHOWN], everything=True)
            return torch.equal(logits.float(), self.head(hidden[None])[0].float())

    def _forward(self, input_ids: Tensor, positions: Tensor, everything: bool) -> tuple[Tensor, Tensor]:
        """One forward pass -> hidden states [n, H] at `positions`, and the logits of all of them or of the first."""
        caught: list[Tensor] = []

        def gather(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
            hidden = given[0] if given else None
            if caught or not isinstance(hidden, Tensor) or hidden.shape[:2] != input_ids.shape:
                raise FourscoreError(
                    f"{type(self.causal_lm).__name__} calls its output head in a way that fourscore does not know",
                    todo="train another architecture, or report this model",
                )
            caught.append(hidden.flatten(0, 1).index_select(0, positions))
            # A copy of the first: a slice keeps the whole's strides, and torch then copies the head's weights.
            return (caught[0][None] if everything else caught[0][:1].detach().clone()[None],)

        handle = self.head.register_forward_pre_hook(gather)
        try:
            logits = self.causal_lm(input_ids=input_ids, use_cache=False).logits
        finally:
            handle.remove()
        if not caught:
            raise FourscoreError(f"{type(self.causal_lm).__name__} never calls its output head", todo="report this model")
        return caught[0], logits[0]


@contextlib.contextmanager
def _without_dropout(network: nn.Module) -> Iterator[None]:
    """Leave no trace in the random stream: dropout off, the training flag restored."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


class _ChunkedNats(torch.autograd.Function):
    """Sum of cross-entropies with a frozen head; the gradient of `hidden` is made while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(targets), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = F.linear(hidden[rows], weight, bias)
            total += nats_(logits, targets[rows], gradient is not None).sum()
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * outer[0]).to(gradient.dtype), None, None, None
