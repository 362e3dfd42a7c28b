"""report.json's content -> report.html. The template holds the words, `charts` the pictures, `wording` the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fourscore.report import charts, wording
from fourscore.report.schema import ArmResult, Prediction, Report

HERE = Path(__file__).parent


def render(report: dict[str, Any]) -> str:
    """One self-contained page: no script, no request. Everything that came from data is escaped."""
    facts = Report.model_validate(report)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(FILTERS)
    return environment.get_template("report.html.j2").render(
        r=facts,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        pictures={**dict.fromkeys(PICTURES, Markup("")), **{name: Markup(svg) for name, svg in pictures(facts).items()}},
        arms=[arm for arm in facts.arms if arm.arm != "trivial" and (arm.arm != "qlora" or arm.shipped)],
        currency=next((arm.energy.currency for arm in facts.arms if arm.energy), ""),
        before=next((arm for arm in facts.arms if arm.arm == "base-16bit"), None),
        after=charts.shipped_arm(facts.arms),
        scores=wording.SCORES,
        tasks=wording.TASKS,
        word=_WORDS[facts.verdict.verdict],
        span=wording.span,
        estimate=_estimate,
        unreadable=_unreadable(facts),
        notes=_arm_notes(facts),
        skills=_skills(facts),
        predicted=_predicted,
        ratio=charts.ratio_text,
        gate_kinds=GATE_KINDS,
        data_lines=_data_lines(facts),
        machine_fact=_machine_fact,
        machine_names=MACHINE_NAMES,
        trivial=facts.data.trivial_answer if facts.data else None,
    )


GATE_KINDS = (
    (
        "superiority",
        "Must be better",
        "Dot: the measured difference. Bar: its interval. A check passes when the whole bar lies right of the upright line: no difference.",
    ),
    (
        "non-inferiority",
        "Must not be lost",
        "The red line is the loss that the study allowed before it ran. A check passes when the whole bar lies right of it.",
    ),
)
MACHINE_NAMES = {
    "cpu": "Processor", "cores": "Cores", "threads": "Threads", "memory_bytes": "Memory", "os": "System", "virtual": "Virtual machine",
    "instructions": "Instruction sets", "kernels": "4-bit kernels", "dtype": "Computed in", "device": "Computed on",
}  # fmt: skip
_WORDS = {"PASS": "Pass", "FAIL": "Fail", "INCONCLUSIVE": "Inconclusive"}


PICTURES = ("accuracy_likelihood", "accuracy_generated", "superiority", "non-inferiority", "cost", "losses", "predictions")


def pictures(facts: Report) -> dict[str, str]:
    """Name -> markup of every picture that this report has the numbers for."""
    accent = charts.VERDICT[facts.verdict.verdict]
    made: dict[str, str] = {}
    for score in ("likelihood", "generated"):
        draw = charts.accuracy(facts, score, accent)
        if draw:
            made[f"accuracy_{score}"] = charts.figure(draw, f"acc-{score}", _say_accuracy(facts, score), narrow_only=True)
    for kind in ("superiority", "non-inferiority"):
        gates = [gate for gate in facts.gates if gate.kind == kind]
        if gates:
            made[kind] = charts.figure(charts.forest(gates), kind, " ".join(f"{g.title}: {g.verdict}. {g.reading}" for g in gates))
    draw = charts.cost_and_quality(facts, accent)
    if draw:
        told = "Right answers against the price of 1,000 answers; the figures stand in the table below."
        made["cost"] = charts.figure(draw, "cost", told)
    draw = charts.losses(facts.training, accent)
    if draw:
        made["losses"] = charts.figure(draw, "loss", "Loss falling while training; the figures stand in the table below.")
    draw = charts.prediction_ratio(facts.predictions)
    if draw:
        told = ". ".join(f"{p.what}: {charts.ratio_text(p.error)}" for p in facts.predictions if p.error is not None)
        made["predictions"] = charts.figure(draw, "plan", f"Measured against predicted. {told}.")
    return made


def _say_accuracy(facts: Report, score: str) -> str:
    parts = []
    for arm in facts.arms:
        share = getattr(arm.tasks["desk"], f"accuracy_{score}") if "desk" in arm.tasks else None
        if share is not None and (arm.arm != "qlora" or arm.shipped):
            parts.append(f"{wording.arm_name(arm.arm, facts.data.trivial_answer if facts.data else None)} {wording.percent(share)}")
    return f"Right answers by {wording.SCORES[score][0]}: {'; '.join(parts)}."


def _arm(arm: str | ArmResult) -> str:
    """An arm, or arm-seed, in plain words."""
    name = arm.name if isinstance(arm, ArmResult) else arm
    stem, _, seed = name.rpartition("-")
    return f"{wording.arm_name(stem)} (seed {seed})" if seed.isdigit() else wording.arm_name(name)


def _estimate(estimate: Any, kind: str, currency: str = "") -> tuple[str, str]:
    """A figure and its interval, in words; dashes where it was not measured."""
    if estimate is None:
        return wording.NONE, ""
    show = {"energy": wording.energy, "carbon": wording.carbon, "watts": lambda w: f"{wording.digits(w, 2)} W"}.get(kind)
    show = show or (lambda amount: wording.money(amount, currency))
    return show(estimate.value), wording.between(estimate, show)


def _unreadable(facts: Report) -> str:
    """How many written answers named none of the permitted ones, or several; they count as wrong."""
    told = []
    for arm in facts.arms:
        read = (arm.tasks["desk"].model_extra or {}).get("matched_by") if "desk" in arm.tasks and arm.arm != "trivial" else None
        if read and (arm.arm != "qlora" or arm.shipped):
            bad = read.get("none", 0) + read.get("several", 0)
            told.append(f"{wording.arm_name(arm.arm)}: {bad:,} of {arm.tasks['desk'].items:,}")
    return "; ".join(told)


def _arm_notes(facts: Report) -> list[str]:
    """What the measuring noted, each once, with the arms it is about."""
    about: dict[str, list[str]] = {}
    for arm in facts.arms:
        for note in (arm.model_extra or {}).get("notes") or []:
            about.setdefault(str(note), []).append(_arm(arm))
    return [f"{', '.join(arms)}: {note}." for note, arms in about.items()]


def _skills(facts: Report) -> list[str]:
    """Where the kept skills' questions come from, and under which licence."""
    known: dict[str, Any] = {}
    for arm in facts.arms:
        known |= (arm.model_extra or {}).get("skills") or {}
    lines = []
    for task, told in known.items():
        broken = len(told.get("broken") or [])
        left_out = f"; {broken:,} broken lines left out" if broken else ""
        name, about = wording.TASKS.get(task, (task, "a kept skill"))
        lines.append(f"{name}: {about}. From {told['source']}, licence {told['licence']}{left_out}.")
    return lines


