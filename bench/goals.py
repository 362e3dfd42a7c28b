"""The goals of goals.yaml beside the figures of bench/results/: what was promised, what was measured, met or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fourscore.files import FourscoreError

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Goal:
    """One line of goals.yaml; the fields are explained there."""

    name: str
    peer: str
    bench: str
    row: dict[str, Any]
    value: str
    goal: float
    better: Literal["more", "less"]
    read: str
    note: str = ""
    unit: str = "x"

    def met(self, measured: float) -> bool:
        return measured >= self.goal if self.better == "more" else measured <= self.goal

    def measured(self, record: dict[str, Any]) -> float | None:
        """The figure in a bench's record; None where the bench did not measure it. Two rows that fit are an error."""
        found = [row for row in record.get("rows", []) if all(row.get(field) == value for field, value in self.row.items())]
        if len(found) > 1:
            raise FourscoreError(f"{len(found)} rows fit the goal `{self.name}`", where=self.bench, todo="say more in its `row`")
        return None if not found or found[0].get(self.value) is None else float(found[0][self.value])


def read_goals(path: Path = FOLDER / "goals.yaml") -> list[Goal]:
    """The goals, in the order of the file."""
    return [Goal(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def figure(value: float | None, unit: str) -> str:
    """A figure as a table shows it: 3 digits where they mean something, with its unit."""
    if value is None:
        return "not measured"
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{digits}{'' if unit == 'x' else ' '}{unit}"
