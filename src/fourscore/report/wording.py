"""Numbers with sensible digits and units, and plain words for arms, tasks and gates. Pure functions of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

TASKS = {
    "desk": ("your own task", "held-out items of the study's own data"),
    "piqa": ("PIQA", "everyday physical sense: which of two ways works"),
    "commonsense_qa": ("CommonsenseQA", "general common sense: one of five answers"),
}
SCORES = {
    "likelihood": ("choosing", "which of the permitted answers the model finds likeliest"),
    "generated": ("writing", "the answer that the model writes by itself"),
}
MINUS = "\N{MINUS SIGN}"
NONE = "\N{EM DASH}"


def digits(value: float | None, significant: int = 3) -> str:
    """A number with so many significant digits, thousands separated, never in powers of ten."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    places = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    text = f"{abs(value):,.{min(places, 12)}f}"
    return (MINUS if value < 0 else "") + text


def percent(share: float | None, places: int = 1) -> str:
    """0.923 -> 92.3%."""
    return NONE if share is None else f"{100 * share:.{places}f}%".replace("-", MINUS)


def points(share: float | None, sign: bool = True) -> str:
    """A difference of two shares in percentage points: 0.797 -> +79.7."""
    if share is None:
        return NONE
    value = round(100 * share, 1) + 0.0
    return f"{value:+.1f}".replace("-", MINUS) if sign else f"{abs(value):.1f}"


def allowance(margin: float | None) -> str:
    """A margin as it was written: 0.05 -> 5 points."""
    return NONE if margin is None else f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def span(low: float | None, high: float | None) -> str:
    """An interval of a difference in points, or a dash."""
    return NONE if low is None or high is None else f"{points(low)} to {points(high)}".replace(" to ", "\N{NO-BREAK SPACE}to ")


def size(count: float | None) -> str:
    """Bytes as MB or GB (decimal, as disks are sold)."""
    if count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{digits(count)} bytes"


def seconds(value: float | None) -> str:
    """A length of time: 4.2 ms, 8.1 s, 7 min 05 s, 2 h 10 min."""
    if value is None:
        return NONE
    if value < 1:
        return f"{digits(value * 1000)} ms" if value else "0 s"
    if value < 60:
        return f"{digits(value, 2 if value < 10 else 3)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def milliseconds(value: float | None) -> str:
    """Milliseconds, as seconds from one on."""
    return NONE if value is None else seconds(value / 1000)


def energy(kwh: float | None) -> str:
    """Electricity in Wh, or kWh from one on."""
    if kwh is None:
        return NONE
    return f"{digits(kwh, 2)} kWh" if kwh >= 1 else f"{digits(kwh * 1000, 2)} Wh"


def carbon(kg: float | None) -> str:
    """CO2 equivalent in grams, or kilograms from one on."""
    if kg is None:
        return NONE
    return f"{digits(kg, 2)} kg" if kg >= 1 else f"{digits(kg * 1000, 2)} g"


def money(amount: float | None, currency: str) -> str:
    """An amount with its currency, two digits that count."""
    if amount is None:
        return NONE
    return f"{digits(amount, 2) if amount < 10 else f'{amount:,.2f}'} {currency}".strip()


def ranged(estimate: Any, show: Callable[[float], str]) -> str:
    """`value (low to high)` of an estimate (attributes value, low, high), each through `show`."""
    return NONE if estimate is None else f"{show(estimate.value)} ({between(estimate, show)})"


def between(estimate: Any, show: Callable[[float], str]) -> str:
    """`low to high` of an estimate, the unit said once where both have the same."""
    low, high = show(estimate.low), show(estimate.high)
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(' ' + unit) else low} to {high}"


def loss(value: float | None) -> str:
    """A loss in nats, three decimals."""
    return NONE if value is None else f"{value:.3f}"


def arm_name(arm: str, trivial: str | None = None) -> str:
    """An arm in plain words."""
    names = {
        "trivial": f"Always \N{LEFT DOUBLE QUOTATION MARK}{trivial}\N{RIGHT DOUBLE QUOTATION MARK}" if trivial else "One constant answer",
        "base-16bit": "Original model, 16 bit",
        "base-nf4": "Original model, 4 bit",
        "qlora": "Tuned model, 4 bit",
    }
    return names.get(arm, arm)


def task_name(task: str) -> str:
    """A task in plain words."""
    return TASKS[task][0] if task in TASKS else task


def gate_title(kind: str, task: str, score: str, over: str, margin: float | None, trivial: str | None) -> str:
    """What a gate asks, as a short line."""
    how = SCORES.get(score, (score, ""))[0]
    if kind == "superiority":
        return f"Better than {_other(over, trivial)} ({how})"
    return f"{task_name(task)} kept, to within {allowance(margin)}"


