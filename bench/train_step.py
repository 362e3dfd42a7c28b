"""A QLoRA training step beside its peer, PEFT on bitsandbytes' NF4, in turn on one machine.

    python bench/train_step.py MODEL_FOLDER [--rows 4] [--tokens 256] [--rounds 3] [--threads N] [--out bench/results/train_step.json]

Each side runs in a process of its own (peak memory is a process's), the sides take turns, the median of the rounds counts.
Rank 16 on all linear layers, AdamW, one step of `rows` x `tokens` tokens. Two cases: `all` trains on every token but the
first, `answer` on the last four, as short answers do. On a busy machine take `--threads 1` and read `cpu_ratio`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SUPERVISED = {"all": None, "answer": 4}


def token_rows(rows: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """The same random ids for both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocabulary, (rows, tokens), generator=generator).tolist()


def peak_bytes() -> int:
    """The most memory this process has held, from the kernel."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def timed(step: Any, steps: int) -> dict[str, float]:
    """Seconds a step, the first one (which builds kernels and optimiser state) left out."""
    step()
    seconds, cpu = [], []
    for _ in range(steps):
        began, used = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu), "loss": loss, "peak_rss_bytes": peak_bytes()}


def peer(folder: str, case: str, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """PEFT + bitsandbytes as their documentation has it: NF4, double quantisation, bf16, labels to the model."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    network = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(token_rows(rows, tokens, network.config.vocab_size))
    labels = ids.clone()
    if SUPERVISED[case]:
        labels[:, : -SUPERVISED[case]] = -100

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return timed(step, steps)


def ours(folder: str, case: str, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """fourscore's optimiser step, as `train` calls it."""
    from fourscore.study.child import without_bitsandbytes

    without_bitsandbytes()  # as every step of a study does
    from fourscore import spec
    from fourscore.model import add_lora, load
    from fourscore.train.batches import Example
    from fourscore.train.fused import fused
    from fourscore.train.optimise import Optimiser, settle_dtype

    settings = spec.Train(rank=16, alpha=32, learning_rate=1e-4, warmup=0.0, tokens_per_step=rows * tokens)
    model = add_lora(load(folder, "nf4"), settings, seed=1)
    settle_dtype(model.network)
    optimiser = Optimiser(model.network, settings, steps_planned=10**6)
    prompt = tokens - SUPERVISED[case] if SUPERVISED[case] else 1
    ids = token_rows(rows, tokens, model.network.config.vocab_size)
    examples = [Example(i, tuple(row), prompt, "") for i, row in enumerate(ids)]
    plan = (tuple(range(rows)),)
    with fused(model.network):
        return timed(lambda: optimiser.step(0, plan, examples).loss, steps)


def measure(side: str, case: str, options: argparse.Namespace) -> dict[str, float]:
    """One side in its own process."""
    command = [sys.executable, __file__, options.folder, "--side", side, "--case", case]
    command += ["--rows", str(options.rows), "--tokens", str(options.tokens), "--steps", str(options.steps)]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FOURSCORE_QUIET": "1", **threads})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a transformers directory, 16 bit")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(SUPERVISED))
    parser.add_argument("--side", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=list(SUPERVISED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side = {"peer": peer, "ours": ours}[options.side]
        print(json.dumps(side(options.folder, options.case, options.rows, options.tokens, options.steps)))
        return

    from fourscore.machine import describe_machine

    record: dict[str, Any] = {
        "machine": describe_machine().to_json(),
        "rows": options.rows,
        "tokens": options.tokens,
        "threads": options.threads,
        "cases": {},
    }
    for case in options.cases:
        runs: dict[str, list[dict[str, float]]] = {"peer": [], "ours": []}
        for _ in range(options.rounds):
            for side in runs:
                runs[side].append(measure(side, case, options))
                print(case, side, json.dumps(runs[side][-1]), file=sys.stderr, flush=True)
        seconds = {side: statistics.median(r["seconds"] for r in found) for side, found in runs.items()}
        cpu = {side: statistics.median(r["cpu_seconds"] for r in found) for side, found in runs.items()}
        memory = {side: statistics.median(r["peak_rss_bytes"] for r in found) for side, found in runs.items()}
        record["cases"][case] = {
            "tokens_per_second": {side: options.rows * options.tokens / s for side, s in seconds.items()},
            "peak_rss_bytes": memory,
            "loss": {side: found[-1]["loss"] for side, found in runs.items()},
            "speed_ratio": seconds["peer"] / seconds["ours"],
            "cpu_ratio": cpu["peer"] / cpu["ours"],
            "memory_ratio": memory["ours"] / memory["peer"],
            "rounds": runs,
        }
    fields = ("speed_ratio", "cpu_ratio", "memory_ratio")
    record["rows"] = [{"what": f"step, {case}"} | {field: found[field] for field in fields} for case, found in record["cases"].items()]
    text = json.dumps(record, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
