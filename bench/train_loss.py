"""Loss after 100 optimiser steps on the pilot's data: fourscore beside PEFT + bitsandbytes, three seeds each.

    python bench/train_loss.py [--steps 100] [--seeds 1 2 3] [--threads N] [--quick] [--out bench/results/train_loss.json]

A fast step is worth nothing if it learns less. Both sides get the same rows of examples/pilot.yaml (prepared, rendered and cut into
micro-batches once), the same start of the adapter, the same order, the same settings: AdamW, learning rate with warm-up and cosine,
clipping, no dropout, the mean over a step's answer tokens. A seed decides the start and the order. Each side takes its own NF4 base
from the same 16-bit folder, and each computes its own losses.

What counts is the loss on the pilot's validation rows after the last step. Goal: the mean of our seeds lies between the lowest and
the highest of the peer's seeds. `share_of_spread` says the same as one figure: the distance between the two means over the distance
from the peer's mean to the end of its spread on our side; 1 or less is within.

Every run is a process of its own and leaves a file in build/bench/train_loss: a bench that was stopped goes on where it was, unless
code, rows or settings have changed. Nothing is timed, so other programs and the number of threads do not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from fourscore.files import hash_file, hash_folder, hash_json, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "examples" / "pilot.yaml"
WORK = ROOT / "build" / "bench" / "train_loss"
LAST = 20  # steps whose training loss is averaged: one step is 20 rows, too few to compare
SIDES = ("peer", "ours")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def prepare_runs(work: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    """The one description of every run, and a start of the adapter for each seed (PEFT's folder); written into `work`."""
    from importlib.metadata import version

    from fourscore.data import prepare, read_rows
    from fourscore.model import add_lora, load, pull, save_adapter
    from fourscore.spec import read_study
    from fourscore.train.batches import plan_steps, render_examples

    study = read_study(STUDY)
    folder = pull(study.model.name)
    settings = study.train
    model = load(folder, "nf4")
    prepare(study.data, model.tokenizer, work / "data")
    parts = {part: render_examples(model.tokenizer, read_rows(work / "data", part)) for part in ("train", "validation")}
    rows = {part: [{"ids": e.ids, "prompt": e.prompt_length, "number": e.number} for e in found] for part, found in parts.items()}
    lengths = [len(e.ids) for e in parts["train"]]
    epochs = 1.0 + steps * settings.tokens_per_step / sum(lengths)  # more than enough; cut to `steps` below
    plans = {str(seed): plan_steps(lengths, settings.tokens_per_step, epochs, seed)[:steps] for seed in seeds}
    runs = {
        "steps": steps,
        "rows": rows,
        "plans": plans,
        "train": settings.model_dump(mode="json"),
        "versions": {name: version(name) for name in PACKAGES},
        "code": hash_json({n: h for n, h in hash_folder(ROOT / "src" / "fourscore").items() if "__pycache__" not in n}),
        "bench": hash_file(__file__),
    }
    peer_key = hash_json({n: value for n, value in runs.items() if n != "code"})  # our code is no part of what the peer does
    runs["keys"] = {"peer": peer_key, "ours": hash_json(runs)}
    runs["folder"] = str(folder)
    for seed in seeds:
        save_adapter(add_lora(load(folder, "nf4"), settings, seed), work / f"start-{seed}")
    write_json(work / "runs.json", runs)
    return runs


def ours(runs: dict[str, Any], seed: int, start: Path) -> dict[str, Any]:
    """fourscore's own step and validation, as `train` calls them."""
    from fourscore.study.child import without_bitsandbytes

    without_bitsandbytes()
    from fourscore import spec
    from fourscore.model import load
    from fourscore.train.batches import Example
    from fourscore.train.fused import fused
    from fourscore.train.optimise import Optimiser, judge, settle_dtype

    model = load(runs["folder"], "nf4", adapter=start, trainable=True)
    settle_dtype(model.network)
    optimiser = Optimiser(model.network, spec.Train(**runs["train"]), runs["steps"])
    train, held_out = (
        [Example(r["number"], tuple(r["ids"]), r["prompt"], "") for r in runs["rows"][part]] for part in ("train", "validation")
    )
    with fused(model.network):
        before = judge(model.network, optimiser.loss, held_out)
        losses = []
        for number, plan in enumerate(runs["plans"][str(seed)]):
            losses.append(optimiser.step(number, plan, train).loss)
            progress("ours", seed, number, losses[-1])
        return {"validation_start": before, "losses": losses, "validation": judge(model.network, optimiser.loss, held_out)}


def peer(runs: dict[str, Any], seed: int, start: Path) -> dict[str, Any]:
    """PEFT + bitsandbytes as their documentation has it: NF4, double quantisation, autocast to bf16, labels to the model."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fourscore import spec
    from fourscore.train.batches import micro_batches
    from fourscore.train.optimise import JUDGE_TOKENS, Optimiser

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    network = AutoModelForCausalLM.from_pretrained(runs["folder"], quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network = PeftModel.from_pretrained(network, str(start), is_trainable=True)
    network.train()
    settings = spec.Train(**runs["train"])
    schedule = Optimiser(network, settings, runs["steps"])  # its learning rates only
    trained = [p for p in network.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def answer_loss(part: str, rows: list[int], supervised: int) -> Any:
        chosen = [runs["rows"][part][i] for i in rows]
        width = max(len(r["ids"]) for r in chosen)
        ids, mask = torch.zeros(len(chosen), width, dtype=torch.long), torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for line, row in enumerate(chosen):
            length = len(row["ids"])
            ids[line, :length], mask[line, :length] = torch.tensor(row["ids"]), 1
            labels[line, row["prompt"] : length] = ids[line, row["prompt"] : length]
        with torch.autocast("cpu", torch.bfloat16):
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            return network(**given, use_cache=False, num_items_in_batch=supervised).loss

    def answer_tokens(part: str, rows: list[int]) -> int:
        return sum(len(runs["rows"][part][i]["ids"]) - runs["rows"][part][i]["prompt"] for i in rows)

    def validation() -> float:
        # In training mode, which without dropout computes the same: after one forward pass in eval mode bitsandbytes 0.50.2 keeps its
        # layers repacked on a CPU with AVX512-BF16, and further training silently loses gradients (6.35 -> 6.19 in three steps, not 1.6).
        every = list(range(len(runs["rows"]["validation"])))
        groups = micro_batches(every, [len(r["ids"]) for r in runs["rows"]["validation"]], JUDGE_TOKENS)
        with torch.no_grad():
            nats = sum(answer_loss("validation", list(rows), answer_tokens("validation", every)).item() for rows in groups)
        return nats

    before = validation()
    losses = []
    for number, plan in enumerate(runs["plans"][str(seed)]):
        supervised = sum(answer_tokens("train", rows) for rows in plan)
        total = 0.0
        for rows in plan:
            loss = answer_loss("train", rows, supervised)
            loss.backward()
            total += loss.item()
        for group in adamw.param_groups:
            group["lr"] = schedule.learning_rate(number)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        losses.append(total)
        progress("peer", seed, number, total)
    return {"validation_start": before, "losses": losses, "validation": validation()}


def progress(side: str, seed: int, number: int, loss: float) -> None:
    if number % 10 == 9:
        print(f"{side} seed {seed} step {number + 1}: loss {loss:.4f}", file=sys.stderr, flush=True)


def compare(found: dict[str, list[float]]) -> dict[str, Any]:
    """Means, the peer's spread, and where our mean lies in it. One figure a seed on each side."""
    means = {side: statistics.fmean(values) for side, values in found.items()}
    low, high = min(found["peer"]), max(found["peer"])
    gap = means["ours"] - means["peer"]
    room = high - means["peer"] if gap > 0 else means["peer"] - low
    inside = low <= means["ours"] <= high
    return {
        "ours": means["ours"],
        "peer": means["peer"],
        "peer_low": low,
        "peer_high": high,
        "difference": gap,
        "within_spread": inside,
        "share_of_spread": abs(gap) / room if room else None,  # None: one seed has no spread
    }


def rows_of(done: dict[str, dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """The rows of the result; none before both sides have all seeds."""
    if any(f"{side}-{seed}" not in done for side in SIDES for seed in seeds):
        return []
    measures = {
        "validation loss": lambda run: run["validation"],
        f"training loss, mean of the last {LAST} steps": lambda run: statistics.fmean(run["losses"][-LAST:]),
    }
    rows = []
    for what, figure in measures.items():
        found = {side: [figure(done[f"{side}-{seed}"]) for seed in seeds] for side in SIDES}
        rows.append({"what": f"{what} after {len(done[f'ours-{seeds[0]}']['losses'])} steps"} | compare(found) | {"seeds": found})
    return rows


def run_one(side: str, seed: int, work: Path, runs: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """One run in its own process, or its result where it is there already."""
    file = work / f"{side}-{seed}.json"
    if file.exists() and (known := read_json(file)).get("key") == runs["keys"][side]:
        return known
    command = [sys.executable, __file__, "--side", side, "--seeds", str(seed), "--work", str(work)]
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "FOURSCORE_QUIET": "1", **variables})
    if done.returncode:
        sys.exit(f"{side}, seed {seed}: exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"key": runs["keys"][side]}
    write_json(file, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--quick", action="store_true", help="three steps of two seeds: does it run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="default: build/bench/train_loss")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work or (WORK.with_name(f"{WORK.name}-quick") if options.quick else WORK)
    if options.side:
        (seed,) = options.seeds
        side = {"peer": peer, "ours": ours}[options.side]
        print(json.dumps(side(read_json(work / "runs.json"), seed, work / f"start-{seed}")))
        return

    from fourscore.machine import describe_machine

    seeds, steps = ([1, 2], 3) if options.quick else (options.seeds, options.steps)
    runs = prepare_runs(work, seeds, steps)
    record: dict[str, Any] = {
        "machine": describe_machine().to_json(),
        "threads": options.threads,
        "settings": runs["train"] | {"steps": steps, "seeds": seeds, "evaluations": None},
        "versions": runs["versions"],
        "rows_of_data": {part: len(found) for part, found in runs["rows"].items()},
        "runs": {},
    }
    for seed in seeds:
        for side in SIDES:
            found = run_one(side, seed, work, runs, options.threads)
            record["runs"][f"{side}-{seed}"] = {name: value for name, value in found.items() if name != "key"}
            record["rows"] = rows_of(record["runs"], seeds)
            if options.out:
                write_json(options.out, record)
            print(f"{side} seed {seed}: validation {found['validation_start']:.4f} -> {found['validation']:.4f}", flush=True)
    print(json.dumps(record["rows"], indent=1))


if __name__ == "__main__":
    main()
