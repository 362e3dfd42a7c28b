"""Progress with an ETA for people, on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

PLAIN_SECONDS = 10.0  # without a terminal: at most one line in this time


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bar:
    """One running task: `advance` it, give it facts to show (`loss="1.23"`)."""

    def __init__(self, title: str, total: float, unit: str, show: bool) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0.0
        self.started = self.printed = time.monotonic()
        self.already = 0.0  # done before this process: not counted in the speed
        self._show, self._facts = show, ""
        self._live = show and sys.stderr.isatty()

    def resume_at(self, done: float) -> None:
        """Say that `done` of the total was finished by an earlier run."""
        self.done = self.already = done

    def advance(self, by: float = 1.0, **facts: str) -> None:
        """Count `by` more; `facts` replace what is shown beside the bar."""
        self.done += by
        if facts:
            self._facts = "  ".join(f"{k} {v}" for k, v in facts.items())
        now = time.monotonic()
        if self._show and now - self.printed > (0.2 if self._live else PLAIN_SECONDS):
            self.printed = now
            self._print(now)

    def _print(self, now: float, last: bool = False) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        speed = (self.done - self.already) / max(now - self.started, 1e-9)
        took = now - self.started
        left = f"took {duration(took)}" if last else f"{duration((self.total - self.done) / speed)} left" if speed > 0 else "..."
        line = f"{self.title} {share:4.0%}  {self.done:,.0f}/{self.total:,.0f} {self.unit}  {left}  {self._facts}".rstrip()
        if self._live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write("\r\x1b[K" + line[: width - 1] + ("\n" if last else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Print the last line."""
        if self._show:
            self._print(time.monotonic(), last=True)


@contextlib.contextmanager
def track(title: str, total: float, unit: str = "items") -> Iterator[Bar]:
    """Show progress while the block runs. FOURSCORE_QUIET=1 (set by --json) shows nothing."""
    bar = Bar(title, total, unit, show=os.environ.get("FOURSCORE_QUIET") != "1")
    try:
        yield bar
    finally:
        bar.close()


def say(line: str) -> None:
    """A line for people, on stderr; quiet with FOURSCORE_QUIET=1."""
    if os.environ.get("FOURSCORE_QUIET") != "1":
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
