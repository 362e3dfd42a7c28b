"""How long a person waits: real prompts, one at a time, through the same steps that serve them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fourscore.data.rows import Row
from fourscore.data.template import end_of_turn, render_prompt
from fourscore.machine import Meter
from fourscore.progress import track

if TYPE_CHECKING:
    from fourscore.engine import Engine


@dataclass(frozen=True)
class Timed:
    """One request in seconds. prefill: the prompt's forward pass alone; first_token: from the messages to the first token's id,
    rendering included; steps: each further token; answer: from the messages to the text."""

    prefill: float
    first_token: float
    steps: list[float]
    answer: float
    prompt_tokens: int


@dataclass(frozen=True)
class Latency:
    """All timed requests, and what the processor's counters say they used (joules, None without counters)."""

    requests: list[Timed]
    seconds: float
    joules: float | None

    @property
    def answer_seconds(self) -> float:
        """Mean time of a whole answer."""
        return float(np.mean([r.answer for r in self.requests]))

    @property
    def watts(self) -> float | None:
        """Mean measured power over the timed requests."""
        return None if self.joules is None else self.joules / self.seconds

    def to_json(self) -> dict[str, Any]:
        """The `latency` section of the measures. decode_ms_per_token is over all steps of all requests, null where no answer had one."""
        return {
            "prefill_ms": quantiles([r.prefill for r in self.requests]),
            "first_token_ms": quantiles([r.first_token for r in self.requests]),
            "decode_ms_per_token": quantiles([step for r in self.requests for step in r.steps]),
            "answer_ms": quantiles([r.answer for r in self.requests]),
            "requests": len(self.requests),
            "prompt_tokens_p50": float(np.median([r.prompt_tokens for r in self.requests])),
        }


def quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50 and p95 in milliseconds; None for no values."""
    if not seconds:
        return None
    return {"p50": 1000 * float(np.quantile(seconds, 0.5)), "p95": 1000 * float(np.quantile(seconds, 0.95))}


def measure_latency(engine: Engine, rows: Sequence[Row], requests: int, max_new_tokens: int, title: str) -> Latency:
    """Answer `requests` of the rows, spread evenly over them, one at a time. One answer before them warms up and is not counted."""
    chosen = [rows[i * len(rows) // min(requests, len(rows))] for i in range(min(requests, len(rows)))]
    stops = engine.stop_ids | {end_of_turn(engine.tokenizer)}
    _answer(engine, chosen[0], max_new_tokens, stops)
    timed = []
    with track(f"{title}: latency", len(chosen), "requests") as bar:
        started = time.perf_counter()
        with Meter() as meter:
            for row in chosen:
                timed.append(_answer(engine, row, max_new_tokens, stops))
                bar.advance()
        return Latency(timed, time.perf_counter() - started, meter.joules)


def _answer(engine: Engine, row: Row, max_new_tokens: int, stops: set[int]) -> Timed:
    started = time.perf_counter()
    prompt = render_prompt(engine.tokenizer, row.messages)
    rendered = time.perf_counter()
    state = engine.prefill(prompt)
    first = last = time.perf_counter()
    ids, steps = [state.next_id], []
    while ids[-1] not in stops and len(ids) < max_new_tokens:
        ids.append(engine.step(state))
        now = time.perf_counter()
        steps.append(now - last)
        last = now
    engine.tokenizer.decode(ids, skip_special_tokens=True)
    return Timed(first - rendered, first - started, steps, time.perf_counter() - started, len(prompt))
