"""Loading and quantising to NF4 beside transformers + bitsandbytes, in turn on one machine.

    python bench/loading.py [--threads N] [--rounds 3] [--quick] [--out bench/results/loading.json]

The 1B shape (random bf16 weights, kept in build/bench/models: 2.1 GB) and SmolLM2-135M. Each side runs in processes of
its own. A process first loads a tiny model of the same family, so that imports are done; then it is timed from the call to
the network and its tokenizer. The weights lie in the page cache on both sides (the file is read once before each process): disks are
not measured. Memory above the process is RssAnon, sampled every half millisecond, less what it was before the call.
--quick: SmolLM2-135M alone, one round. With --threads 1 read `cpu_ratio` on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from shapes import TOKENIZER, folder_of, make

GOALS = {"1b": {"speed_ratio": 7.0}}


def kilobytes(field: str) -> int:
    """A line of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def peer(folder: str) -> Any:
    """transformers + bitsandbytes as their documentation has it: NF4, double quantisation, bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    network = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    return network, AutoTokenizer.from_pretrained(folder)


def ours(folder: str) -> Any:
    """fourscore's load."""
    import fourscore

    return fourscore.load(folder, "nf4")


def timed(side: Any, folder: str, warm_up: str) -> dict[str, Any]:
    """One load in this process: seconds, CPU seconds, memory."""
    side(warm_up)
    before = most = kilobytes("RssAnon")
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, kilobytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    loaded = side(folder)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    done.set()
    watcher.join()
    found: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": kilobytes("VmHWM") * 1024}
    found |= {"peak_anonymous_bytes": (most - before) * 1024, "held_anonymous_bytes": (kilobytes("RssAnon") - before) * 1024}
    if side is ours:
        found["memory_bound_bytes"] = bound(loaded)
    return found


def bound(model: Any) -> int:
    """4-bit size, 16-bit embeddings and the largest layer: what loading may hold."""
    layers = [model.network.get_submodule(name) for name in model.quantised]
    largest = max(layer.in_features * layer.out_features * 2 for layer in layers)
    return model.disk_bytes + largest  # norms (a thousandth) included


def measure(side: str, folder: Path, warm_up: Path, threads: int | None) -> dict[str, Any]:
    """One side in its own process, its file in the page cache."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as weights:
            while weights.read(1 << 24):
                pass
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--warm-up", str(warm_up)]
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FOURSCORE_QUIET": "1", **variables})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, folder: Path, warm_up: Path, quantised: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    for _ in range(options.rounds):
        for side in runs:
            runs[side].append(measure(side, folder, warm_up, options.threads))
            print(name, side, json.dumps(runs[side][-1]), file=sys.stderr, flush=True)

    def median(side: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[side])

    record: dict[str, Any] = {what: {s: median(s, what) for s in runs} for what in ("seconds", "cpu_seconds", "peak_rss_bytes")}
    record["peak_anonymous_bytes"] = {side: median(side, "peak_anonymous_bytes") for side in runs}
    record["memory_bound_bytes"] = runs["ours"][0]["memory_bound_bytes"]
    record["speed_ratio"] = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs["peer"], runs["ours"], strict=True))
    record["cpu_ratio"] = statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(runs["peer"], runs["ours"], strict=True))
    record["memory_share_of_bound"] = record["peak_anonymous_bytes"]["ours"] / record["memory_bound_bytes"]
    if quantised is not None:
        record["quantised_folder"] = measure("ours", quantised, warm_up, options.threads)
    record["goal"] = {**GOALS.get(name, {}), "memory_share_of_bound": 1.0}
    return record | {"rounds": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="SmolLM2-135M alone, one round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["peer", "ours", "save"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "save":
        ours(options.folder).network.save_pretrained(options.warm_up)
        return
    if options.side:
        print(json.dumps(timed({"peer": peer, "ours": ours}[options.side], options.folder, options.warm_up)))
        return

    from fourscore.machine import describe_machine
    from fourscore.model import pull
    from fourscore.progress import say

    if options.quick:
        options.rounds = 1
    smol = pull("smollm2-135m-instruct")
    record: dict[str, Any] = {"machine": describe_machine().to_json(), "threads": options.threads, "page_cache": "warm on both sides"}
    record["models"] = {}
    with tempfile.TemporaryDirectory() as made:
        few = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        (tiny := Path(made) / "tiny").mkdir()
        warm_up = make(tiny, smol, hidden_size=64, intermediate_size=128, **few)
        models = {"135m": smol}
        if not options.quick:
            say("the 1B shape (2.1 GB)")
            models["1b"] = folder_of("1b")
        for name, folder in models.items():
            quantised = Path(made) / f"{name}-nf4"
            command = [sys.executable, __file__, "--side", "save", "--folder", str(folder), "--warm-up", str(quantised)]
            subprocess.run(command, check=True, capture_output=True)
            for file in TOKENIZER:
                shutil.copy(smol / file, quantised)
            record["models"][name] = compare(name, folder, warm_up, quantised, options)
    record["rows"] = [
        {"what": f"load and quantise, {name}"} | {field: found[field] for field in ("speed_ratio", "memory_share_of_bound")}
        for name, found in record["models"].items()
    ]
    text = json.dumps(record, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
