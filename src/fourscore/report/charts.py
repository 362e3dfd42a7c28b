"""The page's pictures: altair charts drawn to SVG here, so that the page needs neither a script nor a network.

Every picture is drawn twice, for a wide page and for a phone; the style sheet shows one of them. Colours are few and
fixed; the style sheet maps each to a variable, so that the pictures follow the reader's light or dark setting.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import Any

import altair as alt
import vl_convert

from fourscore.report import wording
from fourscore.report.schema import ArmResult, Gate, Prediction, Report, TrainingRun

INK, MUTED, LINE = "#1d1c1a", "#6a675f", "#dcd9d2"  # style.css holds the same values, light and dark
GREY, ACCENT = "#a8a49b", "#2f6f9f"
VERDICT = {"PASS": "#1b7a4a", "FAIL": "#b3302a", "INCONCLUSIVE": "#96680a"}
WIDE, NARROW = 700, 336  # pixels: the text column, and a phone of 375 less its margins
TEXT = 13


def figure(draw: Callable[[int], alt.TopLevelMixin], name: str, description: str) -> str:
    """Both renderings of a chart inside one element that a screen reader announces as `description`."""
    wide = _svg(draw(WIDE), f"{name}-w")
    narrow = _svg(draw(NARROW), f"{name}-n")
    return (
        f'<div class="chart" role="img" aria-label="{escape(description)}">'
        f'<div class="wide" aria-hidden="true">{wide}</div><div class="narrow" aria-hidden="true">{narrow}</div></div>'
    )


def _svg(chart: Any, prefix: str) -> str:
    configured = (
        chart.configure(background="transparent", font="sans-serif", padding=2)
        .configure_view(strokeOpacity=0)
        .configure_axis(
            labelFontSize=TEXT - 1, titleFontSize=TEXT - 1, labelColor=MUTED, titleColor=MUTED, titleFontWeight="normal",
            gridColor=LINE, domainColor=LINE, tickColor=LINE, aria=False,
        )
        .configure_mark(aria=False)
        .configure_title(fontSize=TEXT, fontWeight=600, color=INK, anchor="start", aria=False)
    )  # fmt: skip
    svg = vl_convert.vegalite_to_svg(configured.to_dict(), allowed_base_urls=[])
    svg = re.sub(r'\b(id="|url\(#|href="#)', lambda m: f"{m.group(1)}{prefix}-", svg)  # one page, many pictures: ids must differ
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (role|aria-[a-z]+)="[^"]*"', "", svg)
    width, height = re.search(r'<svg[^>]*? width="([\d.]+)" height="([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    return re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" focusable="false">', svg, count=1)


def accuracy(report: Report, score: str, accent: str) -> Callable[[int], Any] | None:
    """Bars: right answers on the study's own task, arm by arm, the shipped one in the accent colour."""
    rows = []
    trivial = report.data.trivial_answer if report.data else None
    for arm in report.arms:
        share = getattr(arm.tasks["desk"], f"accuracy_{score}") if "desk" in arm.tasks else None
        if share is None or (arm.arm == "qlora" and not arm.shipped):
            continue
        rows.append({"arm": wording.arm_name(arm.arm, trivial), "share": share, "whole": 1, "text": wording.percent(share, 0 if share >= 0.1 else 1),
                     "colour": accent if arm.shipped else GREY})  # fmt: skip
    if not rows:
        return None

    def draw(width: int) -> Any:
        order = [row["arm"] for row in rows]
        y = alt.Y("arm:N", sort=order, axis=None, scale=alt.Scale(paddingInner=0.62, paddingOuter=0.5))
        plot = alt.Chart(alt.Data(values=rows))
        unit = alt.Scale(domain=[0, 1])
        track = plot.mark_bar(color=LINE, opacity=0.55, cornerRadius=2).encode(y=y, x=alt.X("whole:Q", scale=unit, axis=None))
        bar = plot.mark_bar(cornerRadius=2).encode(
            y=y, x=alt.X("share:Q", scale=unit, axis=None), color=alt.Color("colour:N", scale=None)
        )
        name = plot.mark_text(align="left", dy=-19, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="arm:N")
        value = plot.mark_text(align="right", dy=-19, fontSize=TEXT + 2, fontWeight=600, color=INK).encode(
            y=y, x=alt.value(width), text="text:N"
        )
        return (track + bar + name + value).properties(width=width, height=50 * len(rows))

    return draw


