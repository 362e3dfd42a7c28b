"""A QLoRA training step beside its peer, PEFT on bitsandbytes' NF4, in turn on one machine.

    python bench/train_step.py [--cases all answer 1b] [--busy] [--rounds 3] [--steps 3] [--threads N] [--out FILE]

Rank 16 on all linear layers, AdamW. Each side runs in a process of its own (peak memory is a process's), the sides take turns, the
median of the rounds counts. On a busy machine take `--threads 1` and read `cpu_ratio`.

all      SmolLM2-135M, 4 rows of 256 tokens, every token but the first trained
answer   the same, the last four tokens of a row trained, as short answers do
1b       a 1B shape of random weights, 1 row of 512 tokens, every token but the first trained (two rounds, two steps)

--busy: after its steps each process steps twice more while another program spins on one core; `busy_share` is the speed then, as
a share of the same process's speed before (both sides under OMP_WAIT_POLICY=PASSIVE, as fourscore starts its own processes).
`limit_share`: the seconds that torch's dense bf16 needs for the step's matrix products alone (linear layers, adapters, head; not
attention) over the seconds of the step. A share of 1 would be a step in which everything else is free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIDES = ("peer", "ours")
BUSY_STEPS = 2


@dataclass(frozen=True)
class Case:
    """One step to time. supervised: trained tokens at the end of each row, None: all but the first; warm: tokens of the first, untimed
    step, None: a whole step; passes: whether ours may cut the step into forward passes as `train` does.
    """

    model: str
    rows: int
    tokens: int
    supervised: int | None = None
    rank: int = 16
    warm: int | None = None
    passes: bool = False

    @property
    def trained(self) -> int:
        """Trained tokens of the whole step."""
        return self.rows * (self.supervised or self.tokens - 1)


CASES = {"all": Case("135m", 4, 256), "answer": Case("135m", 4, 256, supervised=4), "1b": Case("1b", 1, 512)}
FEWER = {"1b": 2}  # rounds and steps at most, where a step takes many seconds


def token_rows(rows: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """The same random ids for both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocabulary, (rows, tokens), generator=generator).tolist()


def peak_bytes() -> int:
    """The most memory this process has held, from the kernel."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another program keeps one core busy inside the block. It ends with this one, whatever happens."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(10**6): pass"
    spinning = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        yield
    finally:
        spinning.kill()
        spinning.wait()


def timed(warm_up: Any, step: Any, steps: int, busy: bool) -> dict[str, float]:
    """Seconds a step: the first one (which builds kernels and optimiser state) is left out, the fastest of the others counts."""
    warm_up()

    def measure(count: int) -> list[tuple[float, float, float]]:
        found = []
        for _ in range(count):
            began, used = time.perf_counter(), time.process_time()
            loss = step()
            found.append((time.perf_counter() - began, time.process_time() - used, loss))
        return found

    quiet = measure(steps)
    result = {"seconds": min(q[0] for q in quiet), "cpu_seconds": min(q[1] for q in quiet), "loss": quiet[-1][2]}
    result["peak_rss_bytes"] = peak_bytes()
    if busy:
        with busy_core():
            loaded = measure(BUSY_STEPS)
        mean = {True: statistics.fmean(b[0] for b in loaded), False: statistics.fmean(q[0] for q in quiet)}
        result |= {"busy_seconds": mean[True], "busy_share": mean[False] / mean[True]}
    return result


def peer(folder: str, case: Case, steps: int, busy: bool) -> dict[str, float]:
    """PEFT + bitsandbytes as their documentation has it: NF4, double quantisation, bf16, labels to the model."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    network = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network = get_peft_model(network, LoraConfig(r=case.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(token_rows(case.rows, case.tokens, network.config.vocab_size))
    labels = ids.clone()
    if case.supervised:
        labels[:, : -case.supervised] = -100

    def step(part: slice = slice(None)) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(input_ids=ids[:, part], labels=labels[:, part], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return timed(lambda: step(slice(-case.warm, None) if case.warm else slice(None)), step, steps, busy)


def ours(folder: str, case: Case, steps: int, busy: bool) -> dict[str, float]:
    """fourscore's optimiser step, as `train` calls it."""
    from fourscore.study.child import without_bitsandbytes

    without_bitsandbytes()  # as every step of a study does
    from fourscore import spec
    from fourscore.model import add_lora, load
    from fourscore.train.batches import Example, micro_batches
    from fourscore.train.fused import fused
    from fourscore.train.optimise import Optimiser, settle_dtype

    settings = spec.Train(rank=case.rank, alpha=32, learning_rate=1e-4, warmup=0.0, tokens_per_step=case.rows * case.tokens)
    model = add_lora(load(folder, "nf4"), settings, seed=1)
    settle_dtype(model.network)
    optimiser = Optimiser(model.network, settings, steps_planned=10**6)
    prompt = case.tokens - case.supervised if case.supervised else 1
    ids = token_rows(case.rows, case.tokens, model.network.config.vocab_size)
    examples = [Example(i, tuple(row), prompt, "") for i, row in enumerate(ids)]
    small = [Example(0, tuple(ids[0][: case.warm]), 1, "")]
    every = tuple(range(case.rows))
    plan = micro_batches(every, [case.tokens] * case.rows) if case.passes else (every,)

    def step() -> float:
        return optimiser.step(0, plan, examples).loss

    with fused(model.network):
        return timed(lambda: optimiser.step(0, ((0,),), small) if case.warm else step(), step, steps, busy)


def products(config: Any, case: Case) -> Counter[tuple[int, int, int]]:
    """The matrix products of one step by shape, as (m, k, n) of an [m, k] @ [k, n], with how often each occurs."""
    tokens, hidden, inner, rank = case.rows * case.tokens, config.hidden_size, config.intermediate_size, case.rank
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    found: Counter[tuple[int, int, int]] = Counter()
    linear = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    for into, out in linear:
        base = [(tokens, into, out), (tokens, out, into)]  # x W, and dy W^T
        lora = [
            (tokens, into, rank),
            (tokens, rank, out),
            (tokens, out, rank),
            (tokens, rank, into),
            (rank, tokens, into),
            (out, tokens, rank),
        ]
        for shape in base + lora:
            found[shape] += config.num_hidden_layers
    found.update([(case.trained, hidden, config.vocab_size), (case.trained, config.vocab_size, hidden)])
    return found


def limit_seconds(folder: str, case: Case) -> float:
    """Seconds that torch's dense bf16 needs for the products of one step, each shape the median of five, the right side laid out [n, k]."""
    import torch
    from transformers import AutoConfig

    total = 0.0
    for (m, k, n), count in products(AutoConfig.from_pretrained(folder), case).items():
        left, right = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16().t()
        torch.mm(left, right)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - began)
        total += count * statistics.median(seconds)
    return total


