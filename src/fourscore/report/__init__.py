"""The page, the model card and the machine-readable record of a finished study.

    from fourscore import report
    report.write("runs/pilot")      # report.json, report.html, model-card.md

`assemble` reads files and knows nothing of pages; `render` and `model_card` see only what `assemble` returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourscore.report.assemble import assemble

__all__ = ["assemble", "model_card", "render", "write"]


def render(report: dict[str, Any]) -> str:
    """report.json's content -> one self-contained HTML page: no script, nothing fetched. Same input, same bytes."""
    from fourscore.report.page import render as render_page  # altair takes most of a second to import

    return render_page(report)


def model_card(report: dict[str, Any]) -> str:
    """report.json's content -> model-card.md with the front matter that the model hub and PEFT read."""
    from fourscore.report.card import model_card as card

    return card(report)


def write(run: str | Path, out: str | Path | None = None) -> None:
    """Write report.json, report.html and model-card.md of a run folder into `out` (the run folder itself by default).

    All three are made before the first is written, and each is written whole or not at all: an error leaves what was there.
    """
    from fourscore.files import atomic_file, write_json

    run = Path(run)
    out = run if out is None else Path(out)
    report = assemble(run)
    texts = {"report.html": render(report), "model-card.md": model_card(report)}
    write_json(out / "report.json", report)
    for name, text in texts.items():
        with atomic_file(out / name) as file:
            file.write(text)
