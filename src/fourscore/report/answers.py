"""Answers side by side: the same items before (base-16bit) and after (the adapter that ships), the worst changes first."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal, get_args

from fourscore.report.schema import AnswerPair, Answers, AnswerShare, Reply

SHOWN = 10
WORSE_AT_MOST = 6  # of ten: room stays for what is still wrong and what got better
STILL_WRONG_AT_MOST = 2

Change = Literal["got worse", "still wrong", "got better", "still right"]


def compare_answers(before: list[dict[str, Any]], after: list[dict[str, Any]], questions: dict[str, str]) -> Answers | None:
    """Ten pairs out of two item logs of the same task, and the counts of every change.

    Judged by the written answer where both logs have one, else by the most likely permitted answer. Within a change the
    items whose right answer lost most (gained least) likelihood come first; ties by id, so the choice is reproducible.
    """
    old = {item["id"]: item for item in before}
    shared = [(old[item["id"]], item) for item in after if item["id"] in old]
    if not shared:
        return None
    written = all(item.get("generated_correct") is not None for pair in shared for item in pair)
    pairs = [_pair(a, b, questions.get(b["id"]), written) for a, b in shared]
    counts: dict[str, int] = dict.fromkeys(get_args(Change), 0)
    for pair in pairs:
        counts[pair.change] += 1
    return Answers(score="generated" if written else "likelihood", counts=counts, pairs=_choose(pairs))


def share_by_answer(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[AnswerShare]:
    """For each permitted answer: how many items want it, how often each model said it, how often rightly.

    A shift towards one favourite answer can look like a gain; here it shows.
    """
    old = {item["id"]: item for item in before}
    shared = [(old[item["id"]], item) for item in after if item["id"] in old]
    choices = list(dict.fromkeys(c for _, item in shared for c in item.get("choices", [])))
    gold = Counter(b["gold"] for _, b in shared)
    said = [Counter(pair[side]["pred"] for pair in shared) for side in (0, 1)]
    right = [Counter(pair[side]["gold"] for pair in shared if pair[side]["correct"]) for side in (0, 1)]
    return [
        AnswerShare(
            answer=choice,
            items=gold[choice],
            before_said=said[0][choice],
            before_right=right[0][choice],
            after_said=said[1][choice],
            after_right=right[1][choice],
        )
        for choice in choices
    ]


def _pair(before: dict[str, Any], after: dict[str, Any], question: str | None, written: bool) -> AnswerPair:
    a, b = _reply(before, written), _reply(after, written)
    change: Change = ("still right" if b.correct else "got worse") if a.correct else ("got better" if b.correct else "still wrong")
    return AnswerPair(id=after["id"], question=question, gold=after["gold"], before=a, after=b, change=change)


def _reply(item: dict[str, Any], written: bool) -> Reply:
    return Reply(
        text=item["generated"] if written and item.get("generated") is not None else item["pred"],
        correct=bool(item["generated_correct"] if written else item["correct"]),
        chance=_chance(item),
    )


def _chance(item: dict[str, Any]) -> float | None:
    """The right answer's share of likelihood among the permitted answers."""
    logs, choices = item.get("loglik") or [], item.get("choices") or []
    if item["gold"] not in choices or len(logs) != len(choices):
        return None
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    return round(weights[choices.index(item["gold"])] / sum(weights), 6)


def _choose(pairs: list[AnswerPair]) -> list[AnswerPair]:
    order: dict[str, list[AnswerPair]] = {change: [] for change in get_args(Change)}
    for pair in sorted(pairs, key=lambda p: ((p.after.chance or 0.0) - (p.before.chance or 0.0), p.id)):
        order[pair.change].append(pair)
    take = {"got worse": min(len(order["got worse"]), WORSE_AT_MOST), "still wrong": min(len(order["still wrong"]), STILL_WRONG_AT_MOST)}
    take["got better"] = min(len(order["got better"]), SHOWN - sum(take.values()))
    for change in ("got worse", "still wrong", "still right"):  # fill what is left, the bad news first
        take[change] = min(len(order[change]), SHOWN - sum(n for c, n in take.items() if c != change))
    order["got better"].reverse()  # the largest gains first
    return [pair for change in ("got worse", "still wrong", "got better", "still right") for pair in order[change][: take[change]]]
