"""model-card.md: the front matter that the model hub and PEFT read, and the verdict with its figures for people.

A fact that is not known is left out or named under the limits; the card never says None.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fourscore.report import wording
from fourscore.report.schema import ArmResult, Gate, Report

# Data licences that ask nothing of the licence under which a model trained on the data is passed on.
UNCONDITIONAL = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC0-1.0",
        "CDLA-Permissive-1.0",
        "CDLA-Permissive-2.0",
        "ISC",
        "MIT",
        "MIT-0",
        "ODC-By-1.0",
        "PDDL-1.0",
        "Unlicense",
    }
)


def model_card(report: dict[str, Any]) -> str:
    """report.json's content -> the text of model-card.md."""
    facts = Report.model_validate(report)
    head = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=120)
    parts = [_intro(facts), _use(facts), _evaluation(facts), _training(facts), _limits(facts), _cost(facts), _licence(facts), _again(facts)]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Report) -> dict[str, Any]:
    """What the hub indexes: base_model, library_name, license, tags, model-index with the measured values."""
    head: dict[str, Any] = {
        "base_model": facts.model.hub_name or facts.model.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **adapter_licence(facts),
        "tags": ["lora", "qlora", "nf4", "4-bit", "fourscore"],
    }
    if facts.data and facts.data.source.startswith("hub:"):
        head["datasets"] = ["/".join(facts.data.source.removeprefix("hub:").split("/")[:2])]
    arm = _shipped(facts)
    results = _results(facts, arm) if arm else []
    if results:
        head["metrics"] = ["accuracy"]
        head["model-index"] = [{"name": facts.study.name, "results": results}]
    if facts.cost and facts.cost.kg_co2:
        head["co2_eq_emissions"] = {
            "emissions": round(1000 * facts.cost.kg_co2.value, 3),
            "source": f"fourscore, the whole study, training and evaluating ({facts.cost.method})",
            "training_type": "fine-tuning",
        }
        if facts.reproduce.machine.get("cpu"):
            head["co2_eq_emissions"]["hardware_used"] = str(facts.reproduce.machine["cpu"])
    return head


def adapter_licence(facts: Report) -> dict[str, str]:
    """The adapter's licence as the hub writes it: the base's, unless the data's licence may ask for more (then `other`, both named).

    Nothing where the base's licence is not known.
    """
    base, data = facts.model.licence, facts.data.licence if facts.data else None
    if base and (data == base or data in UNCONDITIONAL or data == "LicenseRef-own"):
        return {"license": base.lower()}
    if base is None:
        return {}
    return {"license": "other", "license_name": f"{base}-and-{data or 'data-of-unstated-licence'}".lower()}


def _results(facts: Report, arm: ArmResult) -> list[dict[str, Any]]:
    results = []
    for task, score in arm.tasks.items():
        metrics = [
            {"type": "accuracy", "name": f"accuracy, {wording.SCORES[kind][0]}", "value": round(value, 4)}
            for kind, value in (("likelihood", score.accuracy_likelihood), ("generated", score.accuracy_generated))
            if value is not None
        ]
        name, kind, source = wording.task_name(task), task, wording.task_name(task)
        if task == "desk":
            name, kind = facts.study.purpose or facts.study.name, facts.study.name
            source = facts.data.source if facts.data else name
        if metrics:
            dataset = {"type": kind, "name": f"{source} ({score.items:,} held-out items)"}
            results.append({"task": {"type": "text-generation", "name": name}, "dataset": dataset, "metrics": metrics})
    return results


def _shipped(facts: Report) -> ArmResult | None:
    return next((arm for arm in facts.arms if arm.shipped), None)


def _own_base(facts: Report) -> str | None:
    """The hash of the base that was split for the adapter; None where it works on the model itself."""
    return facts.verdict.shipped.base_sha256 if facts.verdict.shipped else None


def _intro(facts: Report) -> str:
    base = _text(facts.model.hub_name or facts.model.name)
    lines = [f"# {_text(facts.study.name)}", f"**{facts.verdict.verdict}.** {_text(facts.verdict.headline)}", _text(facts.verdict.sentence)]
    lines.append(f"A LoRA adapter for {base}, trained on the base in 4 bits (NF4) and judged on held-out questions by fourscore.")
    if own := _own_base(facts):
        lines.append(
            f"It does not work on {base} itself. It began as a part of that model ({facts.study.settings['train']['init']}), and its base "
            f"is what was left: the folder `base` that stands beside `adapter` (files with SHA-256 `{own}`)."
        )
    return "\n\n".join(line for line in lines if line)


def _use(facts: Report) -> str:
    told = f"{_text(facts.study.purpose)}\n\n" if facts.study.purpose else ""
    answers = f" Permitted answers: {', '.join(_text(c) for c in facts.study.choices)}." if facts.study.choices else ""
    caution = "" if facts.verdict.verdict == "PASS" else f" Its study did not pass ({facts.verdict.verdict}): do not use it as it is."
    base = facts.model.hub_name or facts.model.name
    own = _own_base(facts)
    told_hash = own or facts.reproduce.hashes.get("base model")
    name, base = ("base", "base") if own else (facts.model.name, base)
    double = facts.study.settings["model"]["double_quant"]
    weights = f" (files with SHA-256 `{told_hash}`)" if told_hash else ""
    code = f"""```python
import fourscore

model = fourscore.load({name!r}, weights="nf4", adapter="adapter")
```

or with PEFT and bitsandbytes, which read the same format:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}, quantization_config=nf4), "adapter")
```"""
    return (
        f"## Intended use\n\n{told}It was measured on this one task, in the wording of the study's prompt, and nowhere else."
        f"{answers}{caution}\n\n{code}\n\n"
        f"The figures below hold for this base in 4 bits{weights}. On other weights (16 bit, GGUF) nothing was checked."
    )


