"""One line of an item log: what one arm answered to one question, and what a list of them adds up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourscore.data.rows import Row
from fourscore.evaluate.answers import Match, match_answer, match_text
from fourscore.files import FourscoreError

Item = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A row in tokens: the prompt, and the ids that continue it for each choice (for the gold answer alone, in free text).

    lengths: what each choice's log-likelihood is divided by before comparing; None compares them as they are.
    """

    task: str
    row: Row
    prompt: list[int]
    prompt_hash: str
    continuations: list[list[int]]
    gold: int
    lengths: list[int] | None

    @property
    def gold_ids(self) -> list[int]:
        """The gold answer's tokens."""
        return self.continuations[self.gold]


def answered(question: Question, loglik: Sequence[float], generated: str | None, finished: bool | None = None) -> Item:
    """The item of one question. loglik: natural log-likelihood of each continuation; generated: the text written, if asked for;
    finished: whether it came to its own end.

    The prediction is the choice with the highest log-likelihood (per `lengths`); of equals the first, and `tie` says so.
    """
    row = question.row
    logliks = [float(value) for value in loglik]
    if not all(map(math.isfinite, logliks)):
        raise FourscoreError(
            f"the model's likelihood of an answer is not a number ({logliks})",
            where=f"{question.task}, row {row.number}",
            todo="the weights or the adapter are broken: check the training log, or fetch the model again",
        )
    pred, tie = best_choice(row.choices, logliks, question.lengths)
    item = _item(question.task, row, question.prompt_hash)
    item |= {
        "loglik": logliks if row.choices else [],
        "pred": pred,
        "correct": None if pred is None else pred == row.answer,
        "tie": tie,
        "answer_nll": -logliks[question.gold],
        "answer_tokens": len(question.gold_ids),
    }
    if question.lengths is not None:
        item["lengths"] = question.lengths
    return item | written(row, generated, finished)


def best_choice(choices: list[str], loglik: Sequence[float], lengths: Sequence[int] | None) -> tuple[str | None, bool]:
    """The likeliest choice and whether another one equals it; (None, False) in free text."""
    if not choices:
        return None, False
    scores = [value / length for value, length in zip(loglik, lengths or [1] * len(choices), strict=True)]
    top = max(scores)
    return choices[scores.index(top)], scores.count(top) > 1


def constant(task: str, row: Row, prompt_hash: str, answer: str, answer_tokens: int) -> Item:
    """The item of an arm that always says `answer`."""
    item = _item(task, row, prompt_hash)
    item |= {
        "loglik": [],
        "pred": answer if row.choices else None,
        "correct": answer == row.answer if row.choices else None,
        "tie": False,
        "answer_nll": None,
        "answer_tokens": answer_tokens,
    }
    return item | written(row, answer, True)


def written(row: Row, text: str | None, finished: bool | None) -> Item:
    """The fields about the generated text; all null where none was asked for."""
    if text is None:
        return {"generated": None, "generated_answer": None, "generated_correct": None, "matched_by": None, "finished": None}
    match: Match = match_answer(text, row.choices) if row.choices else match_text(text, row.answer)
    correct = match.rule in ("exact", "named") and match.answer == row.answer
    return {
        "generated": text,
        "generated_answer": match.answer,
        "generated_correct": correct,
        "matched_by": match.rule,
        "finished": finished,
    }


def _item(task: str, row: Row, prompt_hash: str) -> Item:
    return {"task": task, "id": row.id, "prompt_hash": prompt_hash, "cluster": row.cluster, "gold": row.answer, "choices": row.choices}


def summary(items: Sequence[Item]) -> dict[str, Any]:
    """What one task's items add up to; a score that no item has is null.

    accuracy_*: shares in [0, 1]. chance: what guessing among the choices would score. perplexity_answer: exp of the mean nats
    per gold answer token, over all tokens of all items. clusters: distinct labels of each way. matched_by: how the written
    answers were read. unfinished: written answers that max_new_tokens cut. ties: predictions that another choice equalled.
    """
    nll = [item for item in items if item["answer_nll"] is not None]
    tokens = sum(item["answer_tokens"] for item in nll)
    ways = max((len(item["cluster"]) for item in items), default=0)
    return {
        "items": len(items),
        "clusters": [len({item["cluster"][way] for item in items}) for way in range(ways)],
        "accuracy_likelihood": _share(items, "correct"),
        "accuracy_generated": _share(items, "generated_correct"),
        "chance": sum(1 / len(item["choices"]) for item in items) / len(items) if items and all(i["choices"] for i in items) else None,
        "perplexity_answer": _exp(sum(i["answer_nll"] for i in nll) / tokens) if tokens else None,
        "unfinished": sum(item["finished"] is False for item in items) if any(i["finished"] is not None for i in items) else None,
        "ties": sum(bool(item["tie"]) for item in items),
        "matched_by": dict(sorted(Counter(i["matched_by"] for i in items if i["matched_by"] is not None).items())) or None,
        "predictions": dict(Counter(item["pred"] for item in items if item["pred"] is not None).most_common()) if _shared(items) else None,
    }


def _share(items: Sequence[Item], field: str) -> float | None:
    values = [item[field] for item in items if item[field] is not None]
    return sum(values) / len(values) if values else None


def _shared(items: Sequence[Item]) -> bool:
    """Whether all items have the same choices, so that counting predictions says something."""
    return bool(items) and bool(items[0]["choices"]) and all(item["choices"] == items[0]["choices"] for item in items)


def _exp(value: float) -> float | None:
    """exp, or None where it is too large for a number: JSON has no infinity."""
    return math.exp(value) if value < 700 else None
