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


def figure(draw: Callable[[int], Any], name: str, description: str, narrow_only: bool = False) -> str:
    """Both renderings of a chart inside one element that a screen reader announces as `description`."""
    narrow = _svg(draw(NARROW), f"{name}-n")
    inner = narrow if narrow_only else f'<div class="wide">{_svg(draw(WIDE), f"{name}-w")}</div><div class="narrow">{narrow}</div>'
    return f'<div class="chart" role="img" aria-label="{escape(description)}">{inner}</div>'


def _svg(chart: Any, prefix: str) -> str:
    configured = (
        chart.configure(background="transparent", font="sans-serif", padding=2)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=TEXT - 1, titleFontSize=TEXT - 1, labelColor=MUTED, titleColor=MUTED, titleFontWeight="normal",
            gridColor=LINE, domainColor=LINE, tickColor=LINE, aria=False,
        )
        .configure_mark(aria=False)
        .configure_title(fontSize=TEXT, fontWeight=600, color=INK, anchor="start", aria=False)
    )  # fmt: skip
    svg = vl_convert.vegalite_to_svg(configured.to_dict(), allowed_base_urls=[])
    svg = _own_ids(svg, prefix)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (role|aria-[a-z]+)="[^"]*"', "", svg)
    width, height = (re.search(rf'<svg[^>]*? {side}="([\d.]+)"', svg)[1] for side in ("width", "height"))  # type: ignore[index]
    root = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true" focusable="false">'
    return re.sub(r"<svg[^>]*>", root, svg, count=1)


def _own_ids(svg: str, prefix: str) -> str:
    """Ids numbered anew: Vega counts on over the whole process, and on one page the ids of many pictures must differ."""
    for number, name in enumerate(re.findall(r'\bid="([^"]+)"', svg)):
        svg = re.sub(rf'(id="|url\(#|href="#){re.escape(name)}(?=[")])', rf"\g<1>{prefix}-{number}", svg)
    return svg


def accuracy(report: Report, score: str, accent: str) -> Callable[[int], Any] | None:
    """Bars: right answers on the study's own task, arm by arm, the shipped one in the accent colour."""
    rows = []
    trivial = report.data.trivial_answer if report.data else None
    for arm in report.arms:
        share = getattr(arm.tasks["desk"], f"accuracy_{score}") if "desk" in arm.tasks else None
        if share is None or (arm.arm == "qlora" and not arm.shipped):
            continue
        text = wording.percent(share, 1 if 0 < share < 0.1 else 0)
        colour = accent if arm.shipped else GREY
        rows.append({"arm": wording.arm_name(arm.arm, trivial), "share": share, "whole": 1, "text": text, "colour": colour})
    if not rows:
        return None

    def draw(width: int) -> Any:
        order = [row["arm"] for row in rows]
        y = alt.Y("arm:N", sort=order, axis=None, scale=alt.Scale(paddingInner=0.62, paddingOuter=0.5))
        plot = alt.Chart(alt.Data(values=rows))
        unit = alt.Scale(domain=[0, 1])
        track = plot.mark_bar(color=LINE, opacity=0.55, cornerRadius=2).encode(y=y, x=alt.X("whole:Q", scale=unit, axis=None))
        bar = plot.mark_bar(cornerRadius=2).encode(y=y, x=alt.X("share:Q", scale=unit, axis=None), color=alt.Color("colour:N", scale=None))
        name = plot.mark_text(align="left", dy=-19, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="arm:N")
        value = plot.mark_text(align="right", dy=-19, fontSize=TEXT + 2, fontWeight=600, color=INK).encode(
            y=y, x=alt.value(width), text="text:N"
        )
        return (track + bar + name + value).properties(width=width, height=50 * len(rows))

    return draw


