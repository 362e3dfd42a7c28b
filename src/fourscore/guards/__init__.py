"""What stands between a question and the model, and between the model and its reader. The interface; models come behind it.

A guard is any object with these two methods. Serving calls `check_in` before a question costs anything, and `check_out` before
text leaves: on the whole answer so far, at the end of a sentence, so that nothing is sent which was not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Verdict:
    """What a guard found. `reason` is shown to whoever asked; `kind` is a word for logs and metrics."""

    allowed: bool
    reason: str = ""
    kind: str = ""


ALLOWED = Verdict(True)


class Guard(Protocol):
    """Looks at what goes in and what comes out. Called from several threads; must not keep what it reads."""

    name: str

    def check_in(self, messages: Sequence[dict[str, Any]]) -> Verdict:
        """Judge a conversation (role and content of each message) before the model sees it."""

    def check_out(self, text: str) -> Verdict:
        """Judge an answer as far as it is written."""


def first_refusal(verdicts: Sequence[tuple[str, Verdict]]) -> tuple[str, Verdict] | None:
    """The first (guard's name, verdict) that refuses, or None."""
    return next(((name, verdict) for name, verdict in verdicts if not verdict.allowed), None)
