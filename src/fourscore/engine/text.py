"""Tokens become text that never has to be taken back: whole characters, and nothing that may be the start of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 48  # tokens decoded again for each new one; decoding the whole answer each time would grow with its square
PENDING = "\ufffd"  # how decoders write bytes that are no whole character yet
CLEANED = 5  # characters that transformers' clean-up of spaces may still change ("do n't" to "don't")


class Text:
    """The text of a growing answer. decode: token ids to text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), *, hold: int = 0) -> None:
        self._decode, self._stop, self._hold = decode, stop, hold
        self.ids: list[int] = []
        self.given = 0  # characters handed out
        self.stopped = False
        self._fixed, self._from = "", 0  # text of ids[: self._from]
        self._text = ""
        self._ends: list[int] = []  # after each token: how many characters were whole,
        self._broken: list[bool] = []  # and whether a part of one followed
        self._released = 0

    @classmethod
    def of(cls, tokenizer: Any, stop: Sequence[str] = ()) -> Text:
        """Decodes as `tokenizer.decode(ids, skip_special_tokens=True)` does."""
        cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        return cls(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stop, hold=CLEANED if cleans else 0)

    @property
    def value(self) -> str:
        """The text so far, up to the stop string if one was met."""
        return self._text

    def add(self, token: int) -> bool:
        """Take a token; True when the text now has a stop string, before which it is cut."""
        self.ids.append(token)
        tail = self._decode(self.ids[self._from :])
        self._text = self._fixed + tail
        met = [at for s in self._stop if (at := self._text.find(s, self.given)) >= 0]
        if met:
            self.stopped, self._text = True, self._text[: min(met)]
        self._ends.append(len(self._text.rstrip(PENDING)))
        self._broken.append(self._text.endswith(PENDING))
        if not self.stopped and len(self.ids) - self._from >= 2 * WINDOW:
            self._move(tail)
        return self.stopped

    def certain(self) -> tuple[str, list[int]]:
        """The text that has become certain since the last call, and the numbers of the tokens that it completes."""
        whole = self._text.rstrip(PENDING)
        end = len(whole) - max(self._hold, _begun(whole, self._stop))
        return self._give(self._text[self.given : max(end, self.given)])

    def rest(self) -> tuple[str, list[int]]:
        """All text that is left, once no token follows. Tokens that lie wholly behind a stop string are left out for good."""
        text, numbers = self._text[self.given :], list(range(self._released, self.kept))
        self.given, self._released = len(self._text), self.kept
        return text, numbers

    @property
    def kept(self) -> int:
        """How many tokens it takes to write the text: all, or those up to the stop string."""
        if not self.stopped:
            return len(self.ids)
        if not self._text:
            return 0
        return next((n + 1 for n, end in enumerate(self._ends) if end >= len(self._text)), len(self.ids))

    def _give(self, text: str) -> tuple[str, list[int]]:
        self.given += len(text)
        numbers = []
        while self._released < len(self._ends) and self._ends[self._released] + self._broken[self._released] <= self.given:
            numbers.append(self._released)
            self._released += 1
        return text, numbers

    def _move(self, tail: str) -> None:
        """Begin the window later, where the two parts decode to the same text as the whole."""
        for at in range(len(self.ids) - WINDOW, self._from, -1):
            head, rest = self._decode(self.ids[self._from : at]), self._decode(self.ids[at:])
            if not head.endswith(PENDING) and head + rest == tail:
                self._fixed, self._from = self._fixed + head, at
                return


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    most = min(len(text), max((len(s) - 1 for s in stop), default=0))
    return next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
