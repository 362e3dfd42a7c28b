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
    environment.filters.update(
        percent=wording.percent, points=wording.points, size=wording.size, seconds=wording.seconds, milliseconds=wording.milliseconds,
        energy=wording.energy, carbon=wording.carbon, digits=wording.digits, loss=wording.loss, p_value=wording.p_value,
        task=wording.task_name, arm=_arm, money=wording.money, count=lambda n: wording.NONE if n is None else f"{n:,}",
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        r=facts,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        pictures={name: Markup(svg) for name, svg in pictures(facts).items()},
        arms=[arm for arm in facts.arms if arm.arm != "trivial"],
        before=next((arm for arm in facts.arms if arm.arm == "base-16bit"), None),
        after=charts.shipped_arm(facts.arms),
        scores=wording.SCORES,
        tasks=wording.TASKS,
        word=_WORDS[facts.verdict.verdict],
        span=wording.span,
        ranged=_ranged,
        predicted=_predicted,
        ratio=charts.ratio_text,
        data_lines=_data_lines(facts),
        machine_fact=lambda name, value: wording.size(value) if str(name).endswith("bytes") else _plain(value),
        trivial=facts.data.trivial_answer if facts.data else None,
    )


_WORDS = {"PASS": "Pass", "FAIL": "Fail", "INCONCLUSIVE": "Inconclusive"}


def pictures(facts: Report) -> dict[str, str]:
    """Name -> markup of every picture that this report has the numbers for."""
    accent = charts.VERDICT[facts.verdict.verdict]
    made: dict[str, str] = {}
    for score in ("likelihood", "generated"):
        draw = charts.accuracy(facts, score, accent)
        if draw:
            made[f"accuracy_{score}"] = charts.figure(draw, f"acc-{score}", _say_accuracy(facts, score))
    for kind in ("superiority", "non-inferiority"):
        gates = [gate for gate in facts.gates if gate.kind == kind]
        if gates:
            made[kind] = charts.figure(charts.forest(gates), kind, " ".join(f"{g.title}: {g.verdict}. {g.reading}" for g in gates))
    draw = charts.cost_and_quality(facts, accent)
    if draw:
        made["cost"] = charts.figure(draw, "cost", "Right answers against the price of 1,000 answers; the figures stand in the table below.")
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


def _ranged(estimate: Any, kind: str, currency: str = "") -> str:
    show = {"energy": wording.energy, "carbon": wording.carbon, "watts": lambda w: f"{wording.digits(w, 2)} W"}.get(kind)
    return wording.ranged(estimate, show or (lambda amount: wording.money(amount, currency)))


def _predicted(row: Prediction, value: float | None, currency: str) -> str:
    show = {"s": wording.seconds, "bytes": wording.size, "kWh": wording.energy}.get(row.unit)
    return show(value) if show else wording.money(value, currency)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_lines(facts: Report) -> list[str]:
    """What the data check counted, one line a finding; zeros that calm are said too."""
    if facts.data is None:
        return []
    told = facts.data.model_dump()
    lines = []
    if "rows_read" in told and "kept" in told:
        lines.append(f"{told['rows_read']:,} rows read, {told['kept']:,} kept.")
    for column, count in (told.get("rows_other") or {}).items():
        lines.append(f"{count:,} rows left out by `where` ({column}).")
    over_long = told.get("over_long") or {}
    if over_long:
        done = {"cut": "cut", "drop": "dropped"}.get(str(over_long.get("action")), "refused")
        lines.append(f"Over-long rows: {over_long['count']:,}" + (f", {done}." if over_long["count"] else "."))
    if "no_trainable_token" in told:
        lines.append(f"Rows with nothing to learn from: {len(told['no_trainable_token']):,}.")
    if "duplicates_exact" in told:
        lines.append(f"Repeated rows: {told['duplicates_exact']:,} exact, {told.get('duplicates_near', 0):,} nearly.")
    if "shared_train_evaluation_exact" in told:
        shared = f"{told['shared_train_evaluation_exact']:,} exact, {told.get('shared_train_evaluation_near', 0):,} nearly"
        lines.append(f"Rows shared between training and judging: {shared}.")
    return lines + [w[:1].upper() + w[1:] + ("" if w.endswith(".") else ".") for w in facts.data.warnings]
