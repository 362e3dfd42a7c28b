"""What report.json holds, as pydantic models; `report.schema.json` beside this file is made from them.

Two kinds of section. `Closed` ones are composed here and hold exactly the fields named. `Open` ones pass on what another
room measured: the fields this room draws are named and checked, whatever else that room writes is kept as it came.
A number that was not measured is null, never zero, and stands in `not_measured`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


class Closed(BaseModel):
    """A section with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Open(BaseModel):
    """A section written by another room; further fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Estimate(Open):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Quantiles(Open):
    """Median and 95th percentile."""

    p50: float | None = None
    p95: float | None = None


class Latency(Open):
    """Milliseconds a person waits, one request at a time."""

    prefill_ms: Quantiles | None = None
    first_token_ms: Quantiles | None = None
    decode_ms_per_token: Quantiles | None = None
    answer_ms: Quantiles | None = None
    requests: int | None = None
    prompt_tokens_p50: float | None = None


class Throughput(Open):
    """Tokens a second with many requests at once."""

    score_tokens_per_second: float | None = None
    generate_tokens_per_second: float | None = None


class PerThousand(Open):
    """What 1,000 answers cost."""

    kwh: Estimate | None = None
    kg_co2: Estimate | None = None
    money: Estimate | None = None


class Energy(Open):
    """Electricity, and how it was obtained. `answer_seconds` is the time of one answer."""

    method: str
    watts: Estimate | None = None
    answer_seconds: float | None = None
    per_1000_answers: PerThousand = PerThousand()
    currency: str = ""
    note: str = ""


class TaskScore(Open):
    """One task of one arm."""

    items: int
    clusters: Any = None
    accuracy_likelihood: float | None = None
    accuracy_generated: float | None = None
    perplexity_answer: float | None = None
    seconds: float | None = None


class Fidelity(Open):
    """Distance from base-16bit: KL in nats a token, share of tokens with the same first choice, answers that flipped."""

    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    same_top: float | None = None
    perplexity_ratio: float | None = None
    tokens: int | None = None
    flips: dict[str, Any] = {}


class ArmResult(Open):
    """One arm as measured: `name` is the arm, or arm-seed for a trained one."""

    name: str
    arm: str
    seed: int | None = None
    shipped: bool = False
    weights: str | None = None
    disk_bytes: int | None = None
    adapter_bytes: int | None = None
    load_seconds: float | None = None
    device: str | None = None
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    latency: Latency | None = None
    throughput: Throughput | None = None
    energy: Energy | None = None
    tasks: dict[str, TaskScore] = {}
    fidelity: Fidelity | None = None
    threads: int | None = None
    kernels: str | None = None
    seconds: float | None = None


class Comparison(Open):
    """A paired difference of two arms on the same items; low and high are each one-sided bounds at `confidence`."""

    task: str
    score: str
    arm: str
    over: str
    mean_arm: float
    mean_over: float
    difference: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    items: int
    clusters: list[int] = []
    discordant: list[int] | None = None
    smallest_effect: float | None = None
    items_needed: int | None = None
    p: float | None = None
    method: str = ""


class Gate(Comparison):
    """A comparison that decides, with a reading of it in plain words."""

    name: str
    kind: Literal["superiority", "non-inferiority"]
    margin: float | None = None
    verdict: Outcome
    p_holm: float | None = None
    title: str
    reading: str


class Recipe(Open):
    """What another seed of the same recipe would give: unknown under five seeds."""

    task: str
    score: str
    over: str
    seeds: list[int]
    differences: list[float]
    mean: float
    low: float | None = None
    high: float | None = None
    note: str = ""


class Floor(Open):
    """A/A: the same arm through the other engine path. What this much measuring noise looks like."""

    task: str
    score: str
    items: int
    flips: int
    difference: float
    low: float | None = None
    high: float | None = None


class Shipped(Open):
    """The adapter that the gates judged."""

    arm: str
    seed: int | None = None
    adapter_sha256: str | None = None
    base_sha256: str | None = Field(None, description="of the adapter's own base (`base/` in the run folder), where it has one")
    validation_loss: float | None = None


class Verdict(Closed):
    """The answer: `headline` for everyone, `sentence` as the study wrote it, `advice` what to do next."""

    verdict: Outcome
    headline: str
    advice: str
    sentence: str
    shipped: Shipped | None


class Purpose(Closed):
    """The study's own facts."""

    name: str
    purpose: str
    digest: str = Field(description="SHA-256 of the study file's content")
    confidence: float
    choices: list[str]
    settings: dict[str, Any] = Field(description="the whole study file")