def forest(gates: list[Gate]) -> Callable[[int], Any]:
    """One interval a gate, all of one kind: the difference in points, the zero line, and the margin where there is one."""
    rows = [
        {
            "title": gate.title,
            "gap": 100 * gate.difference,
            "low": None if gate.low is None else 100 * gate.low,
            "high": None if gate.high is None else 100 * gate.high,
            "margin": None if gate.margin is None else -100 * gate.margin,
            "verdict": gate.verdict,
            "colour": VERDICT[gate.verdict],
        }
        for gate in gates
    ]
    ends = [v for row in rows for v in (row["gap"], row["low"], row["high"], row["margin"]) if v is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.06 * (high - low or 1.0)
    domain = [low - room, high + room]
    kept = gates[0].kind == "non-inferiority"

    def draw(width: int) -> Any:
        order = [row["title"] for row in rows]
        y = alt.Y("title:N", sort=order, axis=None)
        axis = alt.Axis(title=_forest_axis(width, kept), labelExpr=SIGNED, tickCount=5 if width < 400 else 9, domain=False, ticks=False)

        def x(field: str) -> alt.X:
            return alt.X(f"{field}:Q", scale=alt.Scale(domain=domain, nice=False), axis=axis)

        plot = alt.Chart(alt.Data(values=rows))
        colour = alt.Color("colour:N", scale=None)
        zero = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(color=INK, strokeWidth=1.2).encode(x=x("at"))
        bar = plot.mark_rule(strokeWidth=5, strokeCap="round", opacity=0.45).encode(y=y, x=x("low"), x2="high:Q", color=colour)
        dot = plot.mark_point(filled=True, size=110, opacity=1).encode(y=y, x=x("gap"), color=colour)
        bound = plot.mark_tick(thickness=2, size=26, color=INK).encode(y=y, x=x("margin"))
        name = plot.mark_text(align="left", dy=-21, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="title:N")
        word = plot.mark_text(align="right", dy=-21, fontSize=TEXT - 1, fontWeight=600).encode(
            y=y, x=alt.value(width), text="verdict:N", color=colour
        )
        layers = [zero, bar, *([bound] if kept else []), dot, name]
        if width >= 400:
            layers.append(word)
        return alt.layer(*layers).properties(width=width, height=64 * len(rows))

    return draw


SIGNED = "(datum.value > 0 ? '+' : '') + replace(datum.label, '-', '\u2212')"


def _forest_axis(width: int, kept: bool) -> str:
    words = "difference in points" if width < 400 else "difference in percentage points: tuned minus original"
    return words + ("; short line: margin" if kept else "")


def cost_and_quality(report: Report, accent: str) -> Callable[[int], Any] | None:
    """Points: right answers against the price of 1,000 answers (its interval as a line), the area standing for memory."""
    rows = []
    for arm in report.arms:
        task, energy = arm.tasks.get("desk"), arm.energy
        price = energy.per_1000_answers.money if energy else None
        share = (task.accuracy_generated if task.accuracy_generated is not None else task.accuracy_likelihood) if task else None
        if arm.arm == "trivial" or price is None or share is None or (arm.arm == "qlora" and not arm.shipped):
            continue
        rows.append({"arm": wording.arm_name(arm.arm), "memory": wording.size(arm.peak_rss_bytes), "bytes": arm.peak_rss_bytes or 0,
                     "price": price.value, "low": price.low, "high": price.high, "share": share,
                     "colour": accent if arm.shipped else GREY})  # fmt: skip
    if not rows:
        return None
    currency = next(a.energy.currency for a in report.arms if a.energy)
    constant = next((a.tasks["desk"] for a in report.arms if a.arm == "trivial" and "desk" in a.tasks), None)
    floor = None if constant is None else constant.accuracy_generated if constant.accuracy_generated is not None else constant.accuracy_likelihood
    top = 1.05 * max(row["high"] for row in rows)

    def draw(width: int) -> Any:
        small = width < 400
        plot = alt.Chart(alt.Data(values=rows))
        x = alt.X("price:Q", scale=alt.Scale(domain=[0, top], nice=False),
                  axis=alt.Axis(title=f"{currency} for 1,000 answers", tickCount=4, grid=False, format="~g"))  # fmt: skip
        y = alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, format="%", tickCount=5, domain=False, ticks=False))
        colour = alt.Color("colour:N", scale=None)
        layers = []
        if floor is not None:
            line = alt.Chart(alt.Data(values=[{"at": floor, "word": "one constant answer"}]))
            layers += [line.mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y="at:Q"),
                       line.mark_text(align="left", dy=-8, dx=4, fontSize=TEXT - 1, color=MUTED).encode(y="at:Q", x=alt.value(0), text="word:N")]  # fmt: skip
        layers.append(plot.mark_rule(strokeWidth=1.5, opacity=0.7).encode(x="low:Q", x2="high:Q", y=y, color=colour))
        area = alt.Size("bytes:Q", scale=alt.Scale(domain=[0, max(row["bytes"] for row in rows) or 1], range=[0, 900]), legend=None)
        layers.append(plot.mark_circle(opacity=0.95).encode(x=x, y=y, size=area, color=colour))
        for index, row in enumerate(rows):
            label = alt.Chart(alt.Data(values=[{**row, "text": f"{row['arm']} ({row['memory']})"}]))
            below = index % 2 == 1
            right = row["price"] > 0.6 * top
            layers.append(label.mark_text(fontSize=TEXT - (1 if small else 0), color=INK, dy=28 if below else -26,
                                          align="right" if right and small else "center").encode(x=x, y=y, text="text:N"))  # fmt: skip
        return alt.layer(*layers).properties(width=width - 46, height=290 if small else 320)

    return draw


