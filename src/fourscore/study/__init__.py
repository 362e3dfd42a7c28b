"""A study as a graph of steps: `execute` runs what is missing, `verify` re-derives what was claimed."""

from __future__ import annotations

from fourscore.study.execute import execute
from fourscore.study.verify import verify

__all__ = ["execute", "verify"]
