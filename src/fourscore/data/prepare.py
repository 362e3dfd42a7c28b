"""From a study's data section to a folder of rows: read, map, size, split, clean, draw, write, and count all of it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourscore.data import licences
from fourscore.data.check import Check
from fourscore.data.duplicates import near_duplicates, normalise, repeats
from fourscore.data.lengths import OverLong, Sized, chat, size_rows
from fourscore.data.mapping import Example, map_rows, name_rows
from fourscore.data.rows import PARTS, Part, Row, write_rows
from fourscore.data.sources import Table, read_source
from fourscore.data.splits import divide, draw, draw_balanced, order_key
from fourscore.data.template import control_text, render_row
from fourscore.files import FourscoreError, write_json
from fourscore.spec import Data

NEAR_LIMIT = 50_000  # rows; beyond it the search for near duplicates would take minutes
FEW_CLUSTERS = 20  # below it cluster-robust intervals become wide and rough
LABELS_SHOWN = 20  # free text with more different answers than this has no label table
EXAMPLES = 3


def prepare(data: Data, tokenizer: Any, out: Path) -> Check:
    """Read the data and write `train.jsonl`, `validation.jsonl`, `evaluation.jsonl` and `check.json` into the folder `out`.

    `tokenizer`: the model's, with its chat template. The same study, source and tokenizer give the same bytes everywhere.
    FourscoreError for everything that would otherwise be cut, dropped or ignored in silence; `out` is not made atomic here.
    """
    obligations = licences.obligations(data.licence)
    table = read_source(data.source, data.sha256)
    examples, other = map_rows(table, data)
    sized, over = size_rows(examples, data, tokenizer)
    parts = divide([_first_label(s.example) for s in sized], data.split)
    removed = _remove_shared(parts, sized)
    repeated = repeats([_prompt(sized[i].example) + "\0" + normalise(sized[i].example.answer) for i in parts["train"]])
    if data.duplicates == "drop":
        gone = {parts["train"][position] for position in repeated}
        parts["train"] = [i for i in parts["train"] if i not in gone]
        removed["duplicates"] = len(gone)
    drawn = _draw(parts, sized, data)
    for part in PARTS:
        if not drawn[part]:
            raise FourscoreError(
                f"no row is left for {part}: all stand in another part with the same prompt",
                where=table.source,
                todo="use a prompt that tells the rows apart",
            )
    written = {part: [sized[i] for i in drawn[part]] for part in PARTS}
    near, near_shared = _near(written)
    choices = list(data.choices)
    labels: dict[str, dict[str, int]] = {part: _label_counts([s.example.answer for s in written[part]], choices) for part in PARTS}
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        write_rows(out, part, (_row(s.example, choices) for s in written[part]))
    second = _second_group(written, data)
    check = Check(
        source=table.source,
        sha256=table.sha256,
        licence=data.licence,
        licence_obligations=obligations,
        rows_read=len(table.rows),
        rows_other=other,
        kept=len(sized),
        over_long={
            "count": len(over.numbers),
            "action": data.over_long,
            "longest_tokens": over.longest_tokens,
            "rows": over.numbers[:5],
        },
        no_trainable_token=[],
        duplicates_exact=len(repeated),
        duplicates_near=near,
        shared_train_evaluation_exact=removed["train_shared_with_evaluation"],
        shared_train_evaluation_near=near_shared,
        removed=removed,
        not_drawn={part: len(parts[part]) - len(drawn[part]) for part in PARTS},
        groups={part: len({_first_label(s.example) for s in written[part]}) for part in PARTS},
        second_group=second,
        rows={part: len(written[part]) for part in PARTS},
        tokens=_tokens(written),
        labels=labels,
        trivial_answer=trivial_answer((s.example.answer for s in written["train"]), choices),
        examples=[_pieces(s.example, tokenizer) for s in _examples(written["train"], data.split.seed)],
        warnings=_warnings(data, table, examples, over, written, near_shared, second, tokenizer),
    )
    write_json(out / "check.json", check.to_json())
    return check


def cluster_of(example: Example) -> list[str]:
    """The labels that say which rows belong together: the study's groups, or the question itself, so that a question asked
    twice never stands on two sides nor counts as two independent items.
    """
    return list(example.group) or [hashlib.sha256(_prompt(example).encode()).hexdigest()[:16]]


def _first_label(example: Example) -> str:
    return cluster_of(example)[0]


def _prompt(example: Example) -> str:
    """What two rows share when they ask the same."""
    return normalise(example.system or "") + "\n" + normalise(example.user)


def _remove_shared(parts: dict[Part, list[int]], sized: Sequence[Sized]) -> dict[str, int]:
    """Take out of training what stands in a held-out or validation row, and out of validation what is held out; in place.

    All held-out rows count, drawn or not, so that `evaluation_items` does not change what is trained on.
    """
    prompts = {part: {_prompt(sized[i].example) for i in parts[part]} for part in PARTS}

    def remove(part: Part, other: Part) -> int:
        before = len(parts[part])
        parts[part] = [i for i in parts[part] if _prompt(sized[i].example) not in prompts[other]]
        return before - len(parts[part])

    return {
        "train_shared_with_evaluation": remove("train", "evaluation"),
        "train_shared_with_validation": remove("train", "validation"),
        "validation_shared_with_evaluation": remove("validation", "evaluation"),
        "duplicates": 0,
    }


def _draw(parts: dict[Part, list[int]], sized: Sequence[Sized], data: Data) -> dict[Part, list[int]]:
    ids = [s.example.id for s in sized]
    labels = [_first_label(s.example) for s in sized]
    seed = data.split.seed
    return {
        "train": draw(parts["train"], ids, data.train_rows, seed, "train"),
        "validation": draw_balanced(parts["validation"], ids, labels, data.validation_rows, seed, "validation"),
        "evaluation": draw_balanced(parts["evaluation"], ids, labels, data.evaluation_items, seed, "evaluation"),
    }


def _row(example: Example, choices: list[str]) -> Row:
    return Row(example.id, example.number, cluster_of(example), chat(example), example.answer, choices)


def _near(written: dict[Part, list[Sized]]) -> tuple[int | None, int | None]:
    if len(written["train"]) + len(written["evaluation"]) > NEAR_LIMIT:
        return None, None
    return near_duplicates(*([normalise(s.example.user) for s in written[part]] for part in ("train", "evaluation")))


def _second_group(written: dict[Part, list[Sized]], data: Data) -> dict[str, Any] | None:
    """With two crossed columns the first decides the side; how far the second stands on both is said here."""
    if len(data.group) < 2:
        return None
    values = {part: {s.example.group[1] for s in written[part]} for part in PARTS}
    shared = len(values["evaluation"] & values["train"])
    return {"column": data.group[1], "evaluation_values": len(values["evaluation"]), "shared_with_train": shared}


def _label_counts(answers: list[str], choices: list[str]) -> dict[str, int]:
    counts = Counter(answers)
    if choices:
        return {choice: counts[choice] for choice in choices}
    return dict(sorted(counts.items(), key=lambda c: (-c[1], c[0]))) if len(counts) <= LABELS_SHOWN else {}


def trivial_answer(answers: Iterable[str], choices: Sequence[str]) -> str:
    """The most frequent answer; of equally frequent ones the first in `choices`, else the first in the alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda a: (-counts[a], choices.index(a) if choices else 0, a))


