"""What a study will take, predicted from a probe of its real steps: one optimiser step on the longest rows, a few items an arm.

The report sets these predictions beside what was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fourscore import stats
from fourscore.files import FourscoreError, read_json
from fourscore.progress import duration
from fourscore.spec import Study
from fourscore.study import environment

PROBE_ITEMS = 8  # items a task: enough for a speed, seconds to run
FLOOR_ITEMS = 50  # items a task of the A/A floor: its path shares no context, so an item costs as much as ten packed ones
GROWTH = 1.5  # peak memory of a whole run over that of its probe: 1.44 and 1.58 on the pilot (bench/LOG.md)
SECONDS_A_YEAR = 365.25 * 24 * 3600
GUESSED_DISCORDANCE = 0.2  # share of items on which two arms differ, before anything is measured


def plan(study: Study, base: Path, data: Path) -> dict[str, Any]:
    """The content of plan.json: predicted seconds, memory, energy and money, and the smallest differences the study could show.

    Money is electricity and the machine's wear, as in the measures. Raises FourscoreError when a row could not be trained on.
    """
    from fourscore.machine import describe_machine, power
    from fourscore.model.device import gpu_memory_bytes, peak_gpu_bytes

    began = time.monotonic()
    check = read_json(data / "check.json")
    machine = describe_machine()
    probe = _probe(study, base, data)
    memory = int(study.memory_gb * 2**30) if study.memory_gb else machine.memory_bytes
    tokens = sum(_training_tokens(study, check))
    starts = probe["start_seconds"]
    train_seconds = len(study.train.seeds) * (starts + probe["load_seconds"] + tokens / probe["tokens"] * probe["seconds"])
    evaluate_seconds, floor_seconds, evaluate_peak = _evaluate_seconds(study, base, data, check, starts)
    train_peak, evaluate_peak = int(GROWTH * probe["peak_rss_bytes"]), int(GROWTH * evaluate_peak)
    total = train_seconds + evaluate_seconds + floor_seconds + time.monotonic() - began
    gpu = gpu_memory_bytes()
    gpu_peaks = {"train_peak_gpu_bytes": probe["peak_gpu_bytes"], "evaluate_peak_gpu_bytes": peak_gpu_bytes()} if gpu else {}
    watts = power(study.cost.watts, machine, threads=environment.threads(study))
    kwh = watts.watts * total / 3.6e6
    wear = study.cost.machine_price * total / (study.cost.machine_years * SECONDS_A_YEAR)
    return {
        "model_bytes": probe["model_bytes"],
        "device": environment.describe(study)["device"],
        "predicted": {
            "train_seconds": train_seconds,
            "train_peak_rss_bytes": train_peak,
            "evaluate_seconds": evaluate_seconds,
            "evaluate_peak_rss_bytes": evaluate_peak,
            **gpu_peaks,
            "total_seconds": total,
            "energy_kwh": kwh,
            "money": kwh * study.cost.price_per_kwh + wear,
        },
        "power": asdict(watts),
        "machine": machine.to_json(),
        "fits": max(train_peak, evaluate_peak) <= memory,
        "gpu_memory_bytes": gpu,
        "memory_limit_bytes": memory,
        "probe": {k: probe[k] for k in ("seconds", "tokens", "peak_rss_bytes")},
        "training_tokens": tokens,
        "smallest_effect": _smallest_effects(study, check),
        "warnings": list(check["warnings"]),
    }


def _training_tokens(study: Study, check: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of forward and backward over all epochs, and validation tokens at a third of the price (forward only)."""
    rows = max(1, check["rows"]["train"])
    trained = int(check["tokens"]["train"] * study.train.epochs)
    validated = int(check["tokens"]["train"] / rows * check["rows"]["validation"] * (study.train.evaluations + 1) / 3)
    return trained, validated


def _probe(study: Study, base: Path, data: Path) -> dict[str, Any]:
    """Probe training in a process of its own: the peak memory is the probe's, and the time to start Python is seen too."""
    order = json.dumps({"study": study.model_dump(mode="json"), "base": str(base), "data": str(data)})
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "fourscore.study.probe", str(os.getpid())], input=order, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise FourscoreError(
            f"the training probe ended with exit code {done.returncode}" + (" (out of memory?)" if done.returncode == -9 else ""),
            todo="lower `train.tokens_per_step` or `data.max_tokens`; what went wrong stands above",
        )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in told:
        raise FourscoreError(told["error"]["what"], where=told["error"]["where"], todo=told["error"]["todo"])
    return told | {"start_seconds": max(0.0, time.monotonic() - began - told["working_seconds"])}