class BaseModelFacts(Closed):
    """The model that was tuned. `note` is what a reader must know of its weights."""

    name: str
    licence: str | None
    parameters: int | None
    note: str
    hub_name: str | None


class DataFacts(Open):
    """The data: check.json as it came, with the licence."""

    source: str
    sha256: str | None = None
    licence: str | None = None
    licence_obligations: list[str] = []
    rows: dict[str, int] = {}
    groups: dict[str, int] = {}
    labels: dict[str, dict[str, int]] = {}
    trivial_answer: str | None = None
    warnings: list[str] = []


class TrainingRun(Open):
    """One training run (train-<seed>.json). Losses in nats an answer token; `losses` rows are step, tokens, training, validation."""

    seed: int
    shipped: bool = False
    steps: int | None = None
    steps_planned: int | None = None
    stopped_early: bool | None = None
    tokens: int | None = None
    supervised_tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    validation_loss: float | None = None
    validation_loss_start: float | None = None
    label_prior_loss: float | None = None
    losses: list[tuple[float, float, float | None, float | None]] = []
    trainable_parameters: int | None = None
    dtype: str | None = None
    threads: int | None = None


class Prediction(Closed):
    """Predicted before the run, measured in it. `error` is measured / predicted - 1; null where either is missing."""

    what: str
    unit: Literal["s", "bytes", "kWh", "money"]
    predicted: float | None
    measured: float | None
    error: float | None
    how: str


class StudyCost(Closed):
    """Time, electricity, carbon and money of the whole study (training and evaluating), scaled from the measured power."""

    seconds: float
    kwh: Estimate | None
    kg_co2: Estimate | None
    money: Estimate | None
    currency: str
    method: str


class Reply(Closed):
    """One model's answer to one item. `chance` is its share of likelihood on the right answer, among the permitted ones."""

    text: str
    correct: bool
    chance: float | None


class AnswerPair(Closed):
    """One item, before and after."""

    id: str
    question: str | None
    gold: str
    before: Reply
    after: Reply
    change: Literal["got worse", "still wrong", "got better", "still right"]


class Answers(Closed):
    """The chosen pairs, and how many there were of each change, so that nobody takes the choice for the whole."""

    score: str
    counts: dict[str, int]
    pairs: list[AnswerPair]


class AnswerShare(Closed):
    """One permitted answer: how many items have it, how often each model gave it, how often rightly."""

    answer: str
    items: int
    before_said: int
    before_right: int
    after_said: int
    after_right: int


class Gap(Closed):
    """Something this report does not know, and why."""

    what: str
    why: str


class Reproduce(Closed):
    """What someone else needs to do it again."""

    commands: list[str]
    hashes: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]


class Report(Closed):
    """report.json."""

    format: Literal["fourscore report 1"] = "fourscore report 1"
    verdict: Verdict
    study: Purpose
    model: BaseModelFacts
    data: DataFacts | None
    arms: list[ArmResult]
    gates: list[Gate]
    explain: list[Comparison]
    recipe: list[Recipe]
    floor: list[Floor]
    training: list[TrainingRun]
    predictions: list[Prediction]
    plan_warnings: list[str]
    cost: StudyCost | None
    answers: Answers | None
    by_answer: list[AnswerShare]
    not_measured: list[Gap]
    reproduce: Reproduce


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of report.json, as committed. `python -m fourscore.report.schema` writes it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="serialization")}
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
