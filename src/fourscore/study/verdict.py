"""From items to a verdict: a pure function of the item files, the losses and the gates that the study wrote down.

`fourscore verify` calls `derive` again on the same files and compares the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourscore import stats
from fourscore.files import FourscoreError, read_jsonl
from fourscore.spec import Study

Items = dict[str, list[dict[str, Any]]]  # task -> items
FIELD = {"likelihood": "correct", "generated": "generated_correct"}
READABLE = {"likelihood": "by likelihood", "generated": "by what it writes"}


def read_arms(study: Study, folders: Mapping[str, Path]) -> dict[str, Items]:
    """Arm (with its seed) -> task -> items, out of the folders of the finished evaluation steps and of the floor."""
    arms = {}
    for step, folder in folders.items():
        if step.startswith("evaluate-") or step == "floor":
            files = sorted((folder / "items").glob("*.jsonl"))
            arms[step.removeprefix("evaluate-")] = {file.stem: read_jsonl(file) for file in files}
    return arms


def derive(study: Study, arms: Mapping[str, Items], losses: Mapping[int, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The content of verdict.json. The shipped adapter is that of `seed`."""
    shipped = arms[f"qlora-{seed}"]
    confidence = study.evaluate.confidence
    gates = []
    for score in study.evaluate.gain.scores:
        for over in study.evaluate.gain.over:
            name = f"desk better than {over}, {READABLE[score]}"
            gates.append(_gate(name, shipped, arms[over], "desk", score, f"qlora-{seed}", over, None, confidence))
    for skill in study.evaluate.keep:
        name = f"{skill.task} kept within {100 * skill.margin:g} points"
        reference = arms["base-16bit"]
        gates.append(_gate(name, shipped, reference, skill.task, "likelihood", f"qlora-{seed}", "base-16bit", skill.margin, confidence))
    against_failing = [gate["p_fail"] for gate in gates]
    for gate, adjusted in zip(gates, stats.holm(against_failing), strict=True):
        gate["p_holm"] = adjusted
    verdict = stats.intersection_union([gate["verdict"] for gate in gates], against_failing, 1 - confidence)
    return {
        "study": study.study,
        "verdict": verdict,
        "sentence": sentence(verdict, gates),
        "shipped": {"arm": "qlora", "seed": seed, **losses[seed]},
        "gates": gates,
        "explain": _explain(study, arms, seed),
        "recipe": _recipe(study, arms),
        "floor": _floor(arms, seed, confidence),
    }


def _gate(
    name: str, arm: Items, over: Items, task: str, score: str, arm_name: str, over_name: str, margin: float | None, confidence: float
) -> dict[str, Any]:
    """One gate: superiority where `margin` is None, else non-inferiority. p is against passing wrongly, p_fail against failing wrongly."""
    paired = compare(arm, over, task, score, confidence)
    decision = stats.superiority(paired) if margin is None else stats.non_inferiority(paired, margin)
    kind = "superiority" if margin is None else "non-inferiority"
    p_fail = compare(over, arm, task, score, confidence).p_above(margin or 0.0)
    decided = {"margin": margin, "verdict": decision.verdict, "p": decision.p, "p_fail": p_fail, "items_needed": decision.items_needed}
    return _row(name, kind, task, score, arm_name, over_name, paired) | decided


def compare(arm: Items, over: Items, task: str, score: str, confidence: float) -> stats.Paired:
    """The paired difference arm minus over on one task. Both must have answered the very same items."""
    left, right = _keyed(arm, task), _keyed(over, task)
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise FourscoreError(
            f"two arms did not answer the same items of {task} ({len(odd)} differ, the first is {odd[0][0]})",
            todo="delete the run folder's items and run the study again",
        )
    keys = list(left)
    field = FIELD[score]
    a, b = [float(left[k][field]) for k in keys], [float(right[k][field]) for k in keys]
    clusters = [tuple(left[k]["cluster"]) for k in keys]
    return stats.paired_difference(a, b, clusters, confidence)


def _keyed(arm: Items, task: str) -> dict[tuple[str, str], dict[str, Any]]:
    if task not in arm:
        raise FourscoreError(f"an arm has no items of {task}", todo="run the study again")
    keyed = {(item["id"], item["prompt_hash"]): item for item in arm[task]}
    if len(keyed) != len(arm[task]):
        raise FourscoreError(f"{task} has the same item twice in one arm", todo="set `data.duplicates: drop`, or remove the repeated rows")
    return keyed