def _predicted(row: Prediction, value: float | None, currency: str) -> str:
    show = {"s": wording.seconds, "bytes": wording.size, "kWh": wording.energy}.get(row.unit)
    return show(value) if show else wording.money(value, currency)


def _machine_fact(name: str, value: Any) -> str:
    return wording.size(value) if name.endswith("bytes") and isinstance(value, int) else _plain(value)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return _upper_first(text) + ("" if text.endswith((".", "!", "?")) else ".")


def _tiny(value: float | None) -> str:
    return "under 0.0001" if value is not None and abs(value) < 1e-4 else wording.digits(value, 2)


def _counted(number: int | None) -> str:
    return "not counted" if number is None else f"{number:,}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_lines(facts: Report) -> list[str]:
    """What the data check counted, one line a finding; zeros that calm are said too."""
    if facts.data is None:
        return []
    told = facts.data.model_dump()
    lines = []
    if "rows_read" in told and "kept" in told:
        lines.append(f"{told['rows_read']:,} rows read, {told['kept']:,} kept.")
    if told.get("rows_other"):
        lines.append(f"{told['rows_other']:,} rows set aside by the study's `where`.")
    over_long = told.get("over_long") or {}
    if over_long:
        done = {"cut": "cut", "drop": "dropped"}.get(str(over_long.get("action")), "refused")
        lines.append(f"Over-long rows: {over_long['count']:,}" + (f", {done}." if over_long["count"] else "."))
    if "no_trainable_token" in told:
        lines.append(f"Rows with nothing to learn from: {len(told['no_trainable_token']):,}.")
    if "duplicates_exact" in told:
        lines.append(f"Repeated training rows: {told['duplicates_exact']:,} exactly, {_counted(told.get('duplicates_near'))} nearly.")
    if "shared_train_evaluation_exact" in told:
        near = f"{_counted(told.get('shared_train_evaluation_near'))} held-out questions nearly equal one of them"
        lines.append(f"Training rows that repeat a held-out question: {told['shared_train_evaluation_exact']:,}, removed; {near}, kept.")
    second = told.get("second_group")
    if second:
        lines.append(f"Second group: {_plain(second)}.")
    return lines + [_sentence(warning) for warning in facts.data.warnings]


def _count(number: int | None) -> str:
    return wording.NONE if number is None else f"{number:,}"


FILTERS: dict[str, Any] = {
    "arm": _arm,
    "carbon": wording.carbon,
    "count": _count,
    "digits": wording.digits,
    "energy": wording.energy,
    "loss": wording.loss,
    "milliseconds": wording.milliseconds,
    "money": wording.money,
    "percent": wording.percent,
    "points": wording.points,
    "seconds": wording.seconds,
    "size": wording.size,
    "sentence": _sentence,
    "task": wording.task_name,
    "tiny": _tiny,
    "upperfirst": _upper_first,
}
