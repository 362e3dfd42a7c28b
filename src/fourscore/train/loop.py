"""The training run: steps, validation, early stop, checkpoints, and the adapter with the lowest validation loss.

It knows nothing of where rows come from or of how weights are stored; `train` may be killed at any moment and called
again with the same arguments.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers

from fourscore import spec
from fourscore.files import FourscoreError, hash_file, hash_json, read_json, write_json, write_jsonl
from fourscore.machine import peak_rss_bytes
from fourscore.model import base_sha256, save_adapter
from fourscore.model.device import kernels_of, peak_gpu_bytes, seeded
from fourscore.progress import say, track
from fourscore.train.batches import Example, micro_batches, plan_steps, render_examples
from fourscore.train.checkpoint import Checkpoint, load_checkpoint, random_state, remove_checkpoints, restore_random_state, save_checkpoint
from fourscore.train.fused import fused
from fourscore.train.loss import AnswerLoss
from fourscore.train.optimise import Optimiser, StepReport, judge, settle_dtype
from fourscore.train.prior import label_prior_loss

if TYPE_CHECKING:
    from fourscore.data import Row
    from fourscore.model import Model

# oneDNN keeps compiled code for every shape it meets, 0.6 MB each, 1,024 of them: batches of many lengths would grow by 20 MB a
# step. Read once, at the process's first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@dataclass(frozen=True)
class TrainResult:
    """adapter: PEFT's folder · summary: what train.json holds."""

    adapter: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One real optimiser step on the longest rows: the most memory a step of this run can take."""

    seconds: float
    tokens: int
    peak_rss_bytes: int


def train(
    model: Model, train_rows: Sequence[Row], validation_rows: Sequence[Row], settings: spec.Train, seed: int, out: Path
) -> TrainResult:
    """Train the adapter of `model` (made by `add_lora`) and write adapter/, train.json and log.jsonl into `out`.

    A checkpoint found in out/checkpoint is resumed, and removed at the end; one of another run is a FourscoreError, as are
    a loss that is not finite and a row without a trainable token (with the row's number). The same seed, rows, settings,
    kernels and thread count give the same weights bit for bit, interrupted or not (on a CPU; a GPU sums in any order).
    """
    if not train_rows or not validation_rows:
        raise FourscoreError(f"no {'validation' if train_rows else 'training'} rows", todo="change `data.split` or add rows")
    examples = render_examples(model.tokenizer, train_rows)
    held_out = render_examples(model.tokenizer, validation_rows)
    with seeded(seed, model.network), fused(model.network):
        return _Run(model, examples, held_out, settings, seed, out).go()


def _finished_before(out: Path, key: str) -> TrainResult | None:
    """The result of this very run where it was killed between its last file and its caller's next step."""
    if not (out / "train.json").is_file():
        return None
    summary = read_json(out / "train.json")
    weights = out / "adapter" / "adapter_model.safetensors"
    if summary.get("key") != key or not weights.is_file() or hash_file(weights) != summary["adapter_sha256"]:
        return None
    remove_checkpoints(out / "checkpoint")
    return TrainResult(out / "adapter", summary)


class _Run:
    """The state of one training run."""

    def __init__(self, model: Model, examples: list[Example], held_out: list[Example], settings: spec.Train, seed: int, out: Path) -> None:
        self.model, self.examples, self.held_out, self.settings, self.seed, self.out = model, examples, held_out, settings, seed, out
        self.dtype = str(settle_dtype(model.network)).removeprefix("torch.")
        self.plan = plan_steps([len(e.ids) for e in examples], settings.tokens_per_step, settings.epochs, seed)
        self.optimiser = Optimiser(model.network, settings, len(self.plan))
        self.judge_after = {round(len(self.plan) * (k + 1) / settings.evaluations) for k in range(settings.evaluations)} - {0}
        self.prior = label_prior_loss(examples, held_out)
        self.key = run_key(model, examples, held_out, settings, seed, self.dtype, self.optimiser)
        self.log: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {
            "step": 0, "tokens": 0, "supervised": 0, "padding": 0, "seconds": 0.0, "losses": [], "waited": 0, "best_step": 0
        }  # fmt: skip

    def go(self) -> TrainResult:
        """Run or resume to the end."""
        if (done := _finished_before(self.out, hash_json(self.key))) is not None:
            return done
        found = load_checkpoint(self.out / "checkpoint", self.key)
        began = time.monotonic()
        if found is None:
            start = judge(self.model.network, self.optimiser.loss, self.held_out)
            self.best = self.optimiser.weights()
            self.state |= {"validation_loss_start": start, "validation_loss": start, "losses": [[0, 0, None, start]]}
            say(f"validation loss {start:.4f} before training, {self.prior:.4f} from the answers' frequencies alone")
        else:
            self.optimiser.restore(found.adapter, found.optimiser)
            restore_random_state(found.random)
            self.best, self.state = found.best, found.state
            self.log = self.state.pop("log")
            say(f"resuming after step {self.state['step']} of {len(self.plan)}")
        before = self.state["seconds"]
        saved = time.monotonic()
        total = sum(len(self.examples[i].ids) for step in self.plan for rows in step for i in rows)
        with track(f"training (seed {self.seed}, {self.dtype})", total, "tokens") as bar:
            bar.resume_at(self.state["tokens"])
            while self.state["step"] < len(self.plan) and not self._tired():
                report = self.optimiser.step(self.state["step"], self.plan[self.state["step"]], self.examples)
                self.state["step"] += 1
                judged = self._judge(report) if self.state["step"] in self.judge_after else None
                self.state["seconds"] = before + time.monotonic() - began
                self._note(report, judged)
                bar.advance(report.tokens, **self._facts(report))
                due = judged is not None or time.monotonic() - saved > 60 * self.settings.checkpoint_minutes
                if due and self.state["step"] < len(self.plan):
                    self._save()
                    saved = time.monotonic()
        return self._finish()

    def _tired(self) -> bool:
        return bool(self.state["waited"] >= self.settings.patience)

    def _judge(self, report: StepReport) -> float:
        loss = judge(self.model.network, self.optimiser.loss, self.held_out)
        if loss < self.state["validation_loss"]:
            self.best = self.optimiser.weights()
            self.state |= {"validation_loss": loss, "best_step": self.state["step"], "waited": 0}
        else:
            self.state["waited"] += 1
        return loss

    def _note(self, report: StepReport, judged: float | None) -> None:
        state = self.state
        state["tokens"] += report.tokens
        state["supervised"] += report.supervised
        state["padding"] += report.padding
        state["losses"].append([state["step"], state["tokens"], report.loss, judged])
        self.log.append(
            {
                "step": state["step"],
                "tokens": state["tokens"],
                "padding": state["padding"],
                "loss": report.loss,
                "validation_loss": judged,
                "label_prior_loss": self.prior,
                "gradient_norm": report.gradient_norm,
                "learning_rate": report.learning_rate,
                "seconds": round(state["seconds"], 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )

    def _facts(self, report: StepReport) -> dict[str, str]:
        facts = {
            "loss": f"{report.loss:.3f}",
            "validation": f"{self.state['validation_loss']:.3f} (prior {self.prior:.3f})",
            "tokens/s": f"{self.state['tokens'] / max(self.state['seconds'], 1e-9):.0f}",
            "memory": f"{peak_rss_bytes() / 1e6:,.0f} MB",
        }
        return facts

    def _save(self) -> None:
        checkpoint = Checkpoint(
            self.optimiser.weights(), self.best, self.optimiser.state(), random_state(), {**self.state, "log": self.log}
        )
        save_checkpoint(self.out / "checkpoint", self.key, checkpoint)

    def _finish(self) -> TrainResult:
        """Write the adapter with the lowest validation loss, log.jsonl and train.json; remove the checkpoint last."""
        self.optimiser.put(self.best)
        save_adapter(self.model, self.out / "adapter")
        write_jsonl(self.out / "log.jsonl", self.log)
        state = self.state
        if state["best_step"] == 0:
            say("no evaluation was better than the untuned model: the adapter kept changes nothing")
        summary = {
            "seed": self.seed,
            "steps": state["step"],
            "steps_planned": len(self.plan),
            "best_step": state["best_step"],
            "stopped_early": state["step"] < len(self.plan),
            "tokens": state["tokens"],
            "supervised_tokens": state["supervised"],
            "padding_tokens": state["padding"],
            "seconds": state["seconds"],
            "tokens_per_second": state["tokens"] / max(state["seconds"], 1e-9),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": peak_gpu_bytes(),
            "validation_loss": state["validation_loss"],
            "validation_loss_start": state["validation_loss_start"],
            "label_prior_loss": self.prior,
            "losses": state["losses"],
            "adapter_sha256": hash_file(self.out / "adapter" / "adapter_model.safetensors"),
            "trainable_parameters": sum(p.numel() for p in self.optimiser.parameters.values()),
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "key": hash_json(self.key),
        }
        write_json(self.out / "train.json", summary)
        remove_checkpoints(self.out / "checkpoint")
        return TrainResult(self.out / "adapter", summary)


def run_key(
    model: Model, examples: list[Example], held_out: list[Example], settings: spec.Train, seed: int, dtype: str, optimiser: Optimiser
) -> dict[str, Any]:
    """What decides the weights: a checkpoint is only resumed where all of this is the same."""
    kept = settings.model_dump(mode="json", exclude={"seeds", "checkpoint_minutes"})
    start = {n: hash_json(p.detach().flatten()[:64].tolist()) for n, p in optimiser.parameters.items()}
    return {
        "settings": kept,
        "seed": seed,
        "base": base_sha256(model.path),
        "weights": model.weights,
        "rows": hash_json([[e.ids, e.prompt_length] for e in examples]),
        "validation_rows": hash_json([[e.ids, e.prompt_length] for e in held_out]),
        "adapter_at_start": hash_json(start),
        "kernels": kernels_of(model.network),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def probe(model: Model, rows: Sequence[Row], settings: spec.Train) -> Probe:
    """One real optimiser step on the longest of `rows`: seconds, tokens and this process's peak memory.

    The adapter is put back as it was. Run it in a process of its own: peak memory is the process's.
    """
    examples = render_examples(model.tokenizer, rows)
    longest = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    chosen: list[int] = []
    for index in longest:
        if chosen and sum(len(examples[i].ids) for i in [*chosen, index]) > settings.tokens_per_step:
            break
        chosen.append(index)
    settle_dtype(model.network)
    optimiser = Optimiser(model.network, settings, steps_planned=1)
    weights = optimiser.weights()
    judge(model.network, optimiser.loss, [examples[longest[-1]]])  # first-use costs of the kernels are not a step's
    began = time.monotonic()
    with fused(model.network):
        report = optimiser.step(0, micro_batches(chosen, [len(e.ids) for e in examples]), examples)
    seconds = time.monotonic() - began
    peak = peak_rss_bytes()
    optimiser.put(weights)
    return Probe(seconds, report.tokens, peak)


def loss_on_rows(model: Model, rows: Sequence[Row]) -> float:
    """Mean nats per answer token of `model` on `rows`."""
    return judge(model.network, AnswerLoss(model.network), render_examples(model.tokenizer, rows))
