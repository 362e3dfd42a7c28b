"""The process of plan's training probe: its peak memory is what one optimiser step takes, and nothing else."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from fourscore.files import FourscoreError
from fourscore.spec import NEW_BASE, Study
from fourscore.study.child import die_with_parent, without_bitsandbytes


def probe_training(study: Study, base: Path, data: Path) -> dict[str, Any]:
    """One optimiser step on the longest rows, with the 4-bit base and a fresh adapter."""
    from fourscore.data import read_rows
    from fourscore.model import add_lora, load
    from fourscore.model.device import peak_gpu_bytes
    from fourscore.train import probe

    rows = read_rows(data, "train")
    started = time.monotonic()
    model = load(base, weights="nf4", block_size=study.model.block_size, double_quant=study.model.double_quant, trainable=True)
    # a start from a base of its own (`pissa`, `olora`) takes the same time and memory once that base is there
    settings = study.train.model_copy(update={"init": "lora"}) if study.train.init in NEW_BASE else study.train
    model = add_lora(model, settings, study.train.seeds[0], rows)
    load_seconds = time.monotonic() - started
    taken = probe(model, rows, study.train)
    return {
        "seconds": taken.seconds,
        "tokens": taken.tokens,
        "peak_rss_bytes": taken.peak_rss_bytes,
        "peak_gpu_bytes": peak_gpu_bytes(),
        "load_seconds": load_seconds,
        "working_seconds": time.monotonic() - started,
        "model_bytes": model.disk_bytes,
    }


def main() -> int:
    """Read the order from stdin, print what was measured as one line of JSON."""
    die_with_parent(int(sys.argv[1]))
    without_bitsandbytes()
    asked = json.loads(sys.stdin.read())
    try:
        told = probe_training(Study.model_validate(asked["study"]), Path(asked["base"]), Path(asked["data"]))
    except FourscoreError as error:
        told = {"error": {"what": error.what, "where": error.where, "todo": error.todo}}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