def losses(runs: list[TrainingRun], accent: str) -> Callable[[int], Any] | None:
    """Loss against tokens read: thin lines for training, dots for validation, the label prior as a dashed line. Log scale."""
    thin, dots = [], []
    for run in runs:
        colour, who = (accent if run.shipped else GREY), f"seed {run.seed}"
        for _, tokens, train, valid in run.losses:
            if train is not None and train > 0:
                thin.append({"tokens": tokens, "loss": train, "who": who, "colour": colour})
            if valid is not None and valid > 0:
                dots.append({"tokens": tokens, "loss": valid, "who": who, "colour": colour})
    if not thin and not dots:
        return None
    prior = next((run.label_prior_loss for run in runs if run.label_prior_loss), None)

    def draw(width: int) -> Any:
        small = width < 400
        x = alt.X("tokens:Q", axis=alt.Axis(title="tokens of training text read", grid=False, tickCount=4, format="~s"))
        y = alt.Y("loss:Q", scale=alt.Scale(type="log", nice=True),
                  axis=alt.Axis(title=None, tickCount=5, format="~g", domain=False, ticks=False))  # fmt: skip
        colour = alt.Color("colour:N", scale=None)
        lines = alt.Chart(alt.Data(values=thin)).mark_line(strokeWidth=1.2, opacity=0.55).encode(x=x, y=y, detail="who:N", color=colour)
        valid = alt.Chart(alt.Data(values=dots))
        path = valid.mark_line(strokeWidth=2.4).encode(x=x, y=y, detail="who:N", color=colour)
        points = valid.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour)
        layers = [lines, path, points]
        if prior is not None:
            rule = alt.Chart(alt.Data(values=[{"at": prior, "word": "knowing only how common each answer is"}]))
            layers += [rule.mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y="at:Q"),
                       rule.mark_text(align="right", dy=-8, fontSize=TEXT - 1, color=MUTED).encode(y="at:Q", x=alt.value(width - 46), text="word:N")]  # fmt: skip
        return alt.layer(*layers).properties(width=width - 46, height=230 if small else 260)

    return draw


def prediction_ratio(rows: list[Prediction]) -> Callable[[int], Any] | None:
    """Dots: measured over predicted, on a scale where half and double are equally far; the line is a perfect prediction."""
    known = [{"what": row.what, "ratio": 1 + row.error, "text": ratio_text(row.error)} for row in rows if row.error is not None and row.error > -1]
    if not known:
        return None
    far = max(2.0, *(max(row["ratio"], 1 / row["ratio"]) for row in known)) * 1.15  # type: ignore[type-var, operator]

    def draw(width: int) -> Any:
        y = alt.Y("what:N", sort=[row["what"] for row in known], axis=None)
        ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 10) if 1 / far <= t <= far]
        x = alt.X("ratio:Q", scale=alt.Scale(type="log", domain=[1 / far, far], nice=False),
                  axis=alt.Axis(title="measured / predicted", values=ticks, labelExpr="datum.value + '\u00d7'", domain=False, ticks=False))  # fmt: skip
        plot = alt.Chart(alt.Data(values=known))
        line = alt.Chart(alt.Data(values=[{"at": 1}])).mark_rule(color=INK, strokeWidth=1.2).encode(x="at:Q")
        stem = plot.mark_rule(strokeWidth=5, opacity=0.35, color=ACCENT).encode(y=y, x=x, x2=alt.datum(1))
        dot = plot.mark_point(filled=True, size=100, color=ACCENT, opacity=1).encode(y=y, x=x)
        name = plot.mark_text(align="left", dy=-16, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="what:N")
        value = plot.mark_text(align="right", dy=-16, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(width), text="text:N")
        return (line + stem + dot + name + value).properties(width=width, height=48 * len(known))

    return draw


def ratio_text(error: float | None) -> str:
    """The error of a prediction in words: measured 12% above, 8% below."""
    if error is None:
        return wording.NONE
    share = round(100 * abs(error))
    return "as predicted" if share == 0 else f"{share}% {'above' if error > 0 else 'below'}"


def shipped_arm(arms: list[ArmResult]) -> ArmResult | None:
    """The arm that the gates judged, where it was measured."""
    return next((arm for arm in arms if arm.shipped), None)