def gate_reading(gate: dict[str, Any]) -> str:
    """One gate in two sentences for someone who never saw an interval."""
    gain, low, high = gate["difference"], gate.get("low"), gate.get("high")
    size_of = (
        f"Measured {points(gain, sign=False)} points {'better' if gain > 0 else 'worse'}"
        if abs(gain) >= 0.0005
        else "Measured no difference"
    )
    needed = gate.get("items_needed")
    more = f" About {needed:,} items would have decided it." if needed else ""
    if gate["kind"] == "superiority":
        if gate["verdict"] == "PASS":
            tail = (
                f" Even at the cautious end it is {points(low, sign=False)} points better, so chance does not explain it."
                if low is not None
                else ""
            )
            return f"{size_of}.{tail}"
        if gate["verdict"] == "FAIL":
            return f"{size_of}. Even at the hopeful end of its interval it is not better."
        return f"{size_of}, but the true difference may be nothing, or the other way round (interval {span(low, high)}).{more}"
    allowed = f"{allowance(gate.get('margin'))} that the study allowed before the run"
    if gate["verdict"] == "PASS":
        if low is not None and low >= 0:
            return f"{size_of}. Even at the cautious end nothing was lost."
        tail = f" At the cautious end {points(low, sign=False)} points were lost, less than the {allowed}." if low is not None else ""
        return f"{size_of}.{tail}"
    if gate["verdict"] == "FAIL":
        best = f" at least {points(high, sign=False)} points were lost" if high is not None else " too much was lost"
        return f"{size_of}. Even at the hopeful end{best}, more than the {allowed}."
    return f"{size_of}, but the loss may be larger than the {allowed} (interval {span(low, high)}).{more}"


def out_of_hundred(share: float) -> str:
    """0.923 -> 92 of 100."""
    return f"{round(100 * share)} of 100"


def headline(verdict: str, gates: list[dict[str, Any]], trivial: str | None) -> tuple[str, str]:
    """The verdict for someone who has a shop to run, and what to do next."""
    ours = [g for g in gates if g["kind"] == "superiority"]
    over_base = next((g for g in ours if g["over"].startswith("base")), ours[0] if ours else None)
    facts = ""
    if over_base is not None:
        other = "always giving the same answer gets" if over_base["over"] == "trivial" else "the original model got"
        facts = f"the tuned model gets {out_of_hundred(over_base['mean_arm'])} right where {other} {out_of_hundred(over_base['mean_over'])}"
    kept = [g for g in gates if g["kind"] == "non-inferiority"]
    failed = [g for g in gates if g["verdict"] == "FAIL"]
    open_ = [g for g in gates if g["verdict"] == "INCONCLUSIVE"]
    if verdict == "PASS":
        keep = ", and it kept the skills that were checked" if kept else ""
        return (
            f"Yes, use it: {facts}{keep}." if facts else "Yes, use it: every check passed.",
            "Ship the adapter in this folder on the 4-bit base. Read ten of its answers below first, and look at what was not measured.",
        )
    if verdict == "FAIL":
        what = _list([_failing(g, trivial) for g in failed]) or "a check failed"
        lead = f"No, do not use it: {what}." if not facts else f"No, do not use it: {facts}, but {what}."
        if failed and all(g["kind"] == "non-inferiority" for g in failed):
            todo = "Train more gently (a lower learning rate, fewer epochs) or mix in general examples, then run the study again."
        else:
            todo = "Keep what you use today. Read the answers that got worse below, add or mend training examples, and run the study again."
        return lead, todo
    needed = [g["items_needed"] for g in open_ if g.get("items_needed")]
    items = max((g["items"] for g in open_), default=0)
    todo = (
        f"Hold out more items and run again: about {max(needed):,} instead of {items:,} would have decided it, "
        "if the difference is what it seems."
        if needed
        else "Hold out more items, or train on more examples, and run the study again. Until then keep what you use today."
    )
    what = _list([_open(g, trivial) for g in open_])
    return (f"Not proven yet: {facts}, but {what}." if facts and what else f"Not proven yet: {what or 'the items were too few'}."), todo


def _failing(gate: dict[str, Any], trivial: str | None) -> str:
    if gate["kind"] == "non-inferiority":
        return f"it lost too much of {task_name(gate['task'])}"
    how = SCORES.get(gate["score"], (gate["score"],))[0]
    return f"it is not better than {_other(gate['over'], trivial)} at {how}"


def _open(gate: dict[str, Any], trivial: str | None) -> str:
    if gate["kind"] == "non-inferiority":
        return f"it may have lost too much of {task_name(gate['task'])}"
    how = SCORES.get(gate["score"], (gate["score"],))[0]
    return f"chance could explain its lead over {_other(gate['over'], trivial)} at {how}"


def _other(over: str, trivial: str | None) -> str:
    if over == "trivial":
        return f"always answering \u201c{trivial}\u201d" if trivial else "a constant answer"
    return {"base-16bit": "the original model", "base-nf4": "the original model in 4 bit"}.get(over, over)


def _list(parts: list[str]) -> str:
    seen = list(dict.fromkeys(parts))
    return seen[0] if len(seen) == 1 else ", ".join(seen[:-1]) + " and " + seen[-1] if seen else ""