def child(side: str, folder: Path, case: Case, steps: int, busy: bool, threads: int | None) -> dict[str, float]:
    """One side (or `limit`) in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--case", json.dumps(asdict(case))]
    command += ["--steps", str(steps), *(["--busy"] if busy else [])]
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    variables = {"FOURSCORE_QUIET": "1", "OMP_WAIT_POLICY": "PASSIVE", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{side}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, and the limit of the products."""
    from shapes import folder_of

    folder = folder_of(case.model)
    rounds, steps = (min(n, FEWER.get(name, n)) for n in (options.rounds, options.steps))
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            runs[side].append(child(side, folder, case, steps, options.busy, options.threads))
            print(name, side, json.dumps(runs[side][-1]), file=sys.stderr, flush=True)
    limit = child("limit", folder, case, steps, False, options.threads)["seconds"]

    def medians(what: str) -> dict[str, float]:
        return {side: statistics.median(run[what] for run in found) for side, found in runs.items()}

    seconds, cpu, memory = medians("seconds"), medians("cpu_seconds"), medians("peak_rss_bytes")
    record: dict[str, Any] = {
        "case": asdict(case),
        "tokens_per_second": {side: case.rows * case.tokens / s for side, s in seconds.items()},
        "peak_rss_bytes": memory,
        "loss": {side: found[-1]["loss"] for side, found in runs.items()},
        "speed_ratio": seconds["peer"] / seconds["ours"],
        "cpu_ratio": cpu["peer"] / cpu["ours"],
        "memory_ratio": memory["ours"] / memory["peer"],
        "limit_seconds": limit,
        "limit_share": limit / seconds["ours"],
        "limit_share_peer": limit / seconds["peer"],
    }
    if options.busy:
        shares = medians("busy_share")
        record |= {"busy_share": shares["ours"], "busy_share_peer": shares["peer"]}
    return record | {"rounds": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["all", "answer"], choices=list(CASES))
    parser.add_argument("--busy", action="store_true", help="also beside a program that spins on one core")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=[*SIDES, "limit"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "limit":
        print(json.dumps({"seconds": limit_seconds(options.folder, Case(**json.loads(options.case)))}))
        return
    if options.side:
        side = {"peer": peer, "ours": ours}[options.side]
        print(json.dumps(side(options.folder, Case(**json.loads(options.case)), options.steps, options.busy)))
        return

    from fourscore.machine import describe_machine

    record: dict[str, Any] = {"machine": describe_machine().to_json(), "threads": options.threads}
    record["cases"] = {name: compare(name, CASES[name], options) for name in options.cases}
    kept = ("speed_ratio", "cpu_ratio", "memory_ratio", "limit_share", "limit_share_peer", "busy_share", "busy_share_peer")
    record["rows"] = [
        {"what": f"step, {name}"} | {field: found[field] for field in kept if field in found} for name, found in record["cases"].items()
    ]
    text = json.dumps(record, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