def _row(name: str, kind: str, task: str, score: str, arm: str, over: str, paired: stats.Paired) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "task": task,
        "score": score,
        "arm": arm,
        "over": over,
        "mean_arm": paired.mean_a,
        "mean_over": paired.mean_b,
        "difference": paired.difference,
        "low": paired.low,
        "high": paired.high,
        "confidence": paired.confidence,
        "items": paired.items,
        "clusters": list(paired.clusters),
        "discordant": list(paired.discordant),
        "smallest_effect": paired.smallest_effect,
        "method": paired.method,
    }


def _scores(items: list[dict[str, Any]]) -> list[str]:
    return [score for score, field in FIELD.items() if all(item[field] is not None for item in items)]


def _explain(study: Study, arms: Mapping[str, Items], seed: int) -> list[dict[str, Any]]:
    """Where the difference arises, rung by rung; shown, never decided on."""
    rungs = [("base-nf4", "base-16bit", "what 4 bits cost"), (f"qlora-{seed}", "base-nf4", "what tuning changed")]
    rows = []
    for arm, over, name in rungs:
        if arm in arms and over in arms:
            for task in sorted(arms[arm].keys() & arms[over].keys()):
                for score in _scores(arms[arm][task]):
                    paired = compare(arms[arm], arms[over], task, score, study.evaluate.confidence)
                    rows.append(_row(name, "difference", task, score, arm, over, paired))
    return rows


def _recipe(study: Study, arms: Mapping[str, Items]) -> list[dict[str, Any]]:
    """What the recipe would do again: an interval over the seeds, apart from the shipped adapter's verdict."""
    seeds = study.train.seeds
    asked = [("desk", score, over) for score in study.evaluate.gain.scores for over in study.evaluate.gain.over]
    asked += [(skill.task, "likelihood", "base-16bit") for skill in study.evaluate.keep]
    rows = []
    for task, score, over in asked:
        confidence = study.evaluate.confidence
        differences = [compare(arms[f"qlora-{s}"], arms[over], task, score, confidence).difference for s in seeds]
        interval = stats.seeds_interval(differences, confidence)
        rows.append(
            {
                "task": task,
                "score": score,
                "over": over,
                "seeds": list(seeds),
                "differences": differences,
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "note": interval.note,
            }
        )
    return rows


def _floor(arms: Mapping[str, Items], seed: int, confidence: float) -> list[dict[str, Any]]:
    """The same adapter through the engine's other path: differences here are the instrument's, not the model's."""
    rows = []
    for task, items in sorted(arms["floor"].items()):
        ids = {item["id"] for item in items}
        # Rounding does not know of clusters, and a small floor may have but one.
        plain, packed = (
            [{**item, "cluster": [item["id"]]} for item in each if item["id"] in ids] for each in (items, arms[f"qlora-{seed}"][task])
        )
        for score in _scores(items):
            paired = compare({task: plain}, {task: packed}, task, score, confidence)
            measured = {"difference": paired.difference, "low": paired.low, "high": paired.high}
            rows.append({"task": task, "score": score, "items": paired.items, "flips": sum(paired.discordant), **measured})
    return rows


def sentence(verdict: str, gates: Sequence[Mapping[str, Any]]) -> str:
    """The verdict in one sentence, with its reason."""
    gains = [gate for gate in gates if gate["kind"] == "superiority"]
    first = gains[0]
    change = (
        f"{100 * first['mean_over']:.0f}% to {100 * first['mean_arm']:.0f}% right answers on held-out questions, {first['over']} to tuned"
    )
    if verdict == "PASS":
        over = " and ".join(dict.fromkeys(str(gate["over"]) for gate in gains))
        kept = [str(gate["task"]) for gate in gates if gate["kind"] == "non-inferiority"]
        return f"The tuned model beats {over} ({change})" + (f" and kept {' and '.join(kept)} within the margins." if kept else ".")
    if verdict == "FAIL":
        failed = ", ".join(str(gate["name"]) for gate in gates if gate["verdict"] == "FAIL")
        return f"Do not ship this model ({change}): not met: {failed}."
    open_gates = ", ".join(str(gate["name"]) for gate in gates if gate["verdict"] != "PASS")
    return f"This study cannot decide yet ({change}): too few items to tell: {open_gates}."
