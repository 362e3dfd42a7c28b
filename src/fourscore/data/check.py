"""What `fourscore check` says about the data: counts, labels, examples with the mask visible, licence, warnings."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

TRAINED_OPEN, TRAINED_CLOSE = "[[", "]]"  # the mask must be visible without colour too
LONGEST_SHOWN = 1200  # characters of an example's prompt


@dataclass(frozen=True)
class Check:
    """Everything `prepare` found and did. rows_read = rows_other + over_long dropped + kept, and
    kept = rows + removed + not_drawn, summed over the parts.

    source, sha256, licence, licence_obligations: of the data. rows_other: left aside by `where`.
    over_long: count, action ("error", "cut", "drop"), longest_tokens, rows (the first five numbers).
    no_trainable_token: row numbers; always empty in a finished check, since such rows are an error.
    duplicates_exact: training rows that repeat an earlier one's prompt and answer. duplicates_near: see
    `duplicates.near_duplicates` (None over 50,000 rows). shared_train_evaluation_exact: training rows removed because their
    prompt stands in a held-out row. shared_train_evaluation_near: held-out rows near a training row, kept (None likewise).
    removed, not_drawn: rows by reason; by part. groups: distinct first labels of the written rows. second_group: for two
    group columns, its name and how many of its held-out values also occur in training rows.
    rows: written, by part. tokens: of the written rows. labels: answers and how often, per part (empty for free text with
    over 20 answers). trivial_answer: the most frequent training answer. examples: three training rows in pieces.
    """

    source: str
    sha256: str
    licence: str | None
    licence_obligations: list[str]
    rows_read: int
    rows_other: int
    kept: int
    over_long: dict[str, Any]
    no_trainable_token: list[int]
    duplicates_exact: int
    duplicates_near: int | None
    shared_train_evaluation_exact: int
    shared_train_evaluation_near: int | None
    removed: dict[str, int]
    not_drawn: dict[str, int]
    groups: dict[str, int]
    second_group: dict[str, Any] | None
    rows: dict[str, int]
    tokens: dict[str, Any]
    labels: dict[str, dict[str, int]]
    trivial_answer: str
    examples: list[dict[str, Any]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """As `check.json` holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Check:
        """A check read back from `check.json`."""
        return cls(**value)


def check_text(check: Check, width: int = 100) -> str:
    """The check as plain text, without colour."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(check_view(check))
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def check_view(check: Check) -> RenderableType:
    """The check for a terminal (rich)."""
    parts: list[RenderableType] = [Text(f"{check.source}  sha256 {check.sha256[:16]}...", style="bold"), "", _counts(check), ""]
    parts += [_parts(check), Text(_tokens(check)), ""]
    if check.labels.get("train"):
        parts += [_labels(check), ""]
    parts += _examples(check)
    parts += [Text("Licence", style="bold"), Text(f"  {check.licence or 'unknown'}")]
    parts += [Text(f"  - {line}") for line in check.licence_obligations]
    if check.warnings:
        parts += ["", Text("Warnings", style="bold yellow")]
        parts += [Text(f"  ! {line}", style="yellow") for line in check.warnings]
    return Group(*parts)


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    return table


def _number(value: int | None) -> str:
    return "not counted" if value is None else f"{value:,}"


def _counts(check: Check) -> Table:
    table = _grid("Rows", "")
    over = check.over_long
    lines: list[tuple[str, int | None]] = [
        ("read", check.rows_read),
        ("left aside by `where`", check.rows_other),
        (f"too long ({'dropped' if over['action'] == 'drop' else 'cut' if over['action'] == 'cut' else 'none allowed'})", over["count"]),
        ("without a trainable token", len(check.no_trainable_token)),
        ("kept", check.kept),
        ("exact duplicates within the training rows", check.duplicates_exact),
        ("  of these dropped", check.removed["duplicates"]),
        ("near duplicates within the training rows", check.duplicates_near),
        ("training rows removed: prompt stands in a held-out row", check.shared_train_evaluation_exact),
        ("training rows removed: prompt stands in a validation row", check.removed["train_shared_with_validation"]),
        ("validation rows removed: prompt stands in a held-out row", check.removed["validation_shared_with_evaluation"]),
        ("held-out rows near a training row (kept)", check.shared_train_evaluation_near),
    ]
    always = {"read", "kept", "without a trainable token", lines[2][0], "exact duplicates within the training rows"}
    for name, value in lines:
        if value != 0 or name in always or name.startswith("near"):
            table.add_row(name, _number(value))
    return table


def _parts(check: Check) -> Table:
    table = _grid("Part", "rows", "groups", "not drawn")
    for part, name in (("train", "train"), ("validation", "validation"), ("evaluation", "evaluation (held out)")):
        table.add_row(name, _number(check.rows[part]), _number(check.groups[part]), _number(check.not_drawn[part]))
    return table


def _tokens(check: Check) -> str:
    tokens = check.tokens
    number, longest = tokens["longest_row"]
    return (
        f"{tokens['train']:,} training tokens, {tokens['supervised']:,} of them trained on; half of the rows have at most "
        f"{tokens['p50']}, 95% at most {tokens['p95']}; the longest, row {number}, {longest}"
    )


def _labels(check: Check) -> Table:
    table = _grid("Answer", "train", "validation", "evaluation")
    for answer in check.labels["train"] | check.labels["validation"] | check.labels["evaluation"]:
        counts = {part: check.labels[part].get(answer, 0) for part in ("train", "validation", "evaluation")}
        name = _printable(answer) + ("  (the trivial answer)" if answer == check.trivial_answer else "")
        table.add_row(Text(name), *(f"{n:,} {n / max(1, check.rows[part]):4.0%}" for part, n in counts.items()))
    return table


def _examples(check: Check) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(f"Examples: only what stands in {TRAINED_OPEN} {TRAINED_CLOSE} is trained on", style="bold")]
    for example in check.examples:
        text = Text(f"  row {example['number']}: ", style="dim")
        for piece in example["pieces"]:
            if piece["trained"]:
                text.append(f"{TRAINED_OPEN}{_printable(piece['text'])}{TRAINED_CLOSE}", style="bold green")
            else:
                text.append(_shortened(_printable(piece["text"])), style="not dim")
        parts += [text, ""]
    return parts


def _printable(text: str) -> str:
    """Data must not steer the terminal: control characters are shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    """A long prompt's beginning and end."""
    left_out = len(text) - LONGEST_SHOWN
    half = LONGEST_SHOWN // 2
    return text if left_out <= 0 else f"{text[:half]} (... {left_out:,} characters not shown ...) {text[-half:]}"