def _tokens(written: dict[Part, list[Sized]]) -> dict[str, Any]:
    lengths = np.array([s.tokens for s in written["train"]])
    longest = max((s for part in PARTS for s in written[part]), key=lambda s: (s.tokens, -s.example.number))
    p50, p95 = (int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 95))
    return {
        "train": int(lengths.sum()),
        "supervised": sum(s.trained for s in written["train"]),
        "longest_row": [longest.example.number, longest.tokens],
        "p50": p50,
        "p95": p95,
    }


def _examples(train: list[Sized], seed: int) -> list[Sized]:
    """Three training rows, of different answers where there are such."""
    order = sorted(train, key=lambda s: order_key(seed, "example", s.example.id))
    by_answer = list({s.example.answer: s for s in reversed(order)}.values())[::-1]
    return (by_answer + [s for s in order if s not in by_answer])[:EXAMPLES]


def _pieces(example: Example, tokenizer: Any) -> dict[str, Any]:
    row = render_row(tokenizer, chat(example), example.answer)
    halves = ((row.ids[: row.prompt_length], False), (row.ids[row.prompt_length :], True))
    return {"number": example.number, "pieces": [{"text": tokenizer.decode(ids), "trained": trained} for ids, trained in halves]}


def _warnings(
    data: Data,
    table: Table,
    examples: list[Example],
    over: OverLong,
    written: dict[Part, list[Sized]],
    near_shared: int | None,
    second: dict[str, Any] | None,
    tokenizer: Any,
) -> list[str]:
    warnings = []
    if data.licence is None:
        warnings.append("licence unknown: find it out and write it in `data.licence`, or you may be passing on what you may not")
    if not table.pinned and data.source.startswith("hub:"):
        warnings.append(f"the source is not pinned: write `sha256: {table.sha256}` under `data`, and a changed file will be noticed")
    if over.numbers:
        done = "cut to fit" if data.over_long == "cut" else "dropped"
        warnings.append(f"{name_rows(over.numbers)} with more than {data.max_tokens} tokens {done}")
    for place, column in enumerate(data.group or [None]):
        labels = {cluster_of(s.example)[place] for s in written["evaluation"]}
        if len(labels) < FEW_CLUSTERS:
            what = f"only {len(labels)} values of `{column}`" if column else f"only {len(labels)} different questions"
            warnings.append(f"{what} are held out: under {FEW_CLUSTERS} clusters an interval is wide and rough")
    if second and second["shared_with_train"]:
        warnings.append(
            f"{second['shared_with_train']} of the {second['evaluation_values']} held-out values of `{second['column']}` also occur in "
            "training rows: the verdict is about new values of "
            f"`{data.group[0]}`, not of `{second['column']}`"
        )
    asked_again = len(repeats([_prompt(s.example) for s in written["evaluation"]]))
    if asked_again:
        warnings.append(
            f"{asked_again:,} held-out rows ask what an earlier one asks" + ("" if data.group else "; they count as one cluster")
        )
    for part in PARTS:
        answers = {s.example.answer for s in written[part]}
        missing = [c for c in data.choices if c not in answers]
        if missing:
            warnings.append(f"no {part} row has the answer {', '.join(missing)}")
    warnings += _conflicts(written["train"])
    marked = [e.number for e in examples if any(control_text(tokenizer, t) for t in (e.system or "", e.user, e.answer))]
    if marked:
        warnings.append(f"{name_rows(marked)} contain a control token of the model as text; it is encoded as plain text")
    if near_shared is None:
        warnings.append(f"near duplicates were not counted: over {NEAR_LIMIT:,} rows")
    elif near_shared:
        warnings.append(f"{near_shared:,} held-out rows are near duplicates of training rows: group by what they share")
    return warnings


def _conflicts(train: list[Sized]) -> list[str]:
    answers: dict[str, set[str]] = defaultdict(set)
    numbers: dict[str, int] = {}
    for s in train:
        answers[_prompt(s.example)].add(s.example.answer)
        numbers.setdefault(_prompt(s.example), s.example.number)
    split = sorted(numbers[prompt] for prompt, said in answers.items() if len(said) > 1)
    return [f"{len(split):,} training prompts stand with different answers (first at row {split[0]})"] if split else []