def _evaluate_seconds(study: Study, base: Path, data: Path, check: Mapping[str, Any], starts: float) -> tuple[float, float, int]:
    """Seconds of the evaluation steps and of the A/A floor, and peak memory, from a few items of the reference and of the 4-bit arm."""
    from fourscore.machine import peak_rss_bytes

    items = {"desk": check["rows"]["evaluation"]} | {skill.task: skill.items for skill in study.evaluate.keep}
    packed = {arm: _timed_arm(arm, study, base, data, items, PROBE_ITEMS, "packed") for arm in ("base-16bit", "base-nf4")}
    few = {task: min(count, FLOOR_ITEMS) for task, count in items.items()}
    plain = _timed_arm("base-nf4", study, base, data, few, PROBE_ITEMS // 2, "plain")
    in_4_bits = len(study.train.seeds) + ("base-nf4" in study.evaluate.arms)
    return packed["base-16bit"] + starts + in_4_bits * (packed["base-nf4"] + starts), plain + starts, peak_rss_bytes()


def _timed_arm(
    arm: str, study: Study, base: Path, data: Path, items: Mapping[str, int], limit: int, path: Literal["packed", "plain"]
) -> float:
    """Seconds of an arm over `items`, stretched from `limit` of each task; loading and latency are not stretched."""
    from fourscore.evaluate import evaluate_arm

    with tempfile.TemporaryDirectory() as folder:
        told = evaluate_arm(arm, None, study, base, data, Path(folder), limit=limit, path=path)
    stretched = sum(measured["seconds"] * (items[task] / measured["items"] - 1) for task, measured in told["tasks"].items())
    return float(told["seconds"] + stretched)


def _smallest_effects(study: Study, check: Mapping[str, Any]) -> dict[str, float]:
    desk = check["rows"]["evaluation"]
    clusters = check["groups"]["evaluation"] if study.data.group else desk
    confidence = study.evaluate.confidence
    effects = {"desk": stats.smallest_effect_before(desk, min(clusters, desk), GUESSED_DISCORDANCE, confidence=confidence)}
    for skill in study.evaluate.keep:
        effects[skill.task] = stats.smallest_effect_before(skill.items, None, GUESSED_DISCORDANCE, confidence=confidence)
    return effects


def plan_text(told: Mapping[str, Any]) -> str:
    """plan.json for people."""
    predicted = told["predicted"]
    gib = 2**30
    lines = [
        f"computes on      {told['device']}",
        f"fits in memory   {'yes' if told['fits'] else 'NO'}: training needs {predicted['train_peak_rss_bytes'] / gib:.2f} GiB, "
        f"measuring {predicted['evaluate_peak_rss_bytes'] / gib:.2f} GiB, "
        f"{told['memory_limit_bytes'] / gib:.1f} GiB may be used (the 4-bit model is {told['model_bytes'] / 2**20:,.0f} MiB)",
        f"training         {duration(predicted['train_seconds'])} "
        f"(probe: {told['probe']['tokens']:,} tokens in {told['probe']['seconds']:.1f} s)",
        f"measuring        {duration(predicted['evaluate_seconds'])}",
        f"together         {duration(predicted['total_seconds'])}, {predicted['energy_kwh'] * 1000:.0f} Wh ({told['power']['method']})",
        "could show       "
        + ", ".join(f"{100 * effect:.1f} points on {task}" for task, effect in told["smallest_effect"].items())
        + f" (80% power, if {100 * GUESSED_DISCORDANCE:.0f}% of the answers differ)",
    ]
    if told["gpu_memory_bytes"]:
        lines[2:2] = [
            f"of the GPU       training needs {predicted['train_peak_gpu_bytes'] / gib:.2f} GiB, measuring "
            f"{predicted['evaluate_peak_gpu_bytes'] / gib:.2f} GiB, it has {told['gpu_memory_bytes'] / gib:.1f} GiB "
            "(its electricity is not counted)"
        ]
    return "\n".join([*lines, *(f"warning          {line}" for line in told["warnings"])])