def forest(gates: list[Gate]) -> Callable[[int], Any]:
    """One interval a gate, all of one kind: the difference in points, the zero line, and the margin where there is one."""
    rows: list[dict[str, Any]] = [
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
    for row in rows:
        row |= {"start": domain[0], "end": domain[1], "zero": 0}

    def draw(width: int) -> Any:
        y = alt.Y("title:N", sort=[row["title"] for row in rows], axis=None)
        words = "percentage points" if width < 400 else f"tuned minus {'original' if kept else 'the other'}, in percentage points"
        ticks = 5 if width < 400 else 9
        axis = alt.Axis(title=words, labelExpr=SIGNED, tickCount=ticks, grid=False, domain=False, ticks=False, titlePadding=6)

        def x(field: str) -> alt.X:
            return alt.X(f"{field}:Q", scale=alt.Scale(domain=domain, nice=False), axis=axis)

        plot = alt.Chart(alt.Data(values=rows))
        colour = alt.Color("colour:N", scale=None)
        layers = [
            plot.mark_rule(color=LINE, strokeWidth=1).encode(y=y, x=x("start"), x2="end:Q"),
            plot.mark_rule(strokeWidth=5, strokeCap="round", opacity=0.45).encode(y=y, x=x("low"), x2="high:Q", color=colour),
            plot.mark_tick(thickness=1.5, size=18, color=INK).encode(y=y, x=x("zero")),
            plot.mark_point(filled=True, size=120, opacity=1).encode(y=y, x=x("gap"), color=colour),
            plot.mark_text(align="left", dy=-20, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="title:N"),
        ]
        if kept:
            layers.insert(2, plot.mark_tick(thickness=3, size=18, color=VERDICT["FAIL"]).encode(y=y, x=x("margin")))
        if width >= 400:
            word = plot.mark_text(align="right", dy=-20, fontSize=TEXT - 1, fontWeight=600)
            layers.append(word.encode(y=y, x=alt.value(width), text="verdict:N", color=colour))
        return alt.layer(*layers).properties(width=width, height=58 * len(rows))

    return draw


SIGNED = "(datum.value > 0 ? '+' : '') + replace(datum.label, '-', '\u2212')"


def cost_and_quality(report: Report, accent: str) -> Callable[[int], Any] | None:
    """Points: right answers against the price of 1,000 answers (its interval as a line), the area standing for memory.

    Where no arm has a price, against the seconds of 1,000 answers.
    """
    arms = [arm for arm in report.arms if arm.arm != "trivial" and (arm.arm != "qlora" or arm.shipped)]
    priced = bool(arms) and all(arm.energy and arm.energy.per_1000_answers.money for arm in arms)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        share, price = desk_share(arm), _price(arm, priced)
        if share is not None and price is not None:
            text, colour = f"{SHORT.get(arm.arm, arm.arm)}, {wording.size(arm.peak_rss_bytes)}", accent if arm.shipped else GREY
            row = {"price": price[0], "low": price[1], "high": price[2], "share": share}
            rows.append({**row, "bytes": arm.peak_rss_bytes or 0, "text": text, "colour": colour})
    if not rows:
        return None
    currency = next((arm.energy.currency for arm in arms if arm.energy), "")
    title = f"{currency} for 1,000 answers" if priced else "seconds for 1,000 answers"
    floor = next((desk_share(arm) for arm in report.arms if arm.arm == "trivial"), None)
    top = 1.05 * max(row["high"] for row in rows)

    def draw(width: int) -> Any:
        small = width < 400
        plot = alt.Chart(alt.Data(values=rows))
        x = alt.X("price:Q", scale=alt.Scale(domain=[0, top], nice=False),
                  axis=alt.Axis(title=title, tickCount=3, grid=False, format="~g", titlePadding=6))  # fmt: skip
        ticks = alt.Axis(title=None, format="%", values=[0, 0.2, 0.4, 0.6, 0.8, 1], domain=False, ticks=False)
        y = alt.Y("share:Q", scale=alt.Scale(domain=[-0.12, 1.08], nice=False), axis=ticks)
        colour = alt.Color("colour:N", scale=None)
        low = alt.X("low:Q", scale=alt.Scale(domain=[0, top], nice=False), axis=x["axis"])
        area = alt.Size("bytes:Q", scale=alt.Scale(domain=[0, max(row["bytes"] for row in rows) or 1], range=[0, 700]), legend=None)
        layers = [
            plot.mark_rule(strokeWidth=1.5, opacity=0.8).encode(x=low, x2="high:Q", y=y, color=colour),
            plot.mark_circle(opacity=0.95).encode(x=x, y=y, size=area, color=colour),
        ]
        if floor is not None:
            line = alt.Chart(alt.Data(values=[{"share": floor, "text": "one constant answer"}]))
            layers.append(line.mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y=y))
            word = line.mark_text(align="left", dy=-8, dx=4, fontSize=TEXT - 1, color=MUTED)
            layers.append(word.encode(y=y, x=alt.value(0), text="text:N"))
        for index, row in enumerate(rows):
            label = alt.Chart(alt.Data(values=[row]))
            above = index % 2 == 0
            align: Any = "right" if row["price"] > 0.75 * top else "center"
            shift = 14 if align == "right" else 0
            text = label.mark_text(fontSize=TEXT, color=INK, dy=-23 if above else 24, align=align, dx=shift)
            layers.append(text.encode(x=x, y=y, text="text:N"))
        return alt.layer(*layers).properties(width=width - 46, height=280 if small else 320)

    return draw


SHORT = {"base-16bit": "original 16 bit", "base-nf4": "original 4 bit", "qlora": "tuned 4 bit"}


def desk_share(arm: ArmResult) -> float | None:
    """Share of right answers on the study's own task: as written, or as chosen where nothing was written."""
    task = arm.tasks.get("desk")
    if task is None:
        return None
    return task.accuracy_likelihood if task.accuracy_generated is None else task.accuracy_generated


