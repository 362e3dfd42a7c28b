"""One optimiser step: micro-batches, gradients, clipping, AdamW, the learning rate. It knows nothing of files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fourscore import spec
from fourscore.files import FourscoreError
from fourscore.machine import has_bf16
from fourscore.train.batches import Example, Step, collate, micro_batches
from fourscore.train.loss import AnswerLoss
from fourscore.train.paged import paged, put_state, state_tensors

FLOOR = 0.1  # the cosine ends at this share of the peak learning rate
JUDGE_TOKENS = 2048  # tokens of one forward pass when nothing is kept for a backward pass


@dataclass(frozen=True)
class StepReport:
    """What one step did. loss: mean nats per answer token of its rows; gradient_norm: before clipping."""

    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    supervised: int
    padding: int


def settle_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of the activations, which the embedding decides; where the CPU has no bf16 instructions, 16 bit becomes f32.

    Converts, in place, the frozen 16-bit parameters in that case; NF4 bytes and scales stay as they are.
    """
    weight = cast(Any, network).get_input_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype in (torch.float32, torch.float64):
        return weight.dtype
    if weight.dtype == torch.bfloat16 and has_bf16():
        return weight.dtype
    for parameter in network.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.requires_grad:
            parameter.data = parameter.data.float()
    return torch.float32


def learning_groups(parameters: Mapping[str, nn.Parameter], lora_plus: float | None) -> list[dict[str, Any]]:
    """Parameter groups with `lr_ratio`: the learning rate of each is that many times the schedule's.

    LoRA+ (arXiv 2402.12354): B learns `lora_plus` times as fast as A; DoRA's magnitudes go with B, as in PEFT.
    """
    fast = {n for n, p in parameters.items() if lora_plus is not None and ("lora_B" in n or p.dim() == 1)}
    groups = [([p for n, p in parameters.items() if n not in fast], 1.0), ([parameters[n] for n in parameters if n in fast], lora_plus)]
    return [{"params": members, "lr_ratio": ratio} for members, ratio in groups if members]


class Optimiser:
    """AdamW over the trainable (LoRA) parameters of a network, with warm-up and cosine over `steps_planned` steps."""

    def __init__(self, network: nn.Module, settings: spec.Train, steps_planned: int) -> None:
        self.network, self.settings, self.steps_planned = network, settings, steps_planned
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        wrong = [n for n, p in self.parameters.items() if p.dtype != torch.float32]
        if not self.parameters or wrong:
            raise FourscoreError(
                f"parameter {wrong[0]} is {self.parameters[wrong[0]].dtype}, training needs f32"
                if wrong
                else "the model has nothing to train",
                todo="make the model with `add_lora`",
            )
        self.loss = AnswerLoss(network)
        groups = learning_groups(self.parameters, settings.lora_plus)
        self.adamw = paged(torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True))

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0): linear warm-up, then half a cosine down to a tenth of the peak."""
        warm = math.ceil(self.settings.warmup * self.steps_planned)
        if step < warm:
            return self.settings.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps_planned - 1 - warm)
        return self.settings.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))

    def step(self, number: int, plan: Step, examples: Sequence[Example]) -> StepReport:
        """Do step `number` (from 0). The loss is the mean over the step's answer tokens, however they fall into micro-batches.

        A loss or gradient that is not finite is a FourscoreError that names the rows.
        """
        self.network.train()
        self.adamw.zero_grad(set_to_none=True)
        supervised = sum(examples[i].supervised for rows in plan for i in rows)
        nats = tokens = padding = 0.0
        for rows in plan:
            batch = collate(examples, rows)
            loss = self.loss(batch.input_ids, batch.positions, batch.targets)
            if not math.isfinite(loss.item()):
                self._stop_at_row(examples, rows, number)
            (loss / supervised).backward()
            nats += loss.item()
            tokens += batch.tokens
            padding += batch.padding
        rate = self.learning_rate(number)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip))
        if not math.isfinite(norm):
            numbers = ", ".join(str(examples[i].number) for rows in plan for i in rows)
            raise FourscoreError(
                f"the gradient of step {number + 1} is {norm} (rows {numbers})", todo="look at these rows, or lower `learning_rate`"
            )
        if norm == 0.0:
            raise FourscoreError(
                f"the gradient of step {number + 1} is zero: nothing would be learnt", todo="report this: it is a fault of fourscore"
            )
        self.adamw.step()
        return StepReport(nats / supervised, norm, rate, int(tokens), supervised, int(padding))

    def _stop_at_row(self, examples: Sequence[Example], rows: Sequence[int], number: int) -> None:
        for index in rows:
            alone = judge(self.network, self.loss, [examples[index]], whole=False)
            if not math.isfinite(alone):
                raise FourscoreError(
                    f"the loss of row {examples[index].number} is {alone} (step {number + 1})",
                    todo="look at that row; if it is sound, lower `learning_rate`",
                )
        numbers = ", ".join(str(examples[i].number) for i in rows)
        raise FourscoreError(f"the loss of rows {numbers} together is not finite (step {number + 1})", todo="lower `learning_rate`")

    def state(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name; empty before the first step."""
        return {
            f"{kind}.{name}": value
            for name, parameter in self.parameters.items()
            for kind, value in state_tensors(self.adamw, parameter).items()
        }

    def restore(self, adapter: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Put weights and AdamW's state back. Names that do not fit are a FourscoreError."""
        self.put(adapter)
        for name, parameter in self.parameters.items():
            kinds = {k.split(".", 1)[0]: v for k, v in state.items() if k.split(".", 1)[1] == name}
            if kinds:
                put_state(self.adamw, parameter, kinds)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trainable parameters."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` into the trainable parameters."""
        if weights.keys() != self.parameters.keys():
            raise FourscoreError("the adapter has other layers than the model", todo="delete the checkpoint to start again")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])


def judge(network: nn.Module, loss: AnswerLoss, examples: Sequence[Example], whole: bool = True) -> float:
    """Mean nats per answer token, without gradients; leaves the network's mode, gradients and random stream alone.

    A loss that is not finite is a FourscoreError when `whole`, else the returned value.
    """
    was = network.training
    network.eval()
    lengths = [len(e.ids) for e in examples]
    nats = 0.0
    try:
        with torch.no_grad():
            for rows in micro_batches(range(len(examples)), lengths, JUDGE_TOKENS):
                batch = collate(examples, rows)
                nats += loss(batch.input_ids, batch.positions, batch.targets).item()
    finally:
        network.train(was)
    if whole and not math.isfinite(nats):
        for example in examples:
            if not math.isfinite(judge(network, loss, [example], whole=False)):
                raise FourscoreError(
                    f"the loss of row {example.number} is not finite", todo="look at that row; if it is sound, lower `learning_rate`"
                )
    return nats / sum(e.supervised for e in examples)