def _evaluation(facts: Report) -> str:
    if not facts.gates:
        return ""
    level = wording.percent(facts.study.confidence, 0)
    rows = [
        "| check | verdict | before | after | difference | interval | items | groups |",
        "|---|---|---|---|---|---|---|---|",
        *(_gate_row(gate) for gate in facts.gates),
    ]
    note = f"Differences in percentage points, paired item by item; each end of an interval is a one-sided {level} bound."
    return "## Evaluation\n\n" + "\n".join(rows) + "\n\n" + note


def _gate_row(gate: Gate) -> str:
    cells = [
        _text(gate.title),
        gate.verdict,
        wording.percent(gate.mean_over),
        wording.percent(gate.mean_arm),
        wording.points(gate.difference),
    ]
    groups = " × ".join(map(str, gate.clusters)) or wording.NONE
    return "| " + " | ".join([*cells, wording.span(gate.low, gate.high), f"{gate.items:,}", groups]) + " |"


def _training(facts: Report) -> str:
    run = next((t for t in facts.training if t.shipped), None)
    settings = facts.study.settings["train"]
    data = facts.data
    lines = []
    if data:
        lines.append(f"Data: {_text(data.source)}" + (f", {data.rows['train']:,} rows to train on" if "train" in data.rows else ""))
    lines.append(
        f"LoRA: rank {settings['rank']}, alpha {settings['alpha']:g}, targets {_text(str(settings['targets']))}, "
        f"learning rate {settings['learning_rate']:g}, {settings['epochs']:g} epoch{'' if settings['epochs'] == 1 else 's'}"
    )
    if run:
        spent = [f"{run.steps:,} steps" if run.steps else "", f"{run.tokens:,} tokens" if run.tokens else ""]
        spent.append(wording.seconds(run.seconds) if run.seconds else "")
        spent.append(f"peak memory {wording.size(run.peak_rss_bytes)}" if run.peak_rss_bytes else "")
        lines.append(f"Seed {run.seed}: " + ", ".join(s for s in spent if s))
        if run.validation_loss is not None:
            lines.append(
                f"Validation loss: {wording.loss(run.validation_loss)} nats an answer token; the lowest of {len(facts.training)} seeds"
            )
        if run.label_prior_loss is not None:
            lines.append(f"Loss of knowing only how common each answer is: {wording.loss(run.label_prior_loss)}")
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _limits(facts: Report) -> str:
    lines = [_text(facts.model.note)] if facts.model.note else []
    lines += [f"Not measured: {_text(gap.what)}. {_text(gap.why)}" for gap in facts.not_measured]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _cost(facts: Report) -> str:
    cost, arm = facts.cost, _shipped(facts)
    if cost is None:
        return ""
    spent = f" and {wording.ranged(cost.kwh, wording.energy)} of electricity" if cost.kwh else ""
    lines = [f"The whole study took {wording.seconds(cost.seconds)}{spent}."]
    each = arm.energy.per_1000_answers.kwh if arm and arm.energy else None
    if arm and arm.energy and each:
        lines.append(f"1,000 answers of the tuned model take {wording.ranged(each, wording.energy)}.")
        lines.append(f"Method: {_text(arm.energy.method)}.")
    return "## Energy\n\n" + " ".join(lines)


def _licence(facts: Report) -> str:
    data = facts.data
    base, theirs = "The base model's licence is not stated.", "The training data's licence is not stated."
    if facts.model.licence:
        base = f"The base model stands under {_text(facts.model.licence)}."
    if data and data.licence:
        theirs = f"The training data stand under {_text(data.licence)}."
    asked = [f"- {_text(line)}" for line in data.licence_obligations] if data else []
    mixed = adapter_licence(facts).get("license") == "other"
    caution = "Whether weights inherit the licence of their training data is not settled; the cautious reading keeps both." if mixed else ""
    return "\n\n".join(part for part in (f"## Licence\n\n{base} {theirs} {caution}".rstrip(), "\n".join(asked)) if part)


def _again(facts: Report) -> str:
    commands = "\n".join(facts.reproduce.commands)
    hashes = "\n".join(f"- {_text(name)}: `{digest}`" for name, digest in facts.reproduce.hashes.items())
    versions = ", ".join(f"{name} {version}" for name, version in facts.reproduce.versions.items())
    made = f"\n\nVersions: {_text(versions)}." if versions else ""
    return f"## Reproduce\n\n```\n{commands}\n```\n\nSHA-256:\n\n{hashes}{made}"


def _text(value: str) -> str:
    """Text from data inside Markdown: one line, no markup of its own."""
    flat = " ".join(value.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", flat)