def _price(arm: ArmResult, priced: bool) -> tuple[float, float, float] | None:
    if priced and arm.energy and arm.energy.per_1000_answers.money:
        money = arm.energy.per_1000_answers.money
        return money.value, money.low, money.high
    answer = arm.latency.answer_ms if arm.latency else None
    return None if answer is None or answer.p50 is None else (answer.p50, answer.p50, answer.p95 or answer.p50)


def losses(runs: list[TrainingRun], accent: str) -> Callable[[int], Any] | None:
    """Loss against tokens read: thin lines for training, dots for validation, the label prior as a dashed line. Log scale."""
    thin: list[dict[str, Any]] = []
    dots: list[dict[str, Any]] = []
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
    known = [row["loss"] for row in thin + dots] + ([prior] if prior else [])
    low, high = min(known) / 1.2, 1.2 * max(known)
    ticks = [t for t in (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10) if low <= t <= high]

    def draw(width: int) -> Any:
        small = width < 400
        x = alt.X("tokens:Q", axis=alt.Axis(title="tokens of training text read", grid=False, tickCount=4, format=",d", titlePadding=6))
        y = alt.Y("loss:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False, clamp=True),
                  axis=alt.Axis(title=None, values=ticks, format="~g", domain=False, ticks=False))  # fmt: skip
        colour = alt.Color("colour:N", scale=None)
        lines = alt.Chart(alt.Data(values=thin)).mark_line(strokeWidth=1.2, opacity=0.55).encode(x=x, y=y, detail="who:N", color=colour)
        valid = alt.Chart(alt.Data(values=dots))
        path = valid.mark_line(strokeWidth=2.4).encode(x=x, y=y, detail="who:N", color=colour)
        points = valid.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour)
        layers = [lines, path, points]
        if prior is not None:
            rule = alt.Chart(alt.Data(values=[{"loss": prior, "word": "knowing only the mix of answers"}]))
            word = rule.mark_text(align="right", dy=-8, fontSize=TEXT - 1, color=MUTED)
            layers += [rule.mark_rule(color=MUTED, strokeDash=[4, 3]).encode(y=y), word.encode(y=y, x=alt.value(width - 46), text="word:N")]
        return alt.layer(*layers).properties(width=width - 46, height=230 if small else 260)

    return draw


def prediction_ratio(rows: list[Prediction]) -> Callable[[int], Any] | None:
    """Dots: measured over predicted, on a scale where half and double are equally far; the line is a perfect prediction."""
    known: list[dict[str, Any]] = [
        {"what": row.what, "ratio": 1 + row.error, "text": ratio_text(row.error)}
        for row in rows
        if row.error is not None and row.error > -1
    ]
    if not known:
        return None
    far = 1.15 * max(2.0, *(max(row["ratio"], 1 / row["ratio"]) for row in known))

    for row in known:
        row |= {"start": 1 / far, "end": far, "one": 1}
    marks = [
        t
        for t in ((0.5, 1, 2) if far < 3 else (0.1, 0.25, 0.5, 1, 2, 4, 10) if far < 20 else (0.01, 0.1, 1, 10, 100))
        if 1 / far <= t <= far
    ]

    def draw(width: int) -> Any:
        y = alt.Y("what:N", sort=[row["what"] for row in known], axis=None)
        times = "datum.value + '\u00d7'"
        axis = alt.Axis(title="measured / predicted", values=marks, labelExpr=times, grid=False, domain=False, ticks=False)

        def x(field: str) -> alt.X:
            return alt.X(f"{field}:Q", scale=alt.Scale(type="log", domain=[1 / far, far], nice=False), axis=axis)

        plot = alt.Chart(alt.Data(values=known))
        layers = [
            plot.mark_rule(color=LINE, strokeWidth=1).encode(y=y, x=x("start"), x2="end:Q"),
            plot.mark_rule(strokeWidth=5, opacity=0.4, color=ACCENT, strokeCap="round").encode(y=y, x=x("ratio"), x2="one:Q"),
            plot.mark_tick(thickness=1.5, size=14, color=INK).encode(y=y, x=x("one")),
            plot.mark_point(filled=True, size=90, color=ACCENT, opacity=1).encode(y=y, x=x("ratio")),
            plot.mark_text(align="left", dy=-16, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(0), text="what:N"),
            plot.mark_text(align="right", dy=-16, fontSize=TEXT, color=INK).encode(y=y, x=alt.value(width), text="text:N"),
        ]
        return alt.layer(*layers).properties(width=width, height=46 * len(known))

    return draw


def ratio_text(error: float | None) -> str:
    """The error of a prediction in words: measured 12% above, 8% below."""
    if error is None:
        return wording.NONE
    if error > 1:
        return f"{wording.digits(1 + error, 2)} times as much"
    share = round(100 * abs(error))
    return "as predicted" if share == 0 else f"{share}% {'above' if error > 0 else 'below'}"


def shipped_arm(arms: list[ArmResult]) -> ArmResult | None:
    """The arm that the gates judged, where it was measured."""
    return next((arm for arm in arms if arm.shipped), None)
